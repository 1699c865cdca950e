"""Claims of the README and docs/: their commands are accepted, what they name exists, and their size is bounded."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from dist_vlcl.__main__ import COMMANDS
from dist_vlcl.commands import tune
from dist_vlcl.config import CONFIG_FOLDER, compose_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "LOG.md")]
WITH_COMMANDS = [page for page in PAGES if page.name not in ("extending.md", "performance.md")]  # which have tests of their own
COMMAND = re.compile(r"(accelerate launch .* -m|python -m|dist-vlcl|make|torchrun .* -m|sbatch|launch/\w+\.sh) ")


def commands_of(page: Path) -> list[list[str]]:
    """Return the commands that stand on lines of their own, and those in the text that have no placeholder such as OPTIONS."""
    text = page.read_text().replace("\\\n", " ")
    lines = [re.sub(r"\s# .*", "", line.strip()) for line in text.splitlines() if line.startswith("    ")]
    inline = [words for words in re.findall(r"`([^`\n]+)`", text) if not re.search(r"\b[A-Z]{2,}\b", words)]
    return [as_module(shlex.split(line)) for line in lines + inline if COMMAND.match(line) and "..." not in line]


def as_module(command: list[str]) -> list[str]:
    """Return a command with `dist-vlcl NAME` replaced by the module that it runs."""
    is_short = command[0] == "dist-vlcl"
    return ["python", "-m", f"dist_vlcl.{COMMANDS[command[1]][0]}", *command[2:]] if is_short else command


def commands(*kinds: str) -> list:
    """Return the distinct commands of all pages whose kind (see `kind_of`) is one of these, as parameters of a test."""
    found = {shlex.join(command): command for page in WITH_COMMANDS for command in commands_of(page) if kind_of(command) in kinds}
    return [pytest.param(command, id=name) for name, command in found.items()]


def kind_of(command: list[str]) -> str:
    """Return the module that a command runs, or the name of its program."""
    modules = [word for word in command if word.startswith(("dist_vlcl.", "benchmarks."))]
    return modules[0] if modules and command[0] in ("python", "accelerate", "torchrun") else Path(command[0]).name


COMPOSED = ("dist_vlcl.train", "dist_vlcl.commands.build_data", "dist_vlcl.commands.verify")
PARSED = {  # module -> words added so that the command does no work, and what it then prints
    "dist_vlcl.commands.sweep": (["--list", "--item", "0"], r"-m dist_vlcl.train |^1$"),  # test_paper.py composes every id
    "dist_vlcl.commands.evaluate": ([], "config.yaml is missing"),
    "dist_vlcl.commands.replay": ([], "config.yaml is missing"),
    "dist_vlcl.commands.predict": ([], "no such file or folder"),
    "dist_vlcl.commands.export": ([], "no such file or folder"),
    "dist_vlcl.commands.report": ([], r"no such folder: runs/\*"),
}
SCRIPTS = ("local.sh", "multinode.sh", "elastic.sh", "sbatch", "make")


def test_every_kind_of_command_is_tested_below():
    kinds = {kind_of(command) for page in WITH_COMMANDS for command in commands_of(page)}
    assert kinds == {*COMPOSED, *PARSED, *SCRIPTS, "dist_vlcl.commands.tune"}


@pytest.mark.parametrize("command", commands(*COMPOSED))
def test_every_training_or_data_command_composes(command):
    words = command[command.index(kind_of(command)) + 1 :]
    with pytest.raises(ValueError, match="zo=mozoo") if "zo=mozoo" in words else nullcontext():  # the tutorial's wrong option
        check_options(words)


@pytest.mark.parametrize("command", commands(*PARSED))
def test_every_command_is_accepted_by_its_parser(command, tmp_path, monkeypatch, capsys):
    module = kind_of(command)
    added, expected = PARSED[module]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command[command.index(module) :], *added])
    try:
        importlib.import_module(module).main()
    except SystemExit as ended:
        print(ended.code if isinstance(ended.code, str) else "")
    captured = capsys.readouterr()
    assert re.search(expected, captured.out + captured.err, re.M), captured


@pytest.mark.parametrize("command", commands("dist_vlcl.commands.tune"))
def test_every_tuning_is_accepted(command, monkeypatch, capsys):
    few = [option for option in ("zo.probes=1", "zo.lr_scale=1") if not any(option.split("=")[0] in word for word in command)]
    monkeypatch.setattr(sys, "argv", [*command[command.index("dist_vlcl.commands.tune") :], *few, "--list", "seed=0"])
    tune.main()
    assert capsys.readouterr().out.count("dist_vlcl.train") > 2


@pytest.mark.parametrize("command", commands("local.sh", "multinode.sh", "elastic.sh"))
def test_every_launch_script_accepts_its_options(command):
    words = [word.replace("node1", "localhost") for word in command[1:]]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / command[0], "--dry-run", *words], capture_output=True, text=True, env=environment)
    expected = "TCPStore" if "--serve" in words else "-m dist_vlcl.train"
    assert done.returncode == 0 and expected in done.stdout, done.stderr


@pytest.mark.parametrize("command", commands("sbatch"))
def test_every_job_script_exists_and_its_options_compose(command):
    (script,) = (word for word in command if word.endswith(".sbatch"))
    assert (ROOT / script).exists()
    if script != "slurm/sweep.sbatch":
        check_options(command[command.index(script) + 1 :])


@pytest.mark.parametrize("command", commands("make"))
def test_every_make_target_exists(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.M)


def check_options(words: list[str]) -> None:
    compose_config(word for word in words if not word.startswith("--"))


def test_make_train_starts_two_processes_on_a_free_port():
    printed = subprocess.run(["make", "--dry-run", "train", "PROCESSES=2"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--multi_gpu --main_process_port 0 --num_processes 2" in printed  # accelerate's own port serves one run of a machine


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings_of(file), target


def headings_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    for name in re.findall(r"`((?:tests|tools|launch|slurm|configs|dist_vlcl|benchmarks)/[\w./-]+)`", page.read_text()):
        if page.name != "extending.md" or not name.startswith("configs/"):  # there the reader makes them
            assert (ROOT / name).exists(), name


def test_every_picture_is_shown_on_a_page():
    shown = {name for page in PAGES for name in re.findall(r"images/([\w-]+\.png)", page.read_text())}
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}


def test_the_readme_is_at_most_120_lines_of_120_characters():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_each_page_is_at_most_250_lines_and_its_text_at_most_160_characters_wide(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= 250
    assert max(len(line) for line in lines if not line.startswith(("|", "!["))) <= 160


def test_versions_are_pinned_by_name_and_number_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", line) for line in lines)


def test_the_small_clip_fits_its_limit():
    weights = CONFIG_FOLDER.parent / "dist_vlcl/model/small/small_clip.safetensors"
    assert weights.stat().st_size <= 12_000_000


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert "Zeroth-Order Optimization for Continual Learning" in paper["title"]
    assert len(paper["authors"]) == 9 and all(author["family-names"] and author["given-names"] for author in paper["authors"])
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2506.12409"}]


def test_tune_also_works_as_a_module_of_the_package():
    short, command = (importlib.import_module(f"dist_vlcl.{module}") for module in ("tune", "commands.tune"))
    assert short.main is command.main
    assert 'if __name__ == "__main__":\n    main()' in Path(short.__file__).read_text()

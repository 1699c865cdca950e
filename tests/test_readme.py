"""Claims of the README and the top-level files: what they name exists, and their commands are commands."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

import benchmarks.__main__ as bench
from dist_vlcl.commands import tune
from dist_vlcl.config import CONFIG_FOLDER, expand_paper, from_hydra
from dist_vlcl.run.submit import check_options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Those on lines of their own and those in the text."""
    lines = [line.strip().split("#")[0] for line in README.splitlines() if line.startswith("    ")] + re.findall(r"`(.+?)`", README)
    found = [
        shlex.split(line) for line in lines if re.match(r"(accelerate launch .* -m|python|make|torchrun|sbatch|launch/\w+\.sh) ", line)
    ]
    return [[word for word in words if word != "..."] for words in found]


def module_of(command: list[str]) -> str:
    return next((word for word in command if word.startswith("dist_vlcl.")), "")


COMPOSED = {"dist_vlcl.train", "dist_vlcl.commands.build_data", "dist_vlcl.commands.verify"}
TOLD = {  # module -> what is added so that it does no work, and what it then says: a word that it does not know is told before
    "dist_vlcl.commands.sweep": (["--count"], r"^\d+$"),
    "dist_vlcl.commands.evaluate": ([], "config.yaml is missing"),
    "dist_vlcl.commands.replay": ([], "config.yaml is missing"),
    "dist_vlcl.commands.report": ([], r"no such folder: runs/\*"),
    "dist_vlcl.run.submit": (["--dry-run", "--repository", str(ROOT)], "# DIST_VLCL_HOME="),
}


def test_there_are_commands():
    assert len(commands()) >= 25
    modules = {module_of(command) for command in commands()} - {""}
    assert modules == COMPOSED | set(TOLD) | {"dist_vlcl.commands.tune", "benchmarks"}  # whose tests follow
    assert {Path(command[0]).name for command in commands()} >= {"make", "sbatch", "local.sh", "multinode.sh", "accelerate", "torchrun"}


@pytest.mark.parametrize("command", [c for c in commands() if module_of(c) in TOLD], ids=" ".join)
def test_every_command_is_taken_by_its_parser(command, tmp_path, monkeypatch, capsys):
    module = module_of(command)
    more, said = TOLD[module]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command[command.index(module) :], *more])
    try:
        importlib.import_module(module).main()
    except SystemExit as ended:
        print(ended.code if isinstance(ended.code, str) else "")
    captured = capsys.readouterr()
    assert re.search(said, captured.out + captured.err, re.M), captured


@pytest.mark.parametrize("command", [c for c in commands() if module_of(c) in ("dist_vlcl.commands.tune", "benchmarks")], ids=" ".join)
def test_every_tuning_and_benchmark_is_taken(command):
    words = command[command.index(module_of(command)) + 1 :]
    if module_of(command) == "dist_vlcl.commands.tune":
        fixed, several, _ = tune.read_words(words)
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            assert tune.grid(from_hydra(compose("config", expand_paper(fixed))), several, fixed)
    elif "--help" not in words:
        bench.build_parser().parse_args(words)


@pytest.mark.parametrize("command", [c for c in commands() if c[0].endswith(".sh") or c[0] == "sbatch"], ids=" ".join)
def test_every_launch_and_job_is_taken(command):
    if command[0] == "sbatch":
        (script,) = (word for word in command if word.endswith(".sbatch"))
        assert (ROOT / script).exists()
        return check_options(Path(script).stem, command[command.index(script) + 1 :])
    words = [word.replace("node1", "localhost") for word in command[1:]]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / command[0], "--dry-run", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "-m dist_vlcl.train" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if module_of(c) in COMPOSED], ids=" ".join)
def test_every_command_line_composes(command):
    module = next(k for k, word in enumerate(command) if word.startswith("dist_vlcl."))
    overrides = [word for word in command[module + 1 :] if not word.startswith("--")]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        from_hydra(compose("config", expand_paper(overrides)))


def test_every_make_target_and_linked_file_exists():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M)
    told = subprocess.run(["make", "--dry-run", "train", "PROCESSES=2"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--multi_gpu --main_process_port 0 --num_processes 2" in told  # accelerate's own port serves one run of a machine
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_picture_is_explained_and_that_of_the_claims_leads_to_the_page_with_all():
    below = {name: text for name, text in re.findall(r"^!\[[^\]]*\]\(docs/images/(.+)\.png\)\n\n(.+)", README, re.M)}
    assert len(below) == README.count("![")
    assert "`make train`" in below["digits_accuracy_matrix"]
    assert "(docs/REPRODUCTION.md#" in below["small-clip-shipped-claims-cifar100"]


def test_the_tree_in_the_readme_is_the_tree():
    for name in ("train.py", "evaluate.py", "config.py", "step.py", "orders.py", "schedule.py", "sweep.py", "tune.py", "paper.py"):
        assert name in README and (ROOT / "dist_vlcl" / name).exists()
    folders = {p.name for p in (ROOT / "dist_vlcl").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert all(f"{folder}/" in README for folder in folders)


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

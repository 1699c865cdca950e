"""docs/extending.md, followed literally in an empty folder: every file is saved and every command is run, in the order of the page."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.ranks import run_module, warm_python

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"```(python|yaml|sh)\n(.*?)```", re.DOTALL)
NAMED = re.compile(r"\bas\s+`([\w/.]+\.(?:py|yaml))`:\s*\Z")

# One process for all commands, so that torch is imported once; each runs as `python` would run it.
FOLLOW = """
import runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    program, *words = shlex.split(line)
    assert program in ("python", "dist-vlcl"), line
    sys.path.insert(0, "")
    if program == "dist-vlcl":
        words = ["-m", "dist_vlcl", *words]
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__")
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    print("did:", line, flush=True)
"""


def files_and_commands() -> tuple[dict[str, str], list[str]]:
    """Return what the page says to save, by name, and to type, in order."""
    files, commands = {}, []
    for match in BLOCK.finditer(PAGE):
        kind, content = match.groups()
        if kind == "sh":
            commands += content.replace("\\\n", " ").splitlines()
            continue
        named = NAMED.search(PAGE[: match.start()])
        assert named, f"the page does not say where to save {content[:60]!r}"
        files[named[1]] = content
    return files, commands


def on_one_core(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run Python there; two threads on busy cores would take many times as long."""
    core = min(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    limits = {"preexec_fn": lambda: os.sched_setaffinity(0, {core}), "timeout": 900, "env": environment, "cwd": folder}
    return subprocess.run([warm_python(), *arguments], capture_output=True, text=True, **limits, **options)


OWN = "adapter.kind=parallel_adapter:ParallelConfig"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    files, commands = files_and_commands()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    done = on_one_core(folder, "-c", FOLLOW, input="\n".join(commands))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert done.stdout.count("did: ") == len(commands) and "the slope is right" in done.stdout
    return folder


def test_the_page_has_its_files_and_commands():
    files, commands = files_and_commands()
    assert {"draw_shapes.py", "four_point.py", "parallel_adapter.py"} < set(files)
    assert {"configs/zo/four_point.yaml", "configs/adapter/parallel.yaml"} < set(files)
    assert len(commands) == 7 and all(command.startswith(("python ", "dist-vlcl ")) for command in commands)


@pytest.mark.parametrize("name", ["my-data", "my-estimator", "my-adapter", "my-own"])
def test_each_run_of_the_page_comes_to_its_end(folder, name):
    accuracy = json.loads((folder / "runs" / name / "accuracy.json").read_text())
    assert accuracy["complete"] and accuracy["steps"] == 2 * len(accuracy["zero_shot"]) > 0


def test_the_runs_used_what_the_page_made(folder):
    def config(name: str) -> str:
        return (folder / "runs" / name / "config.yaml").read_text()

    assert "name: shapes" in config("my-data")
    assert "estimator: four_point:FourPoint" in config("my-estimator") and "far: 3" in config("my-estimator")
    assert "kind: parallel_adapter:ParallelConfig" in config("my-adapter") and "bottleneck: 8" in config("my-own")


def test_a_run_with_an_own_adapter_is_evaluated_again_from_its_folder_by_any_number_of_ranks(folder):
    refused = run_module("dist_vlcl", "evaluate", "runs/my-adapter", cwd=folder)
    assert refused.returncode == 2 and f"To trust them, add: {OWN}" in refused.stderr
    config = folder / "runs/my-adapter/config.yaml"
    config.write_text(config.read_text().replace("direction_groups: 1", "direction_groups: 2"))
    assert "direction_groups: 2" in config.read_text()
    done = run_module("dist_vlcl", "evaluate", "runs/my-adapter", OWN, cwd=folder)
    last = json.loads((folder / "runs/my-adapter/accuracy.json").read_text())["last"]
    assert f"Last {100 * last:.2f}" in done.stdout, done.stderr[-2000:]

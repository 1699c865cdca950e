"""Claims about tools/gpu_checks.py: it ends in time, keeps what it has, and says what failed. On a CPU, at tiny sizes."""

import json
import os
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.ranks import run_module
from tools import gpu_checks
from tools.gpu_checks import Outcome, Part, Results, Sizes, compare_ranks, count_tests, run_parts, start_part

PARTS = [Part("a", 0.5), Part("b", 0.4), Part("c", 0.4), Part("d", 0.1)]


def run_with(seconds: dict[str, float]) -> tuple[list, list]:
    """Run the parts within 100 s on a clock of our own; each takes these seconds, or its limit. Return (name, limit) and what was saved."""
    now, started, saved = [0.0], [], []

    def start(part: Part, limit_s: float) -> Outcome:
        started.append((part.name, limit_s))
        now[0] += min(seconds[part.name], limit_s)
        return Outcome("complete")

    run_parts(PARTS, 100, start, lambda found: saved.append([outcome.status for outcome in found.values()]), lambda: now[0])
    assert now[0] <= 100
    return started, saved


def test_a_part_has_its_share_of_the_time_and_a_late_one_only_what_is_left():
    assert run_with({"a": 10, "b": 5, "c": 5, "d": 5})[0] == [("a", 50), ("b", 40), ("c", 40), ("d", 10)]
    started, saved = run_with({"a": 99, "b": 30, "c": 99, "d": 5})
    assert started == [("a", 50), ("b", 40), ("c", 20)]  # nothing is left for d
    assert [statuses.count("complete") for statuses in saved] == [1, 2, 3, 3] and saved[-1][3] == "not started: no time was left"


def test_a_part_is_not_started_if_too_little_time_is_left_to_import_torch():
    assert [name for name, _ in run_with({"a": 50, "b": 35, "c": 1, "d": 10})[0]] == ["a", "b", "d"]  # 15 s for c, all of its 10 s for d


ENDLESS = """
import json, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen(["sleep", "600"])
(folder / "child").write_text(str(child.pid))
(folder / "part.json").write_text(json.dumps({"tables": [{"rows": [{"a": 1}]}]}))
time.sleep(600)
"""


def test_a_part_that_runs_out_of_time_is_ended_with_its_children_and_its_rows_are_kept(tmp_path):
    outcome = start_part([sys.executable, "-c", ENDLESS, str(tmp_path)], dict(os.environ), tmp_path / "part.json", 3)
    assert outcome.status.startswith("out of time") and outcome.tables == [{"rows": [{"a": 1}]}] and not outcome.failures
    process = Path("/proc", (tmp_path / "child").read_text())
    for _ in range(100):
        if not process.exists() or "Z" in (process / "stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the part still runs")


def test_a_part_that_fails_gives_its_last_line_and_no_older_rows(tmp_path):
    (tmp_path / "part.json").write_text(json.dumps({"tables": [{"rows": ["of an earlier run"]}]}))
    command = [sys.executable, "-c", "raise SystemExit('no module named x')"]
    outcome = start_part(command, dict(os.environ), tmp_path / "part.json", 60)
    assert (outcome.status, outcome.failures, outcome.tables) == ("failed", ["exit status 1: no module named x"], [])


def test_the_outcomes_of_tests_are_counted_as_they_end(tmp_path, capsys):
    results = Results(tmp_path / "tests.json", {})
    lines = [
        "tests/test_gpu.py::test_a[OrderPlan(branch='dual', layers='all')-fp32-{}] PASSED [ 50%]",
        "tests/test_gpu.py::test_b FAILED [ 75%]",
        "tests/test_gpu.py::test_c SKIPPED (torch sees no GPU) [100%]",
        "FAILED tests/test_gpu.py::test_b - assert False",
    ]
    count_tests((line + "\n" for line in lines), results)
    written = json.loads((tmp_path / "tests.json").read_text())
    assert written["tables"][0]["rows"] == [{"passed": 1, "failed": 1, "error": 0, "skipped": 1}]
    assert written["failures"] == ["tests/test_gpu.py::test_b"] and "assert False" in capsys.readouterr().out


def test_rows_with_other_columns_share_a_table(tmp_path):
    results = Results(tmp_path / "part.json", {})
    results.add("T", [{"a": 1, "b": 2}])
    results.add("T", [{"a": 3, "error": "no memory"}])
    assert "| 1 | 2 |  |\n| 3 |  | no memory |" in json.loads((tmp_path / "part.json").read_text())["tables"][0]["markdown"]


def test_every_part_runs_on_a_cpu_and_all_is_in_one_page(tmp_path, monkeypatch, capsys):
    """The parts are forks of a process that has imported torch. Rank 1 is a process of its own, as on a GPU."""

    def fork(command: list[str], environment: dict[str, str], file: Path, limit_s: float) -> Outcome:
        done = run_module("tools.gpu_checks", *command[2:], cwd=gpu_checks.ROOT, environment={"OMP_NUM_THREADS": "1"})
        file.with_suffix(".log").write_text(done.stdout + done.stderr)
        return gpu_checks.outcome_of(file, done.returncode)

    monkeypatch.setattr(gpu_checks, "start_part", fork)
    assert gpu_checks.main([str(tmp_path), "--device", "cpu", "--parts", "ranks,steps,memory,noise"]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "gpu_checks.json").read_text())
    rows = {name: part["tables"][0]["rows"] for name, part in found["parts"].items()}
    assert {row["ranks have the same bits"] for row in rows["ranks"]} == {"yes"} and len(rows["ranks"]) == 8
    assert all(row["naive"] > 0 and row["bf16, graphs"] > 0 for row in rows["steps"])
    assert rows["memory"][0]["counted GB"] > 0 and rows["memory"][0]["paper GB"] == 19.96
    assert len(found["parts"]["noise"]["tables"]) == 2 and found["machine"]["torch"]
    page = (tmp_path / "gpu_checks.md").read_text()
    assert all(part["tables"][0]["markdown"] in page for part in found["parts"].values())


def test_a_difference_between_ranks_graphs_or_one_rank_is_a_failure(tmp_path, monkeypatch):
    """Two ranks of a model that learns something else with graphs than without."""
    learned = {"off": ({"w": torch.zeros(1)}, [1.0], 0), "on": ({"w": torch.ones(1)}, [1.0], 0)}
    monkeypatch.setattr(
        gpu_checks, "train", lambda workload, world, parts: learned["on" if "model.graphs=true" in workload.options else "off"]
    )
    world = SimpleNamespace(gather_objects=lambda value: [value, ("another digest", value[1])], is_main=True, device="cpu")
    sizes, results = Sizes.of("cpu"), Results(tmp_path / "ranks.json", {})
    compare_ranks(sizes, results, world, "dual_all", "fp32", 1)
    failures = "\n".join(results.failures)
    assert failures.count("the two ranks differ") == 2 and failures.count("differ from those without graphs") == 1
    assert failures.count("zeroth order alone differs from one rank") == 1  # the run without graphs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "ranks,speed"], "--parts speed: choose from ranks, tests"),
        ([], "no NVIDIA driver; use --device cpu"),
    ],
)
def test_wrong_input_is_refused_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_checks, "driver", lambda: "")
    with pytest.raises(SystemExit) as stopped:
        gpu_checks.main([str(tmp_path), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_wheels_of_packages_that_are_missing_are_installed_and_others_are_not(tmp_path):
    wheels, target = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    (wheels / "torch-99.0-py3-none-any.whl").write_text("torch is installed, so pip never sees this file")
    with zipfile.ZipFile(wheels / "dist_vlcl_absent-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("dist_vlcl_absent.py", "answer = 42\n")
        info = "dist_vlcl_absent-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: dist_vlcl_absent\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    gpu_checks.install_wheels(wheels, target)
    assert (target / "dist_vlcl_absent.py").read_text() == "answer = 42\n" and not (target / "torch").exists()

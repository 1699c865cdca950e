"""Claims about slurm/ on a real Slurm: jobs train on two nodes, make room when asked, come back, and end as if nothing had happened."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from dist_vlcl.dist.world import World
from dist_vlcl.run import checkpoint
from dist_vlcl.run.submit import check_options
from dist_vlcl.train import train
from tests.helpers.runs import QUICK_RUN
from tests.helpers.slurm import ROOT, Cluster, cluster
from tests.test_train import configured

EIGHT_CORES = ["--sbatch=--cpus-per-task=1", "--sbatch=--output=%x-%j.out"]
SUBMIT = [sys.executable, "-m", "dist_vlcl.run.submit"]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


def submit(slurm: Cluster, folder: Path, *arguments: str) -> str:
    """Return the id of a job submitted from `folder`."""
    command = [*SUBMIT, arguments[0], "--repository", str(ROOT), *EIGHT_CORES, "--sbatch=--parsable", *arguments[1:]]
    return slurm.run(*command, cwd=folder, env=ENVIRONMENT).split()[-1].split(";")[0]


def steps(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def rank_1(folder: Path) -> psutil.Process:
    """Return rank 1 of the run that was submitted from `folder`."""
    trainers = [p for p in psutil.process_iter(["cmdline"]) if "dist_vlcl.train" in (p.info["cmdline"] or ())]
    return next(p for p in trainers if p.cwd() == str(folder) and p.environ().get("RANK") == "1")


def assert_ended_as_never_stopped(tmp_path: Path, name: str, starts: int) -> None:
    whole = configured(tmp_path, *QUICK_RUN, "run.name=whole")
    train(whole, World.alone())
    expected, got = (checkpoint.load_newest(tmp_path / "runs" / run).tensors for run in ("whole", name))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert len(json.loads((tmp_path / "runs" / name / "env.json").read_text())) == starts
    assert steps(tmp_path / "runs" / name) == steps(tmp_path / "runs/whole")


def test_a_preempted_run_on_two_nodes_is_queued_again_and_ends_as_if_never_stopped(slurm, tmp_path):
    job = submit(slurm, tmp_path, "train", "--nodes", "2", *QUICK_RUN, "run.name=moved", "cluster.num_processes=2", "run.wandb=offline")
    folder = tmp_path / "runs/moved"
    slurm.until(lambda: steps(folder) >= 2, "two steps")
    slurm.run("scancel", "--signal=USR1", job)  # what --signal=USR1@180 sends before the time limit: to the steps, not the batch shell
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue")
    fields = slurm.wait(job)
    said = (tmp_path / f"dist_vlcl-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"], fields["NumNodes"]) == ("COMPLETED", "1", "2"), said
    assert "saved and stopped on a signal" in said and "(requeue)" in said and "continuing runs/moved" in said and "2 x cpu" in said
    assert len({path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}) == 1  # one wandb run
    assert_ended_as_never_stopped(tmp_path, "moved", starts=2)


def test_a_job_whose_rank_dies_is_queued_again_and_a_refused_one_is_not(slurm, tmp_path):
    job = submit(slurm, tmp_path, "train", "--nodes", "2", *QUICK_RUN, "run.name=killed", "run.wandb=off")
    slurm.until(lambda: steps(tmp_path / "runs/killed") >= 2, "two steps")
    rank_1(tmp_path).send_signal(signal.SIGKILL)
    fields = slurm.wait(job)
    said = (tmp_path / f"dist_vlcl-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), said
    assert "(training)" in said and "the journal gave back" in said
    refused = submit(slurm, tmp_path, "train", "--nodes", "2", *QUICK_RUN, "run.name=killed", "run.wandb=off", "zo.probes=2")
    fields = slurm.wait(refused)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0")
    assert "zo.probes: 1 -> 2" in (tmp_path / f"dist_vlcl-{refused}.out").read_text()


def test_a_node_that_dies_costs_no_finished_step(tmp_path):
    with cluster(isolation="net") as slurm:
        job = submit(slurm, tmp_path, "train", "--nodes", "2", *QUICK_RUN, "run.name=lost", "run.wandb=off", "cluster.timeout_s=20")
        slurm.until(lambda: steps(tmp_path / "runs/lost") >= 2, "two steps")
        before = steps(tmp_path / "runs/lost")
        assert slurm.tool("crash", "node2").returncode == 0
        slurm.wait(job, {"PENDING"})  # Slurm sees it after some 15 s, or the batch script before
        assert steps(tmp_path / "runs/lost") >= before
        assert slurm.tool("revive", "node2").returncode == 0
        fields = slurm.wait(job)
        assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, (tmp_path / f"dist_vlcl-{job}.out").read_text()
    assert_ended_as_never_stopped(tmp_path, "lost", starts=1 + int(fields["Restarts"]))


def test_shards_are_built_by_a_job(slurm, tmp_path):
    job = submit(slurm, tmp_path, "shards", "data=digits")
    assert slurm.wait(job)["JobState"] == "COMPLETED", next(tmp_path.glob("*.out")).read_text()
    assert list((tmp_path / "data").rglob("index.json"))


@pytest.mark.skipif(importlib.util.find_spec("dist_vlcl.sweep") is None, reason="there is no dist_vlcl.sweep yet")
def test_an_array_trains_every_run_of_a_sweep(slurm, tmp_path):
    small = ["data=digits", "tasks.increment=2", "tasks.order=natural", "model=small", "run.wandb=off", *QUICK_RUN[:-2]]
    job = submit(slurm, tmp_path, "sweep", "--parallel", "1", "paper=t1-moe-cifar10-fo,t2-moe-cifar10-dual-hop_odd", *small)
    slurm.until(lambda: len(list((tmp_path / "runs").glob("*/accuracy.json"))) == 2, "two runs")
    slurm.until(lambda: not slurm.run("squeue", "-h", "-j", job).strip(), "the array to end")
    complete = [json.loads(path.read_text())["complete"] for path in (tmp_path / "runs").glob("*/accuracy.json")]
    assert complete == [True, True], [path.read_text() for path in tmp_path.glob("*.out")]


def submitted(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*SUBMIT, *arguments], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


def test_a_dry_run_prints_the_script_and_the_command_quoted(tmp_path):
    done = submitted(
        "train",
        "--dry-run",
        "--repository",
        str(ROOT),
        "--nodes",
        "4",
        "--time",
        "1:00:00",
        "data.root='a b;$(touch hacked)'",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "slurm/train.sbatch").read_text() in done.stdout
    assert shlex.join(["data.root='a b;$(touch hacked)'"]) in done.stdout
    assert f"sbatch --nodes=4 --time=1:00:00 {ROOT}/slurm/train.sbatch " in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["orders.layers=odd"], "choose from all, hop_odd"),
        (["orders.nothing=1"], "orders.nothing"),
        (["train"], "an option is OPTION=VALUE"),
        (["seed=1", "seed=2"], "seed is given twice"),
    ],
)
def test_options_that_the_job_would_refuse_are_refused_before_it_waits(options, message):
    with pytest.raises(ValueError, match=message):
        check_options("train", options)


def test_submit_says_what_is_missing(tmp_path):
    done = submitted("train", "seed=1", cwd=tmp_path)
    assert done.returncode == 2 and "train.sbatch is missing: call this from the repository's folder" in done.stderr


@pytest.mark.parametrize("script", ["train", "sweep", "shards"])
def test_a_script_run_elsewhere_says_where_it_belongs(script, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / f"slurm/{script}.sbatch"],
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "submit from the repository's folder, or set DIST_VLCL_HOME" in done.stderr

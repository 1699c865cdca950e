"""Claims about slurm/ on a real Slurm: jobs train on two nodes, make room when asked, come back, and end as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from dist_vlcl.dist.world import World
from dist_vlcl.run import checkpoint
from dist_vlcl.train import train
from tests.helpers.paced import Pace
from tests.helpers.ranks import warm_python
from tests.helpers.runs import QUICK_RUN
from tests.helpers.slurm import ASK_S, ENDED, ROOT, Cluster, cluster
from tests.test_train import configured

ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIST_VLCL_HOME": str(ROOT)}
ENVIRONMENT["WANDB_MODE"] = "offline"


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def beside(slurm, tmp_path_factory):
    """Jobs that run beside the long test, in its pauses: name -> (folder, id)."""
    python = tmp_path_factory.mktemp("python") / "python"
    python.write_text(f'#!/bin/bash\nexec nice -n 10 {warm_python()} "$@"\n')
    python.chmod(0o755)
    tasks = ["data=digits", "tasks.increment=2", "tasks.order=natural"]
    small = [*tasks, "model=small", "run.trackers=[]", "train.max_steps=2", *QUICK_RUN[:-2]]
    one_minute = ["--nodes=1", "--time=1", "--gpus-per-node=2", "--cpus-per-task=3"]
    commands = {  # sbatch's options, the script, its options
        "out of time": (one_minute, "train", ["run.root=a b"]),  # ranks that do not stop when signalled, as in a long evaluation
        "refused": (["--nodes=1"], "train", [*QUICK_RUN, "run.trackers=[]", "cluster.num_processes=3"]),
        "invalid": (["--nodes=1"], "train", ["--engine", "zero2", "orders.layers=[13]"]),
        "shards": ([], "shards", ["data=digits"]),
        "array": (["--array=0-1%8"], "sweep", ["paper=t1-moe-cifar10-fo,t2-moe-cifar10-dual-hop_odd", *small]),
    }
    jobs = {}
    for name, (own, script, options) in commands.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        interpreter = ROOT / "tests/slurm/standin.py" if name == "out of time" else python
        jobs[name] = (
            folder,
            submit(slurm, folder, script, *options, sbatch=[*own, "--nodelist=node1"], python=interpreter),
        )  # node2 will be crashed
    return jobs


def submit(
    slurm: Cluster, folder: Path, script: str, *options: str, sbatch: list[str], python: Path | str = sys.executable, **environment: str
) -> str:
    """Return the id of a job submitted from `folder`."""
    command = ["sbatch", "--parsable", "--cpus-per-task=1", "--output=%x-%j.out", *sbatch, str(ROOT / f"slurm/{script}.sbatch"), *options]
    return slurm.run(*command, cwd=folder, env={**ENVIRONMENT, "PYTHON": str(python), **environment}).split()[-1].split(";")[0]


def steps(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def took(what: str, seconds: float) -> None:
    """Say a figure of docs/clusters.md: `pytest tests/slurm -s -k everything`."""
    print(f"{seconds:6.1f} s  {what}", flush=True)


class Lives:
    """One run of two ranks on two nodes, whose jobs are struck between two steps."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder, self.pace = slurm, folder, Pace(folder / "pace")
        self.run, self.job, self.step, self.is_started = folder / "runs/lives", "", 0, 0
        self.pace.folder.mkdir()
        # the interpreter of the jobs: a gate before every step of dist_vlcl.train
        self.python = folder / "paced-python"
        self.python.write_text(f'#!/bin/bash\nexec {warm_python()} "${{@/#dist_vlcl.train/tests.helpers.paced}}"\n')
        self.python.chmod(0o755)

    def submit(self, *options: str, **environment: str) -> None:
        environment = {"PACE": str(self.pace.folder), **environment}
        command = ["train", *QUICK_RUN, "run.name=lives", *options]
        self.job = submit(self.slurm, self.folder, *command, sbatch=["--nodes=2"], python=self.python, **environment)

    def train_until(self, step: int, restarts: int) -> None:
        """Wait until the job, started again so many times, has taken this step and both ranks stand before the next."""
        self.pace.write("gate", step)
        before = f"{self.job}.{restarts} {step + 1}"

        def both_stand_there() -> bool:
            if [self.pace.read(f"at-{rank}") for rank in "01"] == [before, before]:
                return True
            assert self.slurm.job(self.job)["JobState"] not in ENDED, self.said()
            return False

        self.slurm.until(both_stand_there, f"both ranks to stand before {before}", pause_s=ASK_S)
        assert steps(self.run) == step, "a finished step was lost, or one was taken too many"

    def let_them_stop(self, step: int, restarts: int, ranks: str = "01", name: str = "") -> float:
        """Wait until these ranks have got a signal, and see that all take a step and save; return seconds to the save."""
        got = f"{self.job}.{restarts} {name}"
        self.slurm.until(lambda: all(self.pace.read(f"signal-{rank}").startswith(got) for rank in ranks), f"the signal at {ranks}")
        since = time.time()
        self.pace.write("gate", step)
        saved = self.run / f"checkpoints/step-{step:08d}.safetensors"
        self.slurm.until(saved.exists, f"{saved}\n{self.said()}")
        return saved.stat().st_mtime - since

    def process(self, what: str, node: str) -> psutil.Process:
        """Return the process of a node of this job whose command line has this word."""
        found = [p for p in psutil.process_iter(["cmdline"]) if what in (p.info["cmdline"] or ()) and p.cwd() == str(self.folder)]
        return next(p for p in found if p.environ().get("SLURM_NODEID") == node)

    def rank(self, node: str) -> psutil.Process:
        return next(p for p in self.process("accelerate.commands.launch", node).children(recursive=True) if "-m" in p.cmdline())

    def said(self) -> str:
        file = self.folder / f"dist_vlcl-{self.job}.out"
        return file.read_text() if file.exists() else ""


def test_a_run_goes_through_everything_that_a_cluster_does_to_it_and_ends_as_if_nothing_had(slurm, beside, tmp_path):
    """Six starts under three jobs. Each loses no finished step, and takes at most one more before it saves."""
    lives = Lives(slurm, tmp_path)
    lives.submit("cluster.num_processes=2", MAX_RESTARTS="2")

    lives.train_until(2, restarts=0)
    slurm.run(
        "scancel", "--signal=USR1", lives.job
    )  # what --signal=USR1@180 sends before the time limit: to the steps, not the batch shell
    took("SIGUSR1 to all ranks", lives.let_them_stop(3, 0, "01", "SIGUSR1"))
    slurm.until_queued_again(lives.job, 1)

    since = time.time()
    lives.train_until(3, restarts=1)
    took("queued again to training again", time.time() - since)
    lives.rank("1").kill()
    lives.pace.write("gate", 4)  # rank 0 goes into the step, and finds nobody there
    slurm.until_queued_again(lives.job, 2)
    assert "(training)" in lives.said()

    lives.train_until(3, restarts=2)
    lives.pace.write("save_s", 3)  # the launcher of node 2 would be gone before rank 0 has saved, were it not for a barrier
    lives.process("accelerate.commands.launch", "1").send_signal(signal.SIGTERM)
    took("SIGTERM to the launcher of node 2 and so to its rank, save of 3 s", lives.let_them_stop(4, 2, "1", "SIGTERM"))
    assert not lives.pace.read("signal-0").startswith(f"{lives.job}.2 SIGTERM"), "rank 0 was to learn of it from rank 1"
    lives.pace.write("save_s", 0)
    ended = slurm.wait(lives.job)
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("FAILED", "2", "2")
    assert "not started again: MAX_RESTARTS=2" in lives.said() and "2 x cpu (ddp)" in lives.said()
    assert steps(lives.run) == 4 and lives.said().count("saved and stopped after a signal") == 2

    lives.submit("run.trackers=[]", "cluster.num_processes=2")
    lives.train_until(4, restarts=0)
    since = time.time()
    assert slurm.tool("crash", "node2").returncode == 0
    slurm.until(lambda: slurm.job(lives.job)["Restarts"] == "1", "Slurm to see that node2 is dead", pause_s=ASK_S)
    took("death of a node to queued again", time.time() - since)
    assert slurm.tool("revive", "node2").returncode == 0
    slurm.until_queued_again(lives.job, 1)

    lives.train_until(4, restarts=1)
    lives.pace.write("eager", "yes")  # Slurm leaves them KillWait
    slurm.run("scancel", lives.job)
    took("scancel", lives.let_them_stop(5, 1, "01", "SIGTERM"))
    ended = slurm.wait(lives.job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1")

    lives.submit("run.trackers=[]", "cluster.num_processes=2")
    lives.pace.write("gate", 1000)
    ended = slurm.wait(lives.job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), lives.said()

    whole = configured(tmp_path, *QUICK_RUN, "run.name=whole")
    train(whole, World.alone())
    expected, got = (checkpoint.load_newest(tmp_path / "runs" / run).tensors for run in ("whole", "lives"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    assert steps(lives.run) == steps(tmp_path / "runs/whole")
    assert len(json.loads((lives.run / "env.json").read_text())) == 6
    wandb = [path.name.rsplit("-", 1)[1] for path in (lives.run / "wandb").glob("offline-run-*")]
    assert len(wandb) == 3 and len(set(wandb)) == 1


def test_a_job_out_of_time_is_queued_again_though_its_ranks_do_not_stop(slurm, beside):
    """By the clock: signalled in advance, ended by Slurm at its limit, killed, and started again."""
    folder, job = beside["out of time"]
    ended = slurm.wait(job)
    said = (folder / f"dist_vlcl-{job}.out").read_text() + slurm.tool("logs", "--lines", 100).stdout
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    told, *signals = [json.loads(line) for line in (folder / "said-0.jsonl").read_text().splitlines()]
    assert [said["signal"] for said in signals[:2]] == ["USR1", "TERM"]
    assert told["arguments"][:3] == ["-m", "accelerate.commands.launch", "--multi_gpu"] and told["arguments"][-1] == "run.root=a b"
    assert told["arguments"][told["arguments"].index("--num_processes") + 1] == "2"  # a rank per GPU
    assert (told["CUDA_VISIBLE_DEVICES"], told["SLURM_CPUS_PER_TASK"], told["SLURM_STEP_NUM_TASKS"]) == ("0,1", "3", "1")
    assert (told["MASTER_ADDR"], told["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == ("node1", "90")


def test_a_refused_run_is_not_tried_again(slurm, beside):
    folder, job = beside["refused"]
    ended = slurm.wait(job)
    said = (folder / f"dist_vlcl-{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0") and "cluster.num_processes=3" in said, said


def test_a_job_with_invalid_options_ends_before_ranks_start_and_is_not_tried_again(slurm, beside):
    folder, job = beside["invalid"]
    ended = slurm.wait(job)
    said = (folder / f"dist_vlcl-{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0") and "no block 13" in said and "start 0 of job" not in said, said


def test_shards_are_built_by_a_job(slurm, beside):
    folder, job = beside["shards"]
    assert slurm.wait(job)["JobState"] == "COMPLETED", next(folder.glob("*.out")).read_text()
    assert list((folder / "data").rglob("index.json"))


def test_an_array_trains_every_run_of_a_sweep(slurm, beside):
    folder, job = beside["array"]
    slurm.until(lambda: not slurm.run("squeue", "-h", "-j", job).strip(), "the array to end", pause_s=ASK_S)
    complete = [json.loads(path.read_text())["complete"] for path in (folder / "runs").glob("*/accuracy.json")]
    assert complete == [True, True], [path.read_text() for path in folder.glob("*.out")]


def test_one_task_of_an_array_is_queued_again_by_itself_and_a_cancelled_one_is_not(slurm, tmp_path):
    runs, python = "paper=t1-moe-cifar10-fo,t2-moe-cifar10-dual-hop_odd", ROOT / "tests/slurm/standin.py"
    job = submit(slurm, tmp_path, "sweep", runs, sbatch=["--array=0-1%2"], python=python, STANDIN_STOPS="yes")
    slurm.until(lambda: len(list(tmp_path.glob("said?-0.jsonl"))) == 2, "two tasks")
    assert slurm.job(f"{job}_1")["JobId"] == job  # the last task has the id of the array: one must not ask for that
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    slurm.until_queued_again(f"{job}_1", 1)
    slurm.wait(f"{job}_1", {"COMPLETED"})
    assert (slurm.job(f"{job}_0")["JobState"], slurm.job(f"{job}_0")["Restarts"]) == ("RUNNING", "0")
    slurm.run("scancel", job)
    slurm.until(lambda: any("Slurm ends this job (" in path.read_text() for path in tmp_path.glob("*.out")), "the batch script's word")
    assert slurm.wait(f"{job}_0")["JobState"] == "CANCELLED"


def answering(folder: Path, answers: dict[str, str]) -> dict[str, str]:
    """Write commands of Slurm's that only answer, name -> script, and return the environment of a batch script that finds them."""
    for name, answer in answers.items():
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "DIST_VLCL_HOME": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}


SECRET = ["data.url='https://host/{}?token=hush'", "data.root=/hush"]  # the job knows no secret from a path, and tells neither


@pytest.mark.parametrize(
    ("word", "status", "restarts", "is_queued"),
    [
        *[("requeue", 2, 0, True), ("training", 2, 0, True), ("complete", 2, 1, False), ("failed", 1, 1, False)],
        *[
            ("", 1, 0, False),
            ("", 1, 1, True),
            ("", 2, 1, False),
            ("", 0, 1, False),
        ],  # dead before training, at first and later; refused; done
    ],
)
def test_a_job_is_queued_again_only_where_that_helps_and_tells_no_value_of_an_option(word, status, restarts, is_queued, tmp_path):
    """The batch script itself, where Slurm's commands only answer, and the step ends with a word and a status."""
    checked = 'case "$*" in *--check*) exit 0;; esac\n'
    answers = {
        "srun": f"{checked}echo {word} >$DIST_VLCL_STATUS; exit {status}",
        "scontrol": "echo $1 node1",
        "squeue": "echo RUNNING None",
    }
    environment = answering(tmp_path, answers)
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run([ROOT / "slurm/train.sbatch", *SECRET], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (
        f"start {restarts} of job 7" in done.stdout
        and "--engine ddp --processes 1 data.url data.root\n" in done.stdout
        and done.returncode == status
    )
    assert "hush" not in done.stdout + done.stderr
    assert ("requeue node1" in done.stdout) == is_queued


def test_a_job_out_of_time_is_queued_again_whatever_signals_come_meanwhile(tmp_path):
    """Slurm signals every process of a batch step, so also the commands by which its script asks."""
    checked = 'case "$*" in *--check*) exit 0;; esac\n'
    answers = {
        "srun": f"{checked}trap : TERM; echo training >$DIST_VLCL_STATUS; touch up; while [ ! -e requeued ]; do sleep 0.1; done; exit 1",
        "scontrol": "[ $1 = requeue ] || exec echo node1; touch requeuing; sleep 1; touch requeued",
        "squeue": "touch asking; sleep 1; echo COMPLETING TimeLimit",
    }
    environment = answering(tmp_path, answers)
    options = {"env": environment, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    script = subprocess.Popen([ROOT / "slurm/train.sbatch"], text=True, **options)
    try:
        for file in ("up", "asking", "requeuing"):
            while not (tmp_path / file).exists():
                assert script.poll() is None, script.stdout.read()
                time.sleep(0.02)
            time.sleep(0.3)  # the script waits, and its commands ignore signals, by then
            whole = psutil.Process(script.pid)
            for process in (whole, *whole.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
        said = script.communicate(timeout=30)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").exists() and "did not requeue" not in said and "(training)" in said, said


def test_a_job_checks_options_of_groups_that_are_the_users_own(tmp_path):
    """Without the folder of these groups the check would refuse a job that can run."""
    answers = {"srun": 'case "$*" in *--check*) echo "checked: $*";; esac; exit 2', "scontrol": "echo node1", "squeue": "echo RUNNING None"}
    environment = answering(tmp_path, answers)
    words = [ROOT / "slurm/train.sbatch", "--engine", "zero2", "--", "--config-dir=my configs", "zo=mine"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "--check --config-dir=my configs zo=mine\n" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["train", "sweep", "shards"])
def test_a_script_says_what_it_is_for_and_where_it_belongs(script, tmp_path):
    def called(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], **environment}
        return subprocess.run([ROOT / f"slurm/{script}.sbatch", *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path)

    helped = called("--help")
    assert helped.returncode == 0 and f"slurm/{script}.sbatch " in helped.stdout and "#" not in helped.stdout and not helped.stderr
    by_hand = called("seed=1")
    assert by_hand.returncode == 2 and "error: this is a batch script: sbatch" in by_hand.stderr
    elsewhere = called("seed=1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert elsewhere.returncode == 2 and "submit from the repository's folder, or set DIST_VLCL_HOME" in elsewhere.stderr

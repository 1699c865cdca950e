"""Claims about launch/: the scripts say what is wrong, quote what they pass on, and start ranks on several machines that train as one."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from dist_vlcl.run import checkpoint
from tests.helpers.ranks import free_port, warm_python
from tests.helpers.runs import QUICK_RUN, digits_root

LAUNCH = Path(__file__).parents[2] / "launch"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
NODE = ["--nodes", "2", "--rank", "0", "--address", "localhost"]
HOSTILE = ["data.name=a b", "run.name=$(touch hacked)", "tasks.order='x; touch hacked'", 'model.prompt="a {}`touch hacked`"', "a=*", "b=\n"]


def called(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([LAUNCH / script, *arguments], capture_output=True, text=True, timeout=60, env=ENVIRONMENT, cwd=cwd)


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh", "elastic.sh"])
def test_help_names_every_option_and_nothing_else_is_done(script):
    done = called(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    parsed = set(re.findall(r"^ +(--[a-z| -]+)\)", (LAUNCH / script).read_text(), re.M))
    options = {option for line in parsed for option in re.findall(r"--[a-z-]+", line)}
    assert len(options) >= 4 and all(option in done.stdout for option in options)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ["--processes", "0"], "--processes 0: give a whole number from 1"),
        ("local.sh", ["--processes", "2; touch x"], "give a whole number"),
        ("local.sh", ["--processes", "010"], "--processes 010: give a whole number"),
        ("local.sh", ["--processes"], "--processes needs a value"),
        ("local.sh", ["--engine", "zero9"], "choose from ddp, zero0, zero1, zero2, zero3, zero3_offload"),
        ("local.sh", ["--procs", "2"], "--procs: no such option"),
        ("local.sh", ["orders"], "orders: options of the trainer are OPTION=VALUE"),
        ("local.sh", ["=x"], "=x: options of the trainer are OPTION=VALUE"),
        ("local.sh", ["data.x=00", "data.x=01"], "data.x is given twice; quote values"),
        ("multinode.sh", [], "--nodes is missing"),
        ("multinode.sh", ["--nodes", "2"], "--rank is missing"),
        ("multinode.sh", ["--nodes", "2", "--rank", "0"], "--address is missing"),
        ("multinode.sh", ["--nodes", "2", "--rank", "2", "--address", "localhost"], "--rank 2: give a whole number from 0 to 1"),
        ("multinode.sh", [*NODE[:-1], "no-such-host.invalid"], "no-such-host.invalid: this machine cannot find it"),
        ("multinode.sh", [*NODE[:-1], "-x $(touch x)"], "this machine cannot find it"),
        ("multinode.sh", [*NODE, "--port", "70000"], "--port 70000: give a whole number from 1 to 65535"),
        ("multinode.sh", [*NODE, "--launcher", "mpirun"], "choose from accelerate, torchrun"),
        ("multinode.sh", [*NODE, "--restarts", "1"], "use --launcher torchrun"),
    ],
)
def test_a_wrong_argument_is_one_message_before_anything_starts(script, arguments, message, tmp_path):
    done = called(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("visible", "processes"), [(None, "8"), ("3", "1"), ("1,2", "2"), ("", "2")])
def test_there_is_a_process_for_each_gpu_that_may_be_seen(visible, processes, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor k in 0 1 2 3 4 5 6 7; do echo GPU $k: NVIDIA; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"} | (
        {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    )
    command = f". {LAUNCH}/common.sh; default_processes 2"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment).stdout == f"{processes}\n"


def test_a_job_takes_a_port_on_which_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        done = subprocess.run(["bash", "-c", f". {LAUNCH}/common.sh; free_port {taken}"], capture_output=True, text=True, timeout=20)
    assert int(done.stdout) > taken, done.stderr


def test_an_interpreter_without_the_trainer_is_refused(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        [LAUNCH / "local.sh", "a=b"], capture_output=True, text=True, env={**ENVIRONMENT, "PYTHON": str(tmp_path / "python")}
    )
    assert done.returncode == 2 and "has no accelerate: run 'make install' first" in done.stderr


@pytest.mark.parametrize(
    "command", [["local.sh"], ["multinode.sh", *NODE], ["multinode.sh", *NODE, "--launcher", "torchrun", "--restarts", "2"]]
)
def test_values_reach_the_trainer_as_they_are(command, tmp_path):
    done = called(*command, "--dry-run", "--engine", "zero2", "--processes", "2", *HOSTILE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True, text=True, cwd=tmp_path)
    words = echoed.stdout.split("\0")[:-1]
    assert words[-len(HOSTILE) :] == HOSTILE and words[-len(HOSTILE) - 2 :][:2] == ["-m", "dist_vlcl.train"]
    assert any(word.endswith("launch/deepspeed/zero2.json") for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("accelerate_zero*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_file_names_a_deepspeed_file_that_the_trainer_takes(path):
    config = yaml.safe_load(path.read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    file = LAUNCH.parent / config["deepspeed_config"]["deepspeed_config_file"]
    deepspeed = json.loads(file.read_text())
    assert path.stem == f"accelerate_{file.stem}" and deepspeed["zero_optimization"]["stage"] == int(file.stem[4])
    assert isinstance(deepspeed["train_micro_batch_size_per_gpu"], int) and not deepspeed["zero_force_ds_cpu_optimizer"]
    command = shlex.split(path.read_text().splitlines()[1].removeprefix("#"))
    assert command[:4] == ["accelerate", "launch", "--config_file", f"launch/{path.name}"]


@pytest.mark.parametrize("command", [["local.sh"], ["multinode.sh", "--nodes", "1", *NODE[2:]]])
def test_one_process_needs_no_launcher(command):
    """accelerate's launcher of a single process does not wait for its save after SIGTERM."""
    done = called(*command, "--dry-run", "--processes", "1", "a=b")
    assert shlex.split(done.stdout) == [sys.executable, "-m", "dist_vlcl.train", "a=b"], done.stderr


SLOW = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(float(sys.argv[1].partition("=")[2]))
    pathlib.Path("saved-" + os.environ["RANK"]).write_text(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready-" + os.environ["RANK"]).touch()
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("patience", "saving", "saved"), [("", "3", ["90", "90"]), ("1", "300", [])])
def test_a_launcher_that_gets_a_signal_waits_for_a_slow_save_up_to_its_limit(patience, saving, saved, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [LAUNCH / "local.sh", "--processes", "2", "--module", "slow", f"save_s={saving}"]
    environment = {**ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as launcher:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert launcher.poll() is None and time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(200)
    assert [path.read_text() for path in tmp_path.glob("saved-*")] == saved


class Nodes:
    """Two machines that happen to be this one: multinode.sh twice, each with a rank."""

    def __init__(self, folder: Path, *arguments: str):
        self.log, port = open(folder / "nodes.log", "a+"), str(free_port())  # noqa: SIM115, closed with the nodes
        self.processes = [
            subprocess.Popen(
                [
                    LAUNCH / "multinode.sh",
                    "--nodes",
                    "2",
                    "--rank",
                    rank,
                    "--address",
                    "localhost",
                    "--port",
                    port,
                    "--processes",
                    "1",
                    *arguments,
                ],
                cwd=folder,
                env={**ENVIRONMENT, "PYTHON": warm_python()},
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in ("0", "1")
        ]

    def trainer(self, node: int) -> psutil.Process:
        """Return the rank that a node's launcher has started."""
        children = psutil.Process(self.processes[node].pid).children(recursive=True)
        return next(child for child in children if "dist_vlcl.train" in child.cmdline())

    def wait(self, timeout_s: float = 400) -> list[int]:
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
                child.kill()
        self.log.close()

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()


def wait_for_steps(folder: Path, steps: int, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not (folder / "journal.jsonl").exists() or (folder / "journal.jsonl").read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def test_two_nodes_train_as_one_and_survive_the_death_of_a_rank(tmp_path):
    """By accelerate without a fault; by torchrun, which starts the ranks again after kill -9 of one. Both end with the same numbers."""
    options = [*QUICK_RUN, f"data.root={digits_root()}", "run.trackers=[]", "cluster.num_processes=2"]
    with Nodes(tmp_path, *options, "run.name=whole") as nodes:
        assert nodes.wait() == [0, 0], nodes.said()[-3000:]
        assert "2 x cpu (ddp)" in nodes.said()
    with Nodes(tmp_path, "--launcher", "torchrun", "--restarts", "3", *options, "run.name=killed") as nodes:
        wait_for_steps(tmp_path / "runs/killed", 3)
        nodes.trainer(1).send_signal(signal.SIGKILL)
        assert nodes.wait() == [0, 0], nodes.said()[-3000:]
        assert "were restored from the journal" in nodes.said()
    whole, killed = (checkpoint.load_newest(tmp_path / "runs" / name).tensors for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert len(json.loads((tmp_path / "runs/killed/env.json").read_text())) == 2

"""Claims about launch/elastic.sh: hosts join, leave and die, and the bits are those of a run that nothing disturbed."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vlcl.data.shards import ShardError
from dist_vlcl.run import signals
from dist_vlcl.run.environment import ELASTIC
from dist_vlcl.run.folder import RunBusy
from tests.helpers.ranks import Python, free_port, warm_python
from tests.helpers.runs import QUICK_RUN, digits_root
from tests.launch.test_launch import HOSTILE, called, wait_for_steps

ROOT = Path(__file__).parents[2]
MEETING = ["--nodes", "1:4", "--store", "localhost:29400"]


def test_hosts_join_die_and_leave_and_the_bits_are_those_of_one_undisturbed_rank():
    command = [sys.executable, "tools/elastic_check.py", "--hosts", "2", "--changes", "join,rank,leave", "--stop"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--steps", "20000", "--python", warm_python(), "orders.layers=[12]", "orders.rest=frozen"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode == 3:
        (pytest.fail if os.environ.get("REQUIRE_REAL_CLUSTER") == "1" else pytest.skip)(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 changes" in done.stdout and "the bits of the undisturbed run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--store is missing"),
        (["--store", "node1"], "--store node1: give HOST:PORT"),
        (["--store", "node1:70000"], "--store 70000: give a whole number from 1 to 65535"),
        (MEETING[2:], "--nodes (nothing): give MIN:MAX"),
        (["--nodes", "3:2", *MEETING[2:]], "--nodes 2: give a whole number from 3"),
        ([*MEETING, "--rendezvous", "zookeeper"], "choose from c10d, etcd"),
        ([*MEETING, "--host", "x; touch x"], "give a name or an address"),
        ([*MEETING, "--id", "a b"], "--id a b: use letters"),
        ([*MEETING, "--serve", "--rendezvous", "etcd"], "--serve: only with --rendezvous c10d"),
    ],
)
def test_a_wrong_argument_is_one_message(arguments, message, tmp_path):
    done = called("elastic.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_values_reach_the_trainer_as_they_are_and_no_store_is_shared_between_rounds(tmp_path):
    done = called("elastic.sh", *MEETING, "--host", "localhost", "--dry-run", *HOSTILE, cwd=tmp_path)
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True, text=True, cwd=tmp_path)
    words = echoed.stdout.split("\0")[:-1]
    assert words[-len(HOSTILE) :] == HOSTILE and not list(tmp_path.iterdir()), done.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words and f"{ELASTIC}=localhost:29400/dist_vlcl" in words
    assert words[words.index("--nnodes") :][:2] == ["--nnodes", "1:4"] and "is_host=1" in words[words.index("--rdzv_conf") + 1]


def test_the_store_on_a_login_node_does_not_train():
    words = shlex.split(called("elastic.sh", "--serve", "--store", "login:29400", "--dry-run").stdout)
    assert words[-1] == "29400" and "TCPStore" in words[-2] and "dist_vlcl.train" not in words


@pytest.mark.parametrize("is_elastic", [True, False])
def test_a_rank_whose_agent_has_died_stops(is_elastic, monkeypatch):
    monkeypatch.setenv(ELASTIC, "1") if is_elastic else monkeypatch.delenv(ELASTIC, raising=False)
    with signals.Preemption() as preemption:
        assert not preemption.requested
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert preemption.requested is is_elastic


@pytest.mark.parametrize(
    ("error", "leaves"),
    [(ShardError("damaged"), True), (ValueError("a wrong option"), True), (RunBusy("in use"), False), (OSError("disk"), False)],
)
def test_an_error_that_a_new_start_would_repeat_takes_the_machine_out(error, leaves, monkeypatch):
    ended = []
    monkeypatch.setenv(ELASTIC, "1")
    monkeypatch.setattr(os, "getppid", lambda: 4711)
    monkeypatch.setattr(os, "kill", lambda *what: ended.append(what))
    signals.report_failure(error, is_main=False)
    assert ended == ([(4711, signal.SIGTERM)] if leaves else [])


def test_a_wrong_option_ends_the_agent_at_once(tmp_path):
    meeting = ["--nodes", "1:1", "--store", f"localhost:{free_port()}", "--wait", "1", "--processes", "1"]
    done = called("elastic.sh", *meeting, "zo=mozoo", cwd=tmp_path)
    assert done.returncode != 0 and 1 <= done.stderr.count("error: zo=mozoo: choose from conservative") <= 2


@pytest.mark.parametrize("waiter", ["node1:29400/mine", "node2:29400/another"])
def test_a_run_gives_its_folder_to_ranks_of_its_own_start_that_wait_for_it(waiter, tmp_path):
    """Machines that lost contact without noticing form two groups. The group that trains stops, and both meet again."""
    options = [*QUICK_RUN, f"data.root={digits_root()}", "run.trackers=[]", "train.epochs=200", "run.name=awaited", "cluster.timeout_s=60"]
    first = Python(["-m", "dist_vlcl.train", *options], tmp_path, {ELASTIC: "node1:29400/mine"})
    second = None
    try:
        wait_for_steps(tmp_path / "runs/awaited", 2)
        second = Python(["-m", "dist_vlcl.train", *options], tmp_path, {ELASTIC: waiter})
        if waiter.endswith("another"):
            while not (tmp_path / "runs/awaited/.waiting").exists():
                assert second.wait(0.1) is None
            reached = (tmp_path / "runs/awaited/journal.jsonl").read_bytes().count(b"\n")
            wait_for_steps(tmp_path / "runs/awaited", reached + 3)
            assert first.wait(0) is second.wait(0) is None
            return
        assert first.wait(60) == os.EX_TEMPFAIL, first.printed()
        reached = (tmp_path / "runs/awaited/journal.jsonl").read_bytes().count(b"\n")
        wait_for_steps(tmp_path / "runs/awaited", reached + 2)
        assert second.wait(0) is None
    finally:
        for process in filter(None, (first, second)):
            process.end()

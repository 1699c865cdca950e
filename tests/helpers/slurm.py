"""A real Slurm for tests: `minislurm`, from $CLUSTER_TOOLS, ../shared/tools or PATH, runs Slurm's daemons for as long as a test needs.

Where there is none, tests skip with its reason; REQUIRE_REAL_CLUSTER=1 makes that a failure: no machine passes by testing nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A kill that is not answered within the message time-out (processes have KillWait for their end) is sent once more a minute later, and hits
# the same step of a job that has been started again by then. By default jobs wait 121 s for that.
# Ranks have to take a step and to save within KillWait (30 s by default), on a machine that may be busy.
TIMES = ("--kill-wait", 60, "--message-timeout", 65)
ASK_S = 2.0  # between two questions to Slurm, each of which costs a process or three
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def _minislurm() -> str | None:
    folders = [os.environ.get("CLUSTER_TOOLS"), str(ROOT.parent / "shared" / "tools"), *os.environ.get("PATH", "").split(os.pathsep)]
    return next((str(Path(folder) / "minislurm") for folder in folders if folder and (Path(folder) / "minislurm").is_file()), None)


def _absent(why: str) -> None:
    if os.environ.get("REQUIRE_REAL_CLUSTER") == "1":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


class Cluster:
    """A running throw-away cluster: node1, node2, ..."""

    def __init__(self, tool: str, folder: str):
        self._tool, self.folder = tool, folder

    def tool(self, verb: str, *arguments: object, timeout_s: float = 60, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, self._tool, verb, "--dir", self.folder, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)

    def run(self, *command: object, timeout_s: float = 120, **options) -> str:
        """Return what a command on the login host prints."""
        done = self.tool("exec", "--", *command, timeout_s=timeout_s, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return Slurm's fields of a job."""
        return dict(field.split("=", 1) for field in self.run("scontrol", "-o", "show", "job", job).split() if "=" in field)

    def wait(self, job: str, states: set[str] = ENDED, timeout_s: float = 600) -> dict[str, str]:
        """Return the fields of a job once it is in one of these states (`sbatch --wait` looks after 2, 10 and 42 seconds only)."""
        self.until(lambda: self.job(job)["JobState"] in states, f"job {job} to be {' or '.join(sorted(states))}", timeout_s, ASK_S)
        return self.job(job)

    def until_queued_again(self, job: str, restarts: int) -> None:
        """Wait until Slurm has taken a job back. It starts 6 s later (121 s by default)."""
        self.until(lambda: self.job(job)["Restarts"] == str(restarts), f"job {job} to be queued again", pause_s=ASK_S)

    def until(self, is_so: Callable[[], bool], what: str, timeout_s: float = 600, pause_s: float = 0.1) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s:g} s for {what}\n{self.tool('logs').stdout[-3000:]}")
            time.sleep(pause_s)


@contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    """Nodes of eight made-up CPUs and two GPUs, each with a host name, a process table and a network of its own."""
    tool = _minislurm()
    if tool is None:
        _absent("minislurm is not here: set CLUSTER_TOOLS to the folder that holds it")
    assert tool is not None
    check = subprocess.run([sys.executable, tool, "check", "--isolation", "net"], capture_output=True, text=True)
    if check.returncode:
        _absent(f"minislurm: {(check.stdout + check.stderr).strip()}")
    folder = tempfile.mkdtemp(prefix="ms-")  # short: the path of a Unix socket ends at 107 bytes
    running = Cluster(tool, folder)
    try:
        up = running.tool("up", "--nodes", nodes, "--isolation", "net", "--cpus", 8, "--gpus", 2, *TIMES)
        assert up.returncode == 0, up.stdout + up.stderr
        yield running
    finally:
        down = running.tool("down", "--grace", "1")
        shutil.rmtree(folder, ignore_errors=True)
        assert down.returncode == 0, down.stdout + down.stderr

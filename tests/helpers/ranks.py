"""Real ranks for tests: processes that join a gloo group through the trainer's own start-up."""

import atexit
import functools
import multiprocessing
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.helpers.warm_python import __file__ as client
from tests.helpers.warm_python import do, request, serve

# The server imports all of it once; each rank is then a cheap fork.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.warm"])


@functools.cache
def warm_python() -> str:
    """Return the path of a program that does what sys.executable does, without the seconds of its imports (warm_python.py)."""
    _have_server()
    folder = Path(tempfile.mkdtemp(prefix="wp-"))  # short: the path of a Unix socket ends at 107 bytes
    server = _context.Process(target=serve, args=(str(folder / "socket"),))
    server.start()
    atexit.register(lambda: (server.kill(), shutil.rmtree(folder)))  # before multiprocessing waits for it
    program = folder / "python"
    own = [sys.executable, "-S", client, str(folder / "socket"), str(program)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(own)} "$@"\n')
    program.chmod(0o755)
    while not (folder / "socket").exists():
        time.sleep(0.05)
    return str(program)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Python:
    """A process that does what `python ARGUMENTS` does, without the seconds of its imports; `environment` is added to this process's."""

    def __init__(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None):
        _have_server()
        self._folder = tempfile.TemporaryDirectory()
        self._written = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        asked = request([*arguments], {**os.environ, **(environment or {})}, cwd, sys.executable)
        self._process = _context.Process(target=_python, args=(asked, self._written))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status; None if the process still runs."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def printed(self) -> list[str]:
        """Return the content of standard output and of standard error."""
        return [path.read_text() if path.exists() else "" for path in self._written]

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def run_module(
    module: str, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 200
) -> subprocess.CompletedProcess:
    """Do what `python -m module arguments` would, without the seconds of its imports; `environment` is added to this process's."""
    process = Python(["-m", module, *arguments], cwd, environment)
    status, printed = process.wait(timeout_s), process.printed()
    process.end()
    assert status is not None, f"{module} is still running after {timeout_s} s\n{printed}"
    return subprocess.CompletedProcess([module, *arguments], status, *printed)


def _python(asked: dict[str, Any], written: list[Path]) -> None:
    do(asked, [os.open(os.devnull, os.O_RDONLY), *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in written)])


def _have_server() -> None:
    with chdir(Path(__file__).parents[2]):  # it finds `tests` from where it is started, not by sys.path
        forkserver.ensure_running()


def run_ranks(
    work: Callable,
    size: int,
    *arguments: Any,
    timeout_s: float = 90,
    environment: Mapping[str, str] | None = None,
    ends_apart: bool = False,
) -> list[Any]:
    """Return `work(world, *arguments)` of every rank; raise RuntimeError with the rank's traceback if one fails.

    environment: variables that a launcher would set. ends_apart: the ranks do not
    wait for each other at the end. `work` must be importable (a function at the top of a test module), its arguments
    and results picklable.
    """
    port, pipes = free_port(), [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_rank, args=(work, rank, size, port, pipes[rank][1], arguments, dict(environment or {}), ends_apart))
        for rank in range(size)
    ]
    _have_server()
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    deadline = time.monotonic() + timeout_s
    try:
        answers = [_answer(rank, receiver, deadline) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            process.kill()
    failures = [error for error, _ in answers if error]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [pickle.loads(result) for _, result in answers]


def _answer(rank: int, receiver: Any, deadline: float) -> tuple[str | None, bytes]:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError(f"rank {rank} is still running")
    try:
        return receiver.recv()
    except EOFError:
        return f"rank {rank} died without a word", b""


def _rank(
    work: Callable, rank: int, size: int, port: int, sender: Any, arguments: tuple, environment: dict[str, str], ends_apart: bool
) -> None:
    import torch

    from dist_vlcl.dist.world import ClusterConfig, World

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", **environment)
    torch.set_num_threads(1)
    try:
        world = World.from_environment(ClusterConfig(device="cpu", threads=1, timeout_s=60))
        result = work(world, *arguments)
        if not ends_apart:
            world.barrier()
        sender.send((None, pickle.dumps(result)))  # tensors as bytes: shared memory would end with this process
    except BaseException:
        sender.send((f"rank {rank} failed:\n{traceback.format_exc()}", b""))
    finally:
        if "world" in locals():
            world.close()

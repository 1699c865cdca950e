"""Real ranks for tests: processes that join a gloo group through the trainer's own start-up."""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# The server imports all of it once; each rank is then a cheap fork.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.warm"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_module(
    module: str, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 200
) -> subprocess.CompletedProcess:
    """Do what `python -m module arguments` would, without the seconds of its imports; `environment` is added to this process's."""
    _have_server()
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _context.Process(target=_module, args=(module, arguments, cwd, {**os.environ, **(environment or {})}, written))
        process.start()
        process.join(timeout_s)
        is_late = process.is_alive()
        process.kill()
        said = [path.read_text() if path.exists() else "" for path in written]
    assert not is_late, f"{module} is still running after {timeout_s} s\n{said}"
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, *said)


def _module(module: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], written: list[Path]) -> None:
    for descriptor, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.modules.pop(module, None)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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

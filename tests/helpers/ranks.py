"""Real ranks for tests: processes that join a gloo group through the trainer's own start-up."""

import multiprocessing
import os
import pickle
import socket
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
    with chdir(Path(__file__).parents[2]):  # a server that is still to be started finds `tests` from where it is, not by sys.path
        forkserver.ensure_running()
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

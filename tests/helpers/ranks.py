"""Real ranks for tests: processes that join a gloo group through the trainer's own start-up."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# The server imports torch once; each rank is then a cheap fork of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "accelerate", "open_clip", "dist_vlcl.train"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(work: Callable, size: int, *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Return `work(world, *arguments)` of every rank; raise RuntimeError with the rank's traceback if one fails.

    `work` must be importable (a function at the top of a test module), its arguments and results picklable.
    """
    port, queue = free_port(), _context.SimpleQueue()
    processes = [_context.Process(target=_rank, args=(work, rank, size, port, queue, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    if alive:
        raise TimeoutError(f"ranks {alive} were still running after {timeout_s} s")
    results: dict[int, Any] = {}
    while not queue.empty():
        rank, error, result = queue.get()
        if error:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        results[rank] = result
    if len(results) < size:
        raise RuntimeError(f"ranks {sorted(set(range(size)) - set(results))} died without a word")
    return [results[rank] for rank in range(size)]


def _rank(work: Callable, rank: int, size: int, port: int, queue: Any, arguments: tuple) -> None:
    import torch

    from dist_vlcl.dist.world import ClusterConfig, World

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        world = World.from_environment(ClusterConfig(device="cpu", threads=1, timeout_s=60))
        result = work(world, *arguments)
        world.barrier()
        queue.put((rank, None, result))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        if "world" in locals():
            world.close()

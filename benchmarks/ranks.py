"""Steps on several ranks, for `wire` and `scale`: `launch` starts them through torchrun, each rank runs this module."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.count import Collectives
from benchmarks.setup import Workload
from dist_vlcl.data.loader import Batch
from dist_vlcl.data.tasks import rank_slice
from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.zo.noise import Key


def launch(
    processes: int,
    workload: Workload,
    device: str,
    steps: int,
    trace: str | None = None,
    apart: bool = False,
    threads: int | None = None,
    alone: int | None = None,
    timeout_s: float = 4 * 3600,
) -> dict[str, Any]:
    """Return what rank 0 reports of `steps` steps on `processes` ranks; raise RuntimeError with the ranks' output where they fail.

    threads: CPU threads of a rank; by default the cores are shared among the ranks. apart: take as many steps, in turn, whose gradients
    have been exchanged before the probes begin. alone: and as many of rank 0 with this many images, while the others wait; and as many that
    exchange nothing, of all ranks at once ("strangers").
    """
    if device == "cuda" and torch.cuda.device_count() < processes:
        raise ValueError(f"--device cuda: {processes} ranks need a GPU each, and this machine has {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        content = {"workload": asdict(workload), "device": device, "steps": steps, "trace": trace, "apart": apart, "alone": alone}
        threads = threads or max(1, len(os.sched_getaffinity(0)) // processes)
        task.write_text(json.dumps({**content, "threads": threads, "answer": str(answer)}))
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*runner, "-m", "benchmarks.ranks", str(task)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{processes} ranks failed:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def share_of(batch: Batch, rank: int, size: int) -> Batch:
    """Return a rank's part of a global batch."""
    part = rank_slice(len(batch.labels), rank, size)
    cut = slice(part.start, part.stop)
    return replace(batch, images=batch.images[cut], labels=batch.labels[cut], positions=batch.positions[cut])


def work(world: World, workload: Workload, steps: int, trace: str | None, apart: bool, alone: int | None) -> dict[str, Any]:
    """Take steps of each variant in turn, then one more of which the exchanges are counted. All ranks call this."""
    device, by_itself = str(world.device), World.alone(str(world.device))
    step = workload.step(workload.towers(device), world)
    batch = share_of(workload.batch(step.towers.image_size), world.rank, world.size)
    variants = {"seconds": (step, batch)}
    if apart:
        variants["seconds_apart"] = workload.step(workload.towers(device), world, overlap=False), batch
    if alone:
        variants["seconds_strangers"] = workload.step(workload.towers(device), by_itself), batch
        whole = replace(workload, images=alone).batch(step.towers.image_size)
        variants["seconds_alone"] = workload.step(workload.towers(device), by_itself), whole
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    warm = 3 if world.device.type == "cuda" else 1  # the second records CUDA graphs
    for k in range(warm + steps):
        for name, (variant, images) in variants.items():
            world.barrier()
            start = time.perf_counter()
            if name != "seconds_alone" or world.is_main:
                variant([images], Key(0, k), 1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    slowest = {name: world.gather(torch.tensor(s[warm:], dtype=torch.float64)).max(0).values.tolist() for name, s in seconds.items()}
    with Collectives() as exchanges, traced(trace if world.is_main else None):
        step([batch], Key(0, warm + steps), 1e-3)
    return {
        **slowest,
        "exchanges": exchanges.found,
        "first_order_parameters": sum(p.numel() for p in step.first.parameters),
        "digest_is_equal": len(set(world.gather_objects(digest(step.towers.units.state_dict())))) == 1,
    }


@contextlib.contextmanager
def traced(path: str | None) -> Iterator[None]:
    """Write a trace for Perfetto or chrome://tracing, if a path is given."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(path)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    values = {**task["workload"], "options": tuple(tuple(pair) for pair in task["workload"]["options"])}
    world = World.from_environment(ClusterConfig(device=task["device"], threads=task["threads"], timeout_s=3600))
    answer = work(world, Workload(**values), task["steps"], task["trace"], task["apart"], task["alone"])
    if world.is_main:
        Path(task["answer"]).write_text(json.dumps(answer))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main()

"""Memory of a step: what back-propagation saves for an image and for a prompt, and the peak of a step, weights included.

    python -m benchmarks.memory                                               counted for ViT-B/16: no GPU, no time
    python -m benchmarks.memory model.precision=bf16 model.checkpoint=true    with other options of the model
    python -m benchmarks.memory cluster.device=cuda                           also the peak that the GPU reports
    python -m benchmarks.memory adapter=lora

Bytes are counted from the tensors that are alive, without what an operator uses inside itself and without the GPU's own context.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import PeakBytes, Row, Table, Workload, benchmark, saved_bytes, without_numbers, workloads_of
from benchmarks.naive import naive_step, refusal
from dist_vlcl.dist.world import World
from dist_vlcl.paper import PROBE_CLASSES
from dist_vlcl.zo.noise import Key, StepNoise


def measure(args: argparse.Namespace) -> list[Table]:
    """Return the bytes saved a sample, and the peak of each order plan."""
    peaks = []
    for orders, workload in workloads_of(args):
        on_gpu = measured(workload) if workload.device == "cuda" else {}
        peaks.append({"orders": orders, "classes": workload.classes, "counted GB": peak_bytes(workload) / 1e9, **on_gpu})
    model = workload.config.model
    title = f"{model.name}, {model.precision}{', checkpoints' if model.checkpoint else ''}"
    reason = refusal(workload.towers("meta"), workload.config.zo)
    steps = {"ours": False} if reason else {"ours": False, "naive, fp32": True}
    saved = []
    for name, naive in steps.items():
        image, prompt = (saved_per_sample(branch, workload, naive) / 1e6 for branch in ("vision", "language"))
        saved.append({"step": name, "MB per image": image, "MB per prompt": prompt})
    return [
        Table(f"Saved for the backward pass, first order everywhere: {title}", saved, reason),
        Table(f"Peak of a step, weights included: {title}, {args.images} images", peaks),
    ]


def saved_per_sample(branch: str, workload: Workload, naive: bool = False, samples: int = 2) -> float:
    """Return the bytes saved for the backward pass of an image (vision) or a prompt (language), with first order everywhere."""
    few = workload.changed("orders=first", images=samples, classes=samples)
    with without_numbers():
        step: Any = naive_step(few, "meta") if naive else few.step(few.towers("meta"), World.alone("meta"))
        towers = step.towers
        inputs = {"vision": few.batch(towers).images, "language": step.tokens}
        noise = StepNoise(Key(0, 0), {branch: torch.arange(samples, device="meta")})

        def forward() -> Any:
            return step.features(branch, inputs[branch], noise) if naive else towers({branch: inputs[branch]}, noise)[branch][0]

        return saved_bytes(forward, besides=[*towers.parameters(), *towers.buffers()]) / samples


def peak_bytes(workload: Workload) -> int:
    """Return the most bytes that are alive in the second step, weights and optimiser included; counted on the meta device."""
    workload.towers("meta")  # builds the model that the next call copies: only the copy is counted
    with without_numbers(), PeakBytes() as memory:
        step = workload.step(workload.towers("meta"), World.alone("meta"))
        batch = workload.batch(step.towers)
        step([batch], Key(0, 0), 1e-3)
        memory.peak = memory.alive
        step([batch], Key(0, 1), 1e-3)
    return memory.peak


def measured(workload: Workload) -> Row:
    """Return what torch had allocated and reserved at most on the GPU in the fourth step. CUDA graphs are recorded in the second.

    Reserved memory includes what the recorded graphs keep for their next replay.
    """
    torch.cuda.empty_cache()
    step = workload.step(workload.towers("cuda"), World.alone("cuda"))
    batch = workload.batch(step.towers)
    for number in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step([batch], Key(0, number), 1e-3)
    torch.cuda.synchronize()
    return {"allocated GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}


main = benchmark(measure, __doc__, images=64, classes=PROBE_CLASSES, orders="first,language_all,vision_all,dual_all")

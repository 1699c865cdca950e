"""Evaluation against the usual one, which encodes every prompt again, at 77 tokens, for each batch of 64 images; and the text alone."""

import argparse
from typing import Any

import torch

from benchmarks.cost import shapes_of
from benchmarks.count import flops, without_numbers
from benchmarks.result import Result, Table, interleaved, median, spread
from benchmarks.setup import Workload, add_workload, device_of, numbers, positive, workload_of
from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import TwoTowers

EXAMPLES = """examples:
  python -m benchmarks eval                                                counted at 100 and 200 classes
  python -m benchmarks eval --time --model small --images 512 --repeats 3  and timed
  python -m benchmarks eval --time --device cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=2048)
    parser.add_argument("--class-counts", type=numbers, default="100,200", help="(default: %(default)s)")
    parser.add_argument(
        "--naive-batch", type=positive, default=64, help="images for which the usual way encodes all prompts (default: %(default)s)"
    )
    parser.add_argument("--time", action="store_true", help="also evaluate, in turn")
    parser.add_argument("--repeats", type=positive, default=3, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    rows, texts, records = [], [], []
    towers, whole = _towers(args, args.count_on)
    timed = _towers(args, device_of(args)) if args.time else None
    if timed and device_of(args) == "cuda":  # as a run does
        timed[0].record()
    for classes in args.class_counts:
        workload = workload_of(args, classes=classes, orders="first")
        with without_numbers():
            ours, usual = (flops(work) for work in evaluations_of(workload, towers, whole, args.naive_batch))
            texts.append(text_alone(workload, towers, whole))
        row: list[Any] = [classes, usual / 1e12, ours / 1e12, usual / ours]
        record: dict[str, Any] = {"classes": classes, "flops": ours, "naive_flops": usual}
        if timed:
            fast, naive = evaluations_of(workload, *timed, args.naive_batch)
            seconds = interleaved({"naive": naive, "fast": fast}, args.repeats, device_of(args))
            row += [args.images / median(seconds["fast"]), spread(seconds["naive"], seconds["fast"])]
            record |= seconds
        rows.append(row)
        records.append({**record, "text": texts[-1]})
    columns = ["classes", "naive TFLOP", "TFLOP", "ratio", *(["images/s", "times faster"] if args.time else [])]
    text_columns = ["prompts", "tokens", "naive TFLOP", "TFLOP", "ratio", "ratio, were their common beginning encoded once"]
    return Result(
        [Table(f"Evaluation of {args.images} images: {args.model}", columns, rows), Table("The text alone", text_columns, texts)], records
    )


def _towers(args: argparse.Namespace, device: str) -> tuple[TwoTowers, TwoTowers]:
    """Return a model that cuts prompts to the longest, and one that does not."""
    workload = workload_of(args, orders="first")
    return workload.towers(device), workload.towers(device, context="full")


def text_alone(workload: Workload, towers: TwoTowers, whole: TwoTowers) -> list[Any]:
    """Return a row about the features of prompts: at 77 tokens, cut to the longest, and (by the cost model) with their beginning shared."""
    device, tokens = towers.logit_scale.device, towers.prompts(workload.class_names)

    def cost(towers: TwoTowers) -> int:
        return flops(lambda: towers.features("language", towers.prompts(workload.class_names).to(device)))

    ours, usual = cost(towers), cost(whole)
    shared = int((tokens == tokens[0]).all(0).long().cumprod(0).sum())
    return [workload.classes, tokens.shape[1], usual / 1e12, ours / 1e12, usual / ours, usual / _cost_with_shared(shared, towers, tokens)]


def _cost_with_shared(shared: int, towers: TwoTowers, tokens: torch.Tensor) -> float:
    """Return the FLOPs of prompts whose first tokens are encoded once: their own tokens see them as keys and values."""
    classes, length = tokens.shape
    shape = shapes_of(towers, length)["language"]
    of_shared = shared / length * sum(block.forward for block in shape.blocks[:-1]) + 4 * shared * shape.width**2
    return classes * (shape.forward - of_shared) + of_shared


def evaluations_of(workload: Workload, towers: TwoTowers, whole: TwoTowers, naive_batch: int):
    """Return our evaluation and the usual one, to be called."""
    device = towers.logit_scale.device.type
    batch, world = workload.batch(towers.image_size), World.alone(device)

    def fast() -> None:
        if device == "meta":  # counts of right answers are numbers: what costs is before them
            towers.features("language", towers.prompts(workload.class_names).to(device))
            towers.features("vision", batch.images.to(device))
        else:
            count_correct(towers, [batch], workload.class_names, [workload.classes], world)

    return fast, lambda: usual_evaluation(whole, batch.images, workload.class_names, naive_batch)


@torch.no_grad()
def usual_evaluation(towers: TwoTowers, images: torch.Tensor, class_names: list[str], batch_size: int) -> None:
    device = towers.logit_scale.device
    for part in images.split(batch_size):
        text_CF = towers.features("language", towers.prompts(class_names).to(device))
        (towers.features("vision", part.to(device)) @ text_CF.T).argmax(1)

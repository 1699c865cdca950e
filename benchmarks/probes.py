"""How far a zeroth-order estimate is from the gradient, by its probes, which direction groups share out: variance against cost."""

import argparse
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result import Result, Table
from benchmarks.setup import Workload, add_orders, add_workload, device_of, numbers, positive, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.model.units import BRANCHES
from dist_vlcl.zo.difference import Directions
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks probes                                       the small CLIP's architecture, random weights
  python -m benchmarks probes --orders vision_all --probes 1,4,16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=16, zo="naive")
    add_orders(parser, "language_all,vision_all")
    parser.add_argument("--probes", type=numbers, default="1,2,4,8,16", help="numbers of probes (default: %(default)s)")
    parser.add_argument("--draws", type=positive, default=2, help="estimates of the most probes, of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=positive, default=4, help="steps whose gradients are estimated (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, counts = device_of(args), args.probes
    rows, records = [], []
    for orders in settings_of(args):
        pairs = [gradients(workload_of(args, orders=orders), device, Key(7, k), max(counts) * args.draws) for k in range(args.batches)]
        for count in counts:
            errors, cosines = [], []
            for true_n, single_Qn in pairs:
                for estimate_n in single_Qn[: len(single_Qn) // count * count].unflatten(0, (-1, count)).mean(1):
                    errors.append(float((estimate_n - true_n).square().sum() / true_n.square().sum()))
                    cosines.append(float(F.cosine_similarity(estimate_n, true_n, 0)))
            error, cosine = (sum(values) / len(values) for values in (errors, cosines))
            expected = (len(pairs[0][0]) + 1) / count
            rows.append([orders, count, error, expected, cosine])
            records.append({"orders": orders, "probes": count, "error": error, "expected": expected, "cosine": cosine})
    columns = ["orders", "probes", "squared error / squared gradient", "(n + 1) / probes", "cosine"]
    title = f"Estimates against gradients: {args.model}, random weights, {args.images} images, {args.classes} classes, one-sided"
    return Result([Table(title, columns, rows)], records)


def gradients(workload: Workload, device: str, key: Key, probes: int) -> tuple[Tensor, Tensor]:
    """Return the gradient `[n]` of a zeroth-order branch at a step, by back-propagation, and single-probe estimates of it `[probes, n]`."""
    towers = workload.towers(device)
    derived = copy.deepcopy(towers)
    step = workload.step(towers, World.alone(device))
    [(branch, flat)] = step.flats.items()
    batch = workload.batch(towers.image_size)
    noise = workload.noise(key, device)
    out = derived({"vision": batch.images.to(device), "language": step.tokens}, noise)
    image_BF, text_CF = (out[b][0][0] for b in reversed(BRANCHES))
    F.cross_entropy(derived.logit_scale * image_BF @ text_CF.T, batch.labels.to(device)).backward()
    true_n = torch.cat([getattr(derived.units[unit.id].adapter, name).grad.flatten() for unit, name, _, _ in flat.layout])

    step.zeroth.config.clip = None
    step.zeroth.config.probes = probes
    step.zeroth.difference = replace(step.zeroth.difference, probes=probes, clip=None)
    [move] = step([batch], key, 0.0).moves
    draws: Directions = step.zeroth.draws
    return true_n, torch.stack([s * draws.draw(branch, key, q) for q, s in enumerate(move.estimate.projected_gradient[branch])])

"""What the records of units cost: the same steps with and without, interleaved in one process.

    python tools/time_unit_records.py                                             the small CLIP
    python tools/time_unit_records.py model=vit_b16 model.pretrained=random train.batch_size=128        on a GPU

Any option of dist_vlcl.train; random images. Prints the median step, what observing adds to it (the median of paired differences, with
quartiles), and what writing a part adds. The goal is at most 2 % of a step. Run it on a quiet machine.
"""

import argparse
import statistics
import tempfile
import time

import torch
from hydra import compose, initialize_config_dir

from dist_vlcl.config import CONFIG_FOLDER, expand_paper, from_hydra
from dist_vlcl.data.loader import Batch
from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import World
from dist_vlcl.orders import assign
from dist_vlcl.run.units import UnitRecords
from dist_vlcl.step import HybridStep
from dist_vlcl.train import build_towers
from dist_vlcl.zo.noise import Key

NUM_CLASSES = 20


def timed(world: World, work) -> float:
    """Return the seconds of a call, the device's work included."""
    started = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps to time (default: 20)")
    arguments = parser.parse_args()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        cfg = from_hydra(compose("config", expand_paper(arguments.overrides)))
    world = World.from_environment(cfg.cluster)
    towers = build_towers(cfg, world)
    step = HybridStep(towers, assign(towers.units, cfg.orders), cfg.zo, lambda model: FirstOrder(world, cfg.first_order, model), world)
    step.begin([f"thing {k}" for k in range(NUM_CLASSES)])
    count, size = cfg.train.batch_size, towers.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(count) % NUM_CLASSES, torch.arange(count), count, 0, [])
    units = [(id.branch, id.layer, step.orders[id].value) for id in towers.units]
    with tempfile.TemporaryDirectory() as folder:
        records, steps, added, number = UnitRecords(folder, units, 1, 0), [], [], 0

        def one(observe: bool) -> None:
            nonlocal number
            number += 1
            report = step([batch], Key(0, number), cfg.first_order.lr, observe=observe)
            if report.figures is not None:
                records.add(number, 0, report.figures)

        for pair in range(-2, arguments.pairs):  # two pairs to warm up
            seconds = {
                observe: timed(world, lambda observe=observe: one(observe)) for observe in ((False, True) if pair % 2 else (True, False))
            }
            if pair >= 0:
                steps.append(seconds[False])
                added.append(seconds[True] - seconds[False])
        writing = timed(world, records.flush)
    step_s, (low, middle, high) = statistics.median(steps), statistics.quantiles(added, n=4)
    print(f"{cfg.model.name}, {sum(u.numel for u in towers.units.values()):,} adapter parameters, batch {count}, {world.device}")
    print(f"step {1e3 * step_s:.1f} ms; observing adds {1e3 * middle:.2f} ms = {100 * middle / step_s:.2f} %", end=" ")
    print(f"(quartiles {100 * low / step_s:.2f} to {100 * high / step_s:.2f} %)")
    print(f"writing a part of {arguments.pairs + 2} steps: {1e3 * writing:.1f} ms")


if __name__ == "__main__":
    main()

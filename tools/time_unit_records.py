"""What the records of units cost, beside the steps that they are of.

    python tools/time_unit_records.py cluster.threads=1                           the small CLIP on batches as of the digits
    python tools/time_unit_records.py model=vit_b16 model.pretrained=random train.batch_size=128        on a GPU

Any option of dist_vlcl.train; random images. Prints the median step without what observes it, what observing takes (median and quartiles),
and what writing a part takes. On a GPU that is elapsed time, with a synchronisation around each part, so an upper bound; on a CPU it is
CPU time, which other work on the machine hardly touches. The goal is at most 2 % of a step.
"""

import argparse
import statistics
import tempfile
import time
from functools import wraps

import torch
from hydra import compose, initialize_config_dir

from dist_vlcl.config import CONFIG_FOLDER, expand_paper, from_hydra
from dist_vlcl.data.loader import Batch
from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import build_towers
from dist_vlcl.orders import assign
from dist_vlcl.run.unit_records import UnitRecords
from dist_vlcl.session import sizes_by_unit
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key

OBSERVING = ("_observe_first", "_observe_moved")


class Stopwatch:
    """Adds up the seconds of the calls that it wraps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def timed(*arguments, **options):
            started = self.now()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds += self.now() - started

        setattr(owner, name, timed)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--classes", type=int, default=20, help="classes of the task (default: 20)")
    parser.add_argument("--steps", type=int, default=20, help="steps to time (default: 20)")
    arguments = parser.parse_intermixed_args()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        cfg = from_hydra(compose("config", expand_paper(arguments.overrides)))
    world = World.from_environment(cfg.cluster)
    towers = build_towers(cfg, world)
    step = HybridStep(towers, assign(towers.units, cfg.orders), cfg.zo, lambda model: FirstOrder(world, cfg.first_order, model), world)
    step.begin([f"thing {k}" for k in range(arguments.classes)])
    count, size = cfg.train.batch_size, towers.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(count) % arguments.classes, torch.arange(count), count, 0, [])
    units = [(id.branch, id.layer, step.orders[id].value, unit.numel) for id, unit in towers.units.items()]
    watch, steps, observing = Stopwatch(world.device), [], []
    for name in OBSERVING:
        watch.wrap(HybridStep, name)
    with tempfile.TemporaryDirectory() as folder:
        records = UnitRecords(folder, units, 1, 0)
        for number in range(1, arguments.steps + 3):
            watch.seconds, started = 0.0, watch.now()
            report = step([batch], Key(0, number), cfg.first_order.lr, observe=True)
            seconds = watch.now() - started
            assert report.unit_statistics is not None
            records.add(number, 0, report.unit_statistics, sizes_by_unit(step, report.moves))
            if number == 2:  # two steps and a part to warm up
                records.flush()
            elif number > 2:
                steps.append(seconds - watch.seconds)
                observing.append(watch.seconds)
        started = watch.now()
        records.flush()
        writing = watch.now() - started
    step_s, (low, middle, high) = statistics.median(steps), statistics.quantiles(observing, n=4)
    numel = sum(unit.numel for unit in towers.units.values())
    print(f"{cfg.model.name}, {numel:,} adapter parameters, batch {count}, {arguments.classes} classes, {world.device}")
    print(f"step {1e3 * step_s:.1f} ms; observing it {1e3 * middle:.2f} ms = {100 * middle / step_s:.2f} %", end=" ")
    print(f"(quartiles {100 * low / step_s:.2f} to {100 * high / step_s:.2f} %)")
    print(f"writing a part of {arguments.steps} steps: {1e3 * writing:.1f} ms = {100 * writing / sum(steps):.2f} % of them")


if __name__ == "__main__":
    main()

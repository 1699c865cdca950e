"""Evaluate a run again from its newest checkpoint:  accelerate launch -m dist_vlcl.commands.evaluate runs/NAME"""

import argparse
import sys
from pathlib import Path

from dist_vlcl.config import load_config
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.experiment import Experiment
from dist_vlcl.masking import HIDDEN, masked
from dist_vlcl.run import checkpoint

EXPLANATION = """
Loads the adapters of the newest checkpoint and measures the newest row of the accuracy matrix again, on as many ranks as the launcher
starts. Prints Last, Avg and forgetting in percent. The checkpoint must lie at the end of a task. Nothing in the run folder changes.
"""


def evaluate_run(folder: Path, world: World) -> AccuracyMatrix:
    """Return the accuracy matrix of a run with its newest row measured again. All ranks call this.

    Raises FileNotFoundError without an intact checkpoint, and ValueError if the checkpoint lies within a task or is of version 0.1.
    """
    cfg = load_config(folder / "config.yaml")
    if HIDDEN in (cfg.data.url or ""):
        raise ValueError(
            f"{folder}/config.yaml: data.url={cfg.data.url!r} had a secret, which was not saved; insert it for this evaluation"
        )
    experiment = Experiment.open(cfg, world)
    saved = world.on_main(lambda: checkpoint.load_newest(folder), "the checkpoint")
    if saved is None:
        raise FileNotFoundError(f"{folder}/checkpoints has no intact checkpoint; train first")
    rows = [[tuple(counts) for counts in row] for row in saved.state["accuracy"]]
    if not rows or saved.state["batch"] or saved.state["epoch"]:
        raise ValueError(f"{folder}: the newest checkpoint lies within task {saved.state['task'] + 1}; finish the task first")
    adapters = {name.removeprefix("adapters/"): t for name, t in saved.tensors.items() if name.startswith("adapters/")}
    experiment.towers.units.load_state_dict(adapters)
    accuracy = AccuracyMatrix([len(task.classes) for task in experiment.tasks], rows[:-1])
    accuracy.append(experiment.evaluate(experiment.tasks[len(rows) - 1]))
    return accuracy


def main() -> None:
    """Run the command line. Exit status 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m dist_vlcl.commands.evaluate", description=__doc__, epilog=EXPLANATION)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    folder = parser.parse_args().run
    world = World.alone()
    try:
        cluster = load_config(folder / "config.yaml").cluster
        world = World.from_environment(ClusterConfig(timeout_s=cluster.timeout_s))  # any ranks, any device
        accuracy = evaluate_run(folder, world)
        if world.is_main:
            print(f"Last {100 * accuracy.last:.2f}  Avg {100 * accuracy.average:.2f}  forgetting {100 * accuracy.forgetting:.2f}")
    except (OSError, ValueError, RuntimeError) as error:
        world.collectives.stopped(error)  # the others wait for this rank, and can then say why it is gone
        print(masked(f"error on rank {world.rank} of {world.size}: {error}"), file=sys.stderr)
        sys.exit(2)
    finally:
        world.close()


if __name__ == "__main__":
    main()

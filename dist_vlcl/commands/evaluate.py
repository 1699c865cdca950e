"""Evaluate a run again from its newest checkpoint:  accelerate launch -m dist_vlcl.commands.evaluate runs/NAME"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_vlcl.config import load_config
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.experiment import Experiment
from dist_vlcl.masking import masked
from dist_vlcl.run import checkpoint
from dist_vlcl.run.state import TrainState
from dist_vlcl.saved import digest_of, read_config

EXPLANATION = """
Loads the adapters of the newest checkpoint and measures the newest row of the accuracy matrix again, on as many ranks as the launcher
starts. Prints Last, Avg and forgetting in percent. The checkpoint must lie at the end of a task. Nothing in the run folder changes.

The run folder may come from someone else. Its configuration is read as data: code, commands, addresses and absolute paths that it names
count only if you repeat them as OPTION=VALUE. An error message lists them. Other options that change no result can be given too.
"""


def evaluate_run(folder: Path, world: World, options: Sequence[str] = ()) -> AccuracyMatrix:
    """Return the accuracy matrix of a run with its newest row measured again. All ranks call this. `options`: of this command line.

    Raises FileNotFoundError without an intact checkpoint. Raises ValueError if the checkpoint lies within a task, is of version 0.1, or was
    saved with another configuration or other data.
    """
    experiment = Experiment.open(load_config(folder / "config.yaml", options), world)
    identity = {"config": digest_of(read_config(folder / "config.yaml")), "data": experiment.index.fingerprint}
    saved = world.on_main(lambda: checkpoint.load_newest(folder, identity), "the checkpoint")
    if saved is None:
        raise FileNotFoundError(f"{folder}/checkpoints has no intact checkpoint; train first")
    state = TrainState.from_dict(saved.state)
    rows = [[tuple(counts) for counts in row] for row in state.accuracy]
    if not rows or state.batch or state.epoch:
        raise ValueError(f"{folder}: the newest checkpoint lies within task {state.task + 1}; finish the task first")
    adapters = {name.removeprefix("adapters/"): t for name, t in saved.tensors.items() if name.startswith("adapters/")}
    experiment.towers.units.load_state_dict(adapters)
    accuracy = AccuracyMatrix([len(task.classes) for task in experiment.tasks], rows[:-1])
    accuracy.append(experiment.evaluate(experiment.tasks[len(rows) - 1]))
    return accuracy


def main() -> None:
    """Run the command line. Exit status 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m dist_vlcl.commands.evaluate", description=__doc__, epilog=EXPLANATION)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="what config.yaml may not decide, such as data.root=/data")
    arguments = parser.parse_args()
    folder, options, world = arguments.run, arguments.options, World.announced()
    try:
        cluster = load_config(folder / "config.yaml", options).cluster
        world = World.from_environment(ClusterConfig(timeout_s=cluster.timeout_s, threads=cluster.threads))  # any ranks, any device
        accuracy = evaluate_run(folder, world, options)
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

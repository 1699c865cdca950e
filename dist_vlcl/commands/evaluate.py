"""Evaluate a run again, from its newest checkpoint:  accelerate launch -m dist_vlcl.commands.evaluate runs/NAME"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dist_vlcl.config import load_config
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.dist.world import World
from dist_vlcl.masking import HIDDEN, masked
from dist_vlcl.run import checkpoint
from dist_vlcl.train import build_towers, evaluate, make_loader, open_tasks


def evaluate_run(folder: Path, world: World) -> AccuracyMatrix:
    """Return the accuracy matrix of a run with its newest row measured anew. All ranks call this.

    Raises FileNotFoundError without a whole checkpoint, ValueError when it is of a task that has not ended.
    """
    cfg = load_config(folder / "config.yaml")
    if HIDDEN in (cfg.data.url or ""):
        raise ValueError(
            f"{folder}/config.yaml: data.url={cfg.data.url!r} had a secret, which was not kept; write it in for the time of the evaluation"
        )
    index, tasks = open_tasks(cfg, world)
    saved = world.share(checkpoint.load_newest(folder) if world.is_main else None)
    if saved is None:
        raise FileNotFoundError(f"{folder}/checkpoints holds no whole checkpoint; train first")
    finished = len(saved.state["accuracy"])
    if finished == 0 or saved.state["batch"] or saved.state["epoch"]:
        raise ValueError(f"{folder}: the newest checkpoint lies within task {saved.state['task'] + 1}; finish the task first")
    towers = build_towers(cfg, world)
    towers.units.load_state_dict({n.removeprefix("adapters/"): t for n, t in saved.tensors.items() if n.startswith("adapters/")})
    accuracy = AccuracyMatrix([len(task.classes) for task in tasks], [[tuple(c) for c in row] for row in saved.state["accuracy"][:-1]])
    loader = make_loader(cfg, index, world)
    accuracy.append(evaluate(cfg, towers, loader, tasks, tasks[finished - 1], world, lambda batches, **_: batches))
    return accuracy


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    folder = parser.parse_args().run
    world = World.alone()
    try:
        cluster = load_config(folder / "config.yaml").cluster
        world = World.from_environment(replace(cluster, num_processes=None, direction_groups=1))  # as many ranks as there are
        accuracy = evaluate_run(folder, world)
        if world.is_main:
            print(f"Last {100 * accuracy.last:.2f}  Avg {100 * accuracy.average:.2f}  forgetting {100 * accuracy.forgetting:.2f}")
    except (OSError, ValueError, RuntimeError) as error:
        world.collectives.stopped(error)  # the others are waiting for this rank, and can then say why it is gone
        sys.exit(masked(f"error on rank {world.rank} of {world.size}: {error}"))
    finally:
        world.close()


if __name__ == "__main__":
    main()

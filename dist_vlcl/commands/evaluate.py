"""Evaluate a run again, or on other data:  dist-vlcl evaluate runs/NAME [--data FOLDER]

For several processes: accelerate launch -m dist_vlcl evaluate ...

Loads the adapters of the newest checkpoint and measures the newest row of the accuracy matrix again, on as many ranks as the launcher
starts. Prints Last, Avg and forgetting in percent. The checkpoint must lie at the end of a task. Nothing in the run folder changes.
--data measures another data set instead, with all its classes: how much of CLIP's zero-shot accuracy there the training has kept.

The run folder may come from someone else. Its configuration is read as data: code, commands, addresses and absolute paths that it names
count only if you repeat them as OPTION=VALUE. An error message lists them. Other options that change no result can be given too.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from dist_vlcl.config import load_config
from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.continual.metrics import AccuracyMatrix, Counts
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.names import distinct, prompt_names
from dist_vlcl.data.shards import Index
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.experiment import Experiment, build_towers
from dist_vlcl.inference import WEIGHTS, read_classes, read_trained, warn_of_other_weights
from dist_vlcl.masking import masked
from dist_vlcl.options import split_options
from dist_vlcl.run import checkpoint
from dist_vlcl.run.signals import print_error
from dist_vlcl.run.state import TrainState
from dist_vlcl.saved import digest_of, read_config


def evaluate_run(folder: Path, world: World, options: Sequence[str] = ()) -> AccuracyMatrix:
    """Return the accuracy matrix of a run with its newest row measured again. All ranks call this. `options`: of this command line.

    Raises FileNotFoundError without an intact checkpoint. Raises ValueError if the checkpoint lies within a task, or was
    saved with another configuration or other data.
    """
    experiment = Experiment.open(load_config(folder / "config.yaml", options), world)
    identity = {"config": digest_of(read_config(folder / "config.yaml")), "data": experiment.index.fingerprint}
    saved = world.on_main(lambda: checkpoint.load_newest(folder, identity), "the checkpoint")
    if saved is None:
        raise FileNotFoundError(f"{folder}/checkpoints has no intact checkpoint; train first")
    warn_of_other_weights(folder, experiment.towers, world)
    state = TrainState.from_dict(saved.state)
    if not state.accuracy or state.batch or state.epoch:
        raise ValueError(f"{folder}: the newest checkpoint lies within task {state.task + 1}; finish the task first")
    experiment.towers.units.load_state_dict(checkpoint.adapters_in(saved.tensors))
    accuracy = experiment.accuracy(state.accuracy[:-1])
    accuracy.append(experiment.evaluate(experiment.tasks[len(state.accuracy) - 1]))
    return accuracy


def evaluate_elsewhere(folder: Path, location: str, world: World, options: Sequence[str] = ()) -> tuple[list[str], Counts, Counts]:
    """Return the class names of other shards, and the counts of correct answers before and after training. All ranks call this."""
    trained = read_trained(folder, options=options)
    cfg, index = trained.cfg, Index.load(location, trained.cfg.data.allow_pipe, trained.cfg.data.timeout_s)
    names = prompt_names(index.class_names, cfg.data.underscore_names)
    towers, loader = build_towers(cfg, world), Loader(index, cfg.data, world.device)
    transform = EvalTransform(towers.image_size, *towers.resizing)
    test = loader.test(range(len(names)), batch_size=cfg.eval.batch_size, rank=world.rank, size=world.size, transform=transform)
    before = count_correct(towers, test, names, [len(names)], world).tolist()[0]  # new adapters change nothing
    towers.units.load_state_dict(trained.adapters)
    warn_of_other_weights(folder, towers, world)
    return names, before, count_correct(towers, test, names, [len(names)], world).tolist()[0]


def report(options: Namespace, world: World) -> str:
    """Return what the command prints. All ranks call this."""
    if options.data:
        names, before, after = evaluate_elsewhere(options.run, options.data, world, options.options)
        old, new = (sum(correct for correct, _ in counts) / sum(total for _, total in counts) for counts in (before, after))
        values, counts, place = {"zero_shot": old, "accuracy": new, "retention": new - old}, after, ""
    else:
        accuracy = evaluate_run(options.run, world, options.options)
        done, planned = len(accuracy.rows), len(accuracy.task_sizes)
        place = f"after task {done} of {planned}: " if done < planned else ""
        counts = accuracy.rows[-1][: sum(accuracy.task_sizes[:done])]
        names = [name for names in read_classes(options.run) for name in names] or list(map(str, range(len(counts))))
        values = {"Last": accuracy.last, "Avg": accuracy.average, "forgetting": accuracy.forgetting}
    classes = {name: correct / max(1, total) for name, (correct, total) in zip(distinct(names), counts, strict=False)}
    if options.json:
        return json.dumps({**{key.lower(): value for key, value in values.items()}, "classes": classes}, ensure_ascii=False)
    lines = [masked(f"{100 * value:6.2f}  {name}") for name, value in classes.items()] if options.classes else []
    return "\n".join([*lines, place + "  ".join(f"{key} {100 * value:.2f}" for key, value in values.items())])


def main() -> None:
    """Run the command line. Exit status 2 after an error."""
    parser = ArgumentParser(prog="dist-vlcl evaluate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="what config.yaml may not decide, such as data.root=/data")
    parser.add_argument("--data", metavar="FOLDER", help="the folder or the address of other shards, such as data/cifar100")
    parser.add_argument("--classes", action="store_true", help="also print the accuracy of every class")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with fractions")
    arguments, world = parser.parse_intermixed_args(), World.announced()
    try:
        cluster = load_config(arguments.run / "config.yaml", arguments.options, WEIGHTS).cluster
        given = {key.removeprefix("cluster.") for key, _ in split_options(arguments.options) if key.startswith("cluster.")}
        world = World.from_environment(ClusterConfig(**{key: getattr(cluster, key) for key in {"timeout_s", "threads", *given}}))
        text = report(arguments, world)
        if world.is_main:
            print(text)
    except (OSError, ValueError, RuntimeError) as error:
        world.collectives.stopped(error)  # the others wait for this rank, and can then say why it is gone
        print_error(f"error on rank {world.rank} of {world.size}: {error}")
        raise SystemExit(2) from error
    finally:
        world.close()

"""Train CLIP continually:  `accelerate launch --multi_gpu --num_processes 2 -m dist_vlcl.train [OPTION=VALUE ...]`.

`--help` lists the options. `--check` validates the options, prints one line and exits: with status 0 if they are valid, otherwise with 2.
"""

import importlib.util
import os
import sys

from dist_vlcl.config import FULL_ERROR, Config, hydra_main
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.dist.agree import agree, digest
from dist_vlcl.dist.world import World
from dist_vlcl.dist.zero import first_order
from dist_vlcl.experiment import Experiment
from dist_vlcl.inference import read_start, warn_of_other_weights
from dist_vlcl.losses import min_samples
from dist_vlcl.model.clip import unit_ids
from dist_vlcl.orders import assign
from dist_vlcl.run.environment import ELASTIC
from dist_vlcl.run.folder import RunFolder
from dist_vlcl.run.signals import Preemption, line_of_user, print_error, report_failure, report_status
from dist_vlcl.session import Requeued, Session
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key


def train(cfg: Config, world: World) -> AccuracyMatrix | None:
    """Learn the tasks in order; return the accuracy on every task after every task, or None if the run was complete before.

    All ranks call this. After a signal it saves and raises Requeued; a second call with the same configuration continues from there.
    Raises ReplicaDivergedError, naming rank and tensor, if the ranks no longer have the same adapters.
    """
    require_extras(cfg)
    with Preemption() as preemption:
        initial_adapters = world.on_main(lambda: read_start(cfg), "adapter.init")
        experiment = Experiment.open(cfg, world)
        if initial_adapters:
            experiment.towers.units.check(initial_adapters)
            warn_of_other_weights(cfg.adapter.init, experiment.towers, world)
        step = build_step(experiment)
        check_warmup(experiment, step)
        weights = check_same_start(experiment, step)
        digests = {"data": experiment.index.fingerprint, "weights": weights, "code_digest": experiment.code}
        folder = RunFolder.open(cfg.run, cfg.as_dict(), world, **digests)
        if folder.is_complete:
            if world.is_main:
                print(folder.message)
            return None
        with Session(experiment, step, folder, initial_adapters) as session:
            session.describe()
            session.evaluate_untrained()
            for task in session.tasks_left():
                session.begin(task)
                for planned in session.steps_left(task):
                    batches, observe = planned.micro_batches(cfg.train.micro_batches), session.records.is_due(session.state.step + 1)
                    stop = preemption.requested or folder.another_start_waits
                    report = step(batches, planned.key, planned.lr, stop=stop, observe=observe)
                    session.record(planned, report)
                    if report.stop or session.is_time_to_save():
                        session.save()
                    elif session.state.step % cfg.train.check_every_steps == 0:
                        session.compare_ranks()
                    if report.stop:
                        session.requeue()
                session.save()  # an evaluation may take longer than a signal leaves time for
                session.finish(task)
                if session.tasks_left() and session.any_rank(preemption.requested):
                    session.requeue()
            return session.complete()


def require_extras(cfg: Config) -> None:
    """Raise ValueError if the run would need a package that is not installed."""
    needed = [("run.plots=false", module) for module in ("matplotlib", "pandas", "pyarrow") if cfg.run.plots]
    needed += [("run.record_every_steps=0", "pyarrow")] if cfg.run.record_every_steps else []
    for without, module in needed:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is not installed: pip install 'dist-vlcl[report]', or give {without}")


def build_step(experiment: Experiment) -> HybridStep:
    """Return the step, which gives every unit its order. All ranks call this."""
    cfg, world, towers = experiment.cfg, experiment.world, experiment.towers
    orders = assign(towers.units, cfg.orders)
    least = min_samples(cfg.cluster.exact_bits, experiment.batch_size // (world.data_size * cfg.train.micro_batches))
    return HybridStep(towers, orders, cfg.zo, lambda model: first_order(world, cfg.first_order, model), world, cfg.train.max_skips, least)


def check_warmup(experiment: Experiment, step: HybridStep) -> None:
    """Raise ValueError if a task ends within the warm-up.

    Runs with `paper=ID` are exempt, because the paper's ImageNet-R tasks are that short. So are runs with `train.max_steps`.
    """
    train, shortest = experiment.cfg.train, min(map(experiment.num_steps, experiment.tasks))
    if step.learns and experiment.cfg.model.loss == "cross_entropy" and max(len(task.classes) for task in experiment.tasks) == 1:
        raise ValueError("tasks.increment=1: within a task of one class the loss is always 0, and nothing is learned; give at least 2")
    if step.learns and (train.warmup_steps or 0) >= shortest and not experiment.cfg.paper and train.max_steps is None:
        advice = f"give at most {shortest // 2}, or null for a tenth of a task, or more train.epochs, or less eval.holdout"
        raise ValueError(f"train.warmup_steps={train.warmup_steps}: the shortest task has {shortest} steps; {advice}")


def check_same_start(experiment: Experiment, step: HybridStep) -> str:
    """Return a digest of the frozen weights. All ranks call this, before ZeRO-3 leaves each of them a part.

    Raises DisagreementError unless all ranks start from the same weights and draw the same directions.
    """
    tensors = {
        "the frozen weights": experiment.towers.frozen_weights(),
        "the adapters": experiment.towers.units.state_dict(),
        "the first direction": {branch: step.zeroth.directions.draw(branch, Key(0, 0), 0) for branch in step.flats},
    }
    hint = "If only the first direction differs, the ranks have different CPUs: use zo.directions=rademacher, which needs no rounding."
    digests = {name: digest(of_name) for name, of_name in tensors.items()}
    agree(experiment.world, digests, hint)
    return digests["the frozen weights"]


def check(cfg: Config) -> None:
    """Print that a configuration is valid, or exit with status 2: a package is missing, or plan or adapters do not fit the model."""
    require_extras(cfg)
    read_start(cfg)
    assign(unit_ids(cfg.model), cfg.orders)
    print(f"valid: {cfg.run.folder}")


def run_and_report(cfg: Config) -> None:
    """Train; report the outcome to the user and to the batch script. Exits with status 2 after an error."""
    world = World.announced()
    try:
        world = World.from_environment(cfg.cluster)
        with world.collectives("a collective of torch"):  # those that no name was given, such as DeepSpeed's own
            train(cfg, world)
        if world.is_main:
            report_status("complete")
    except Requeued as stopped:
        if world.is_main:
            report_status("requeue")
            print(f"saved and stopped after a signal; the same command continues from here ({stopped}/REQUEUE marks it)")
        if os.environ.get(ELASTIC):
            raise SystemExit(os.EX_TEMPFAIL) from stopped  # 0 would mean the end of the run
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        world.collectives.stopped(error)  # the others wait for this rank, and can then say why it is gone
        can_continue = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | FileExistsError)
        advice = "\nRepair the cause; the same command then continues from the newest checkpoint." if can_continue else ""
        print_error(f"error on rank {world.rank} of {world.size}: {error}{line_of_user(error)}{advice}")
        report_failure(error, world.is_main)  # last: the agent of launch/elastic.sh may end this process
        if os.environ.get(FULL_ERROR):
            raise
        raise SystemExit(2) from error
    finally:
        world.close()


def main() -> None:
    """Run the command line. Exit status 0 also after a requeue: a marker file in the run's folder tells the difference.

    Under launch/elastic.sh it is 75 after a requeue, and the agent starts the ranks again.
    """
    is_check = "--check" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--check"]
    hydra_main(check if is_check else run_and_report, __doc__)


if __name__ == "__main__":
    main()

"""Train CLIP continually:  accelerate launch --multi_gpu --num_processes 2 -m dist_vlcl.train [OPTION=VALUE ...]   (--help lists them)"""

# B samples of this rank

import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import torch

from dist_vlcl.config import Config, hydra_main
from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.data.loader import Batch, Loader
from dist_vlcl.data.names import class_order, paper_order, prompt_names
from dist_vlcl.data.order import SampleId, held_out
from dist_vlcl.data.shards import Index, ShardError, UnreadShard
from dist_vlcl.data.store import open_index
from dist_vlcl.data.tasks import Task, TaskStream
from dist_vlcl.data.transforms import TestTransform, TrainTransform
from dist_vlcl.dist.agree import ReplicaDivergedError, agree, agree_on_tensors, digest
from dist_vlcl.dist.world import World
from dist_vlcl.dist.zero import first_order
from dist_vlcl.masking import masked, masked_values
from dist_vlcl.model.clip import TwoTowers, build_clip, unit_ids
from dist_vlcl.model.units import UnitId
from dist_vlcl.orders import Order, assign, describe
from dist_vlcl.report.figures import plot_run
from dist_vlcl.report.tables import summarize_run
from dist_vlcl.run import checkpoint, journal
from dist_vlcl.run.environment import code_digest, is_restart
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.folder import PATIENCE_S, RunBusy, RunFolder
from dist_vlcl.run.jsonl import PATIENCE, read_lines
from dist_vlcl.run.log import METRICS, RunLog
from dist_vlcl.run.preemption import Preemption
from dist_vlcl.run.state import TrainState
from dist_vlcl.run.status import report_status
from dist_vlcl.run.stragglers import Stragglers
from dist_vlcl.run.units import UnitRecords
from dist_vlcl.schedule import warmup_cosine
from dist_vlcl.step import HybridStep, StepReport
from dist_vlcl.zo.noise import Key, derive_seed
from dist_vlcl.zo.update import Move

MAX_RELOADS = 3  # of a run whose ranks come apart again and again

Progress = Callable[..., Iterable[Any]]  # shows how far an iterable of batches is: RunLog.progress, or nothing


@dataclass
class Requeued(Exception):
    """The run was asked to stop, has saved itself, and wants to be started again."""

    path: str


def train(cfg: Config, world: World) -> AccuracyMatrix | None:
    """Learn a sequence of tasks; return the accuracy on every task after every task, or None if that was known before.

    All ranks call this. Raises Requeued after a signal; a second call with the same configuration then goes on where it stopped. Ranks that
    come apart go back to what they last agreed on, where `train.on_disagreement` says so.
    """
    with Preemption() as preemption:
        for reloads_left in reversed(range(MAX_RELOADS + 1)):
            try:
                return _train(cfg, world, preemption)
            except ReplicaDivergedError as error:
                if cfg.train.on_disagreement == "stop" or not reloads_left:
                    raise
                if world.is_main:
                    print(f"{error}\ngoing back to what the ranks last agreed on", flush=True)
                cfg = replace(cfg, run=replace(cfg.run, resume=True, overwrite=False))
    raise AssertionError("unreachable")


def _train(cfg: Config, world: World, preemption: Preemption) -> AccuracyMatrix | None:
    assign(unit_ids(cfg.model), cfg.orders)  # refuses what cannot be, before data are read and weights fetched
    index, tasks = open_tasks(cfg, world)
    code = code_digest()
    facts = {"the configuration": cfg.as_dict(), "the data set": index.fingerprint, "the code": code}
    agree(world, facts, "Start every rank with the same command and the same files.")
    if cfg.train.on_disagreement == "reload" and world.engine != "ddp":
        raise ValueError("train.on_disagreement=reload: not under DeepSpeed, whose hooks outlive a reload; use stop")
    towers, loader = build_towers(cfg, world), make_loader(cfg, index, world)
    step = HybridStep(
        towers,
        assign(towers.units, cfg.orders),
        cfg.zo,
        lambda model: first_order(world, cfg.first_order, model),
        world,
        cfg.train.max_skips,
    )
    facts = {
        "the frozen weights": digest({name: t for name, t in towers.state_dict().items() if ".adapter." not in name}),
        "the adapters": digest(towers.units.state_dict()),
        "the first direction": first_direction(step),
    }
    agree(
        world, facts, "If only the first direction differs, the CPUs differ in kind: use zo.directions=rademacher, which needs no rounding."
    )
    patience_s = min(PATIENCE_S, cfg.cluster.timeout_s / 2)  # the other ranks wait for rank 0's word
    run = RunFolder.open(cfg.run, cfg.as_dict(), world, data=index.fingerprint, code=code, patience_s=patience_s)
    if run.is_complete:
        if world.is_main:
            report_status("complete")
            print(f"{run.message}\nDelete it, or take another run.name or seed, to train again.")
        return None
    state, saved = resume_or_start(cfg, run, world)
    moved_from = saved.state["device"] if saved and saved.state["device"] != world.device.type else None
    journalled = roll_forward(cfg, run, step, state, index, tasks, world, moved_from)
    accuracy = AccuracyMatrix([len(task.classes) for task in tasks], [[tuple(c) for c in row] for row in state.accuracy])

    log = RunLog(run.path, cfg.run, world, masked_values(cfg.as_dict()), state)
    state.wandb_id = log.wandb_id
    units = [(id.branch, id.layer, step.orders[id].value, unit.numel) for id, unit in towers.units.items()]
    records = UnitRecords(run.path, units, cfg.run.record_every_steps, state.step, world.is_main)
    log.say(run.message + (f", going on after step {state.step}" if state.step else ""))
    introduce(log, cfg, world, step, tasks, index)
    if world.is_main:
        report_status("training")
    try:
        zero_shot = evaluate_untrained(cfg, towers, loader, tasks, world, log) if state.task == 0 and not saved else state_zero_shot(saved)
        for task in tasks[state.task :]:
            step.begin(task.names)
            if saved:
                step.load_state_dict(saved.tensors)
                saved = None
            if journalled:
                step.replay(journalled)
                agree(world, {"the adapters as the journal rebuilds them": digest(towers.units.state_dict())})
                log.say(f"the journal gave back {len(journalled)} steps after the checkpoint")
                journalled = []
            agreed, stragglers = state.step, Stragglers(world.collectives.named, world.direction_groups)
            for batch, key, lr in training_steps(cfg, step, loader, task, world, state, log):
                started = time.perf_counter()
                parts, observe = split(batch, cfg.train.micro_batches), records.is_due(state.step + 1)
                report = step(parts, key, lr, stop=preemption.requested, observe=observe)
                state.advance()
                state.seconds += time.perf_counter() - started
                log_step(log, state, report, key, lr, time.perf_counter() - started, batch, world.take_peak_gib())
                if report.unit_statistics is not None:
                    records.add(state.step, state.task, report.unit_statistics, sizes_by_unit(step, report.moves))
                if words := stragglers.note(world.gather_objects(report.busy_s, "busy seconds")):
                    log.say(f"step {state.step}: {words}")
                is_to_save = report.stop or run.is_time_to_save(state.step)
                if is_to_save or state.step % cfg.train.check_every_steps == 0:
                    agreed = agree_on_adapters(world, step, state, log, agreed)
                if is_to_save:
                    save(run, state, step, log, records, zero_shot, must=report.stop)
                if report.stop:
                    requeue(run, world)
            agree_on_adapters(world, step, state, log, agreed)
            save(run, state, step, log, records, zero_shot)  # an evaluation may outlast the time that a signal leaves
            accuracy.append(evaluate(cfg, towers, loader, tasks, task, world, log.progress))
            state.accuracy = accuracy.rows
            log.task({"step": state.step, "task": task.index, **accuracy.summary(), "zero_shot": zero_shot.get(task.index)})
            run.write_accuracy({**accuracy.summary(), "rows": accuracy.rows})
            state.next_task()
            save(run, state, step, log, records, zero_shot, must=task is tasks[-1])
            if task is not tasks[-1] and world.sum_exact(torch.tensor([int(preemption.requested)]), "stop requests")[0] > 0:
                requeue(run, world)
        farewell(cfg, log, run, world)
        run.complete({**accuracy.summary(), "rows": accuracy.rows, "zero_shot": zero_shot, "seconds": state.seconds, "steps": state.step})
        if world.is_main:
            report_status("complete")
    finally:
        step.first.end()
        log.close()
        run.close()
    return accuracy


def agree_on_adapters(world: World, step: HybridStep, state: TrainState, log: RunLog, agreed: int) -> int:
    """Return the step now agreed on; raise ReplicaDivergedError with the journal cut back to `agreed`. All ranks call this.

    It goes before every checkpoint, so that none holds what a rank that went astray has had a part in.
    """
    try:
        agree_on_tensors(world, f"the adapters after step {state.step}", step.adapters())
    except ReplicaDivergedError:
        log.truncate_after(after=agreed)
        raise
    return state.step


def open_tasks(cfg: Config, world: World) -> tuple[Index, TaskStream]:
    """Return the index of the shards, written by rank 0 where it can be, and the stream of tasks. All ranks call this."""
    outcome = None
    if world.is_main:
        try:
            open_index(cfg.data)
        except (OSError, ValueError, RuntimeError) as error:
            outcome = OSError if isinstance(error, OSError) else ValueError, str(error)
    outcome = world.share(outcome, "rank 0's look at the data set")
    if outcome:
        kind, words = outcome
        raise kind(words)
    index = open_index(cfg.data)
    order = class_order(cfg.tasks.order, index.num_classes, paper_order(index.reader))
    names = prompt_names(index.class_names, cfg.data.underscore_names)
    return index, TaskStream(names, cfg.tasks.increment, order, cfg.tasks.base, cfg.tasks.num_tasks)


def build_towers(cfg: Config, world: World) -> TwoTowers:
    """Return CLIP with fresh adapters, the same on every rank and in every start of a configuration.

    Raises ValueError where the engine cannot train in the model's precision.
    """
    if world.engine.startswith("zero") and cfg.model.precision != "fp32":
        raise ValueError(
            f"model.precision={cfg.model.precision}: DeepSpeed holds one precision only; launch with DDP, or take model.precision=fp32"
        )
    return build_clip(cfg.model, cfg.adapter, seed=derive_seed(cfg.seed, "adapters")).to(world.device)


def make_loader(cfg: Config, index: Index, world: World) -> Loader:
    """Return this rank's loader of a whole run."""
    return Loader(
        index,
        device=world.device,
        num_workers=cfg.data.num_workers,
        cache_gib=cfg.data.cache_gib,
        on_error=cfg.data.on_error,
    )


def first_direction(step: HybridStep) -> str:
    """Return a digest of the first random direction of every zeroth-order branch."""
    return digest({branch: step.zeroth.directions.draw(branch, Key(0, 0), 0) for branch in step.flats})


def resume_or_start(cfg: Config, run: RunFolder, world: World) -> tuple[TrainState, checkpoint.Checkpoint | None]:
    """Return the state to go on from, read by rank 0. All ranks call this."""
    saved = world.share(checkpoint.load_newest(run.path) if world.is_main and not run.is_new else None, "the checkpoint")
    if saved is None:
        return TrainState(run_seed=cfg.seed), None
    if saved.state["world_size"] != world.size and world.is_main:
        print(f"resuming on {world.size} ranks what was saved on {saved.state['world_size']}: the same batches, other rounding of sums")
    return TrainState.from_dict(saved.state), saved


def roll_forward(
    cfg: Config,
    run: RunFolder,
    step: HybridStep,
    state: TrainState,
    index: Index,
    tasks: TaskStream,
    world: World,
    moved_from: str | None = None,
) -> list[dict[str, Any]]:
    """Return the steps of the task that the journal holds beyond the checkpoint, and count them in `state`. All ranks call this.

    Empty where first-order units learn: the journal does not know their updates, so those steps are taken again. Nor where the run has
    `moved_from` a device of another type, whose normal directions were others.
    """
    if run.is_new or step.first.parameters or state.task >= len(tasks):
        return []
    records = world.share(whole_steps(run.path, state) if world.is_main else None, "the journal")
    if records and moved_from and cfg.zo.directions != "rademacher":
        if world.is_main:
            print(
                f"saved on {moved_from}, resumed on {world.device.type}: normal directions differ in their last bits, so {len(records)} "
                "steps of the journal are taken again (zo.directions=rademacher has the same on both)"
            )
        return []
    per_epoch = steps_per_epoch(cfg, index, tasks[state.task])
    state.epoch, state.batch = divmod(state.epoch * per_epoch + state.batch + len(records), per_epoch)
    state.step += len(records)
    return records


def whole_steps(folder: Path, state: TrainState) -> list[dict[str, Any]]:
    """Return the journal's records of this task after the state's step, up to the first of which metrics.jsonl has no line.

    A power cut may leave more of one file than of the other.
    """
    measured = {record.get("step") for record in read_lines(folder / METRICS) if record.get("kind") == "step"}
    records = itertools.takewhile(lambda record: record["step"] in measured, journal.read_after(folder, state.step))
    return [record for record in records if record["task"] == state.task]  # an evaluation lies between two tasks


def save(
    run: RunFolder, state: TrainState, step: HybridStep, log: RunLog, records: UnitRecords, zero_shot: dict[int, float], must: bool = False
) -> None:
    """Wait for the disk to have the log, write the units' records, then a checkpoint. All ranks call this; rank 0 writes.

    On a full disk, where the log cannot be written either, the run goes on with the older checkpoint; the third failure in a row is raised,
    and the first where it `must` be saved.
    """
    tensors = step.state_dict(optimizers=state.epoch > 0 or state.batch > 0)  # a new task starts with fresh ones
    if not run.is_main:
        return
    extra = {"world_size": step.world.size, "device": step.world.device.type, "zero_shot": zero_shot}
    try:
        log.sync()
        records.flush()
        checkpoint.save(run.path, state.step, tensors, {**state.to_dict(), **extra}, keep=run.settings.keep)
        run.failed_saves = 0
    except OSError as error:
        run.failed_saves += 1
        if must or run.failed_saves >= PATIENCE:
            raise
        words = f"step {state.step} could not be saved: {error}; going on, with the older checkpoint whole"
        warnings.warn(words, RuntimeWarning, stacklevel=2)  # which, other than print, bears that a log cannot be written either


def requeue(run: RunFolder, world: World) -> NoReturn:
    """Leave the run, saved, with word that it wants to be started again. All ranks call this."""
    run.request_requeue()
    world.barrier()  # rank 0 saves: a launcher that ends because its ranks have left may take the others with it
    raise Requeued(str(run.path))


def state_zero_shot(saved: checkpoint.Checkpoint | None) -> dict[int, float]:
    return {int(task): value for task, value in (saved.state["zero_shot"] if saved else {}).items()}


def training_steps(
    cfg: Config, step: HybridStep, loader: Loader, task: Task, world: World, state: TrainState, log: RunLog
) -> Iterator[tuple[Batch, Key, float]]:
    """Yield this rank's part of every global batch left in the task, with the step's key and learning rate. All ranks call this."""
    if not step.learns:
        return
    shared: dict[str, Any] = {
        "batch_size": cfg.train.batch_size,
        "seed": state.run_seed,
        "rank": world.data_rank,
        "size": world.data_size,
        "transform": TrainTransform(step.towers.image_size),
        "without": not_trained_on(cfg, loader.index, task),
    }
    per_epoch = steps_per_epoch(cfg, loader.index, task)
    steps = min(cfg.train.epochs * per_epoch, cfg.train.max_steps or sys.maxsize)
    if state.epoch == state.batch == 0 and steps < 2 * cfg.train.warmup_steps:
        log.say(f"task {task.index + 1}: {steps} steps are few for train.warmup_steps={cfg.train.warmup_steps}")
    # Rank 0 draws the seeds of the task's steps; the others learn them here.
    seeds = world.broadcast(
        torch.tensor([derive_seed(state.run_seed, "step", task.index, k) for k in range(steps)]), f"the seeds of task {task.index + 1}"
    )
    while (done := state.epoch * per_epoch + state.batch) < steps:
        batches = loader.train(task, epoch=state.epoch, start=state.batch, **shared)
        total = min(per_epoch, steps - state.epoch * per_epoch)
        described = f"task {task.index + 1}" + (f" epoch {state.epoch + 1}/{cfg.train.epochs}" if cfg.train.epochs > 1 else "")
        left = itertools.islice(batches, total - state.batch)
        for batch in log.progress(left, total=total, completed=state.batch, description=described):
            yield batch, Key(int(seeds[done]), state.step), warmup_cosine(done, steps, cfg.first_order.lr, cfg.train.warmup_steps)
            done += 1
        state.next_epoch()


def steps_per_epoch(cfg: Config, index: Index, task: Task) -> int:
    return math.ceil((index.count("train", task.classes) - len(not_trained_on(cfg, index, task))) / cfg.train.batch_size)


def not_trained_on(cfg: Config, index: Index, task: Task) -> list[SampleId]:
    """Return the training images that are held out, to be evaluated on; none by default."""
    return held_out(index.sizes("train", task.classes), cfg.eval.holdout, cfg.data.split_seed)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a rank's part of a global batch into micro-batches that share its count; the same number on every rank."""
    if parts == 1:
        return [batch]
    cuts = [len(batch.labels) * k // parts for k in range(parts + 1)]
    return [
        Batch(batch.images[a:b], batch.labels[a:b], batch.positions[a:b], batch.count if k == 0 else 0, batch.index, batch.samples[a:b])
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]


def evaluate(cfg: Config, towers: TwoTowers, loader: Loader, tasks: TaskStream, task: Task, world: World, progress: Progress) -> list:
    """Return (correct, total) per class: of the classes seen, among those seen; of the next task's, among those and the seen."""
    seen = tasks.seen(task.index)
    ahead = tasks.seen(min(task.index + 1, len(tasks) - 1))
    counts = count(
        cfg, towers, loader, ahead, [len(seen.classes), len(ahead.classes)], world, progress, f"evaluation after task {task.index + 1}"
    )
    return counts[0][: len(seen.classes)] + counts[1][len(seen.classes) :]


def evaluate_untrained(cfg: Config, towers: TwoTowers, loader: Loader, tasks: TaskStream, world: World, log: RunLog) -> dict[int, float]:
    """Return A_t of the untrained model, zero-shot CLIP, for every task t."""
    if not cfg.eval.zero_shot:
        return {}
    prefixes = [len(tasks.seen(t).classes) for t in range(len(tasks))]
    counts = count(cfg, towers, loader, tasks.seen(len(tasks) - 1), prefixes, world, log.progress, "zero-shot evaluation")
    accuracy = {
        t: sum(c for c, _ in row[:n]) / max(1, sum(k for _, k in row[:n])) for t, (n, row) in enumerate(zip(prefixes, counts, strict=True))
    }
    log.say(f"zero-shot accuracy in %: Last {100 * accuracy[len(tasks) - 1]:.2f}, Avg {100 * sum(accuracy.values()) / len(accuracy):.2f}")
    return accuracy


def count(
    cfg: Config, towers: TwoTowers, loader: Loader, task: Task, prefixes: list[int], world: World, progress: Progress, described: str
) -> list:
    """Return [prefix][class] -> (correct, total) over the test images of a task's classes. All ranks call this."""
    world.collectives.where = f"the {described}"
    transform = (TrainTransform if cfg.eval.train_transform else TestTransform)(towers.image_size)
    kept = not_trained_on(cfg, loader.index, task)
    share: dict[str, int] = {"batch_size": cfg.eval.batch_size, "rank": world.rank, "size": world.size}
    batches = loader.test(task.classes, transform=transform, held_out=kept, **share)
    noise = Key(derive_seed(cfg.seed, "eval", task.index), 0) if getattr(cfg.adapter, "noise_at_eval", False) else None
    shown = progress(batches, total=batches.num_batches, description=described)
    return count_correct(towers, shown, task.names, prefixes, world, noise).tolist()


def introduce(log: RunLog, cfg: Config, world: World, step: HybridStep, tasks: TaskStream, index: Index) -> None:
    """Print what is about to run: who learns how, on what."""
    units = step.towers.units
    by_order = {o: sum(units[u].numel for u in units if step.orders[u] is o) for o in Order}
    log.table("orders: 1 first (back-propagation), 0 zeroth (loss differences), - frozen", ["branch", "layers"], describe(step.orders))
    log.say(
        f"{cfg.model.name}: {by_order[Order.FIRST]:,} parameters learn by first order, {by_order[Order.ZEROTH]:,} by zeroth "
        f"({cfg.zo.name}), {by_order[Order.FROZEN]:,} adapter parameters stay\n"
        f"{index.name}: {len(tasks)} tasks, {index.count('train'):,} training images; "
        f"{world.size} x {world.device.type} ({world.engine}), global batch {cfg.train.batch_size}"
        + (f" in {world.data_size} parts, {world.direction_groups} direction groups" if world.direction_groups > 1 else "")
    )


def log_step(
    log: RunLog, state: TrainState, report: StepReport, key: Key, lr: float, seconds: float, batch: Batch, peak_gib: float | None
) -> None:
    """Record a step in metrics.jsonl, with sizes of projected gradients, and in journal.jsonl, with all that a replay needs."""
    zo = {m.group.name: {"projected_gradient": mean(m.sizes.values()), "coefficient": m.coefficient} for m in report.moves}
    log.step(
        {
            "step": state.step,
            "task": state.task,
            "loss": report.loss,
            "lr": lr,
            "gradient_norm": report.gradient_norm,
            "zo": zo,
            "seconds": seconds,
            "data_seconds": batch.waited_s,
            "images_per_second": report.count / seconds,
            **({} if peak_gib is None else {"peak_gib": peak_gib}),
        }
    )
    if report.count < batch.count:
        log.note(f"step {state.step}: {batch.count - report.count} damaged samples were left out", state.step, state.task)
    if report.skipped:
        log.note(f"step {state.step} was skipped: {report.skipped}", state.step, state.task)
    log.journal(
        {"step": state.step, "task": state.task, "seed": key.seed, "lr": lr, "moves": [move.record() for move in report.moves]}
    )  # last: the step is now on record


def sizes_by_unit(step: HybridStep, moves: Sequence[Move]) -> list[float | None]:
    """Return the size of the projected gradient that moved each unit last, in the units' order; None where none did."""
    sizes: dict[UnitId, float] = {}
    for move in moves:
        for branch, part in move.group.slices.items():
            own = step.flats[branch].slices.items()
            sizes |= {id: move.sizes[branch] for id, place in own if part.start <= place.start < part.stop}
    return [sizes.get(id) for id in step.towers.units]


def farewell(cfg: Config, log: RunLog, run: RunFolder, world: World) -> None:
    """Write pictures and a page about the run, and say where to look."""
    if world.is_main:
        replace_file(run.path / "summary.md", summarize_run(run.path))
        if cfg.run.plots:
            plot_run(run.path)
    pictures = f" and {run.path}/plots/*.png" if cfg.run.plots else ""
    log.say(
        f"Done. Look at {run.path}/summary.md{pictures}; every step is in {run.path}/metrics.jsonl.\n"
        "Next: compare with first order alone (orders=first), the untrained model (orders=zero_shot), or the same units not trained\n"
        "(orders.order=frozen); then your own images: python -m dist_vlcl.commands.build_data data=folder data.name=NAME data.source=FOLDER"
    )


def main() -> None:
    """Run the command line. Exit status 0 also after a requeue: a marker file in the run's folder says so."""

    def work(cfg: Config) -> None:
        world = World.alone()
        try:
            world = World.from_environment(cfg.cluster)
            train(cfg, world)
        except Requeued as stopped:
            if world.is_main:
                report_status("requeue")
                print(f"saved and stopped on a signal; the same command goes on from here ({stopped.path}/REQUEUE marks it)")
        except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
            world.collectives.stopped(error)  # the others are waiting for this rank, and can then say why it is gone
            is_damage = isinstance(error, ShardError) and not isinstance(error, UnreadShard)  # which one rank alone may have met
            if is_damage or (world.is_main and isinstance(error, FloatingPointError | ValueError)):
                # Another start would end the same way; but for one that Slurm has made while ranks on a lost node still run.
                report_status("requeue" if isinstance(error, RunBusy) and is_restart() else "failed")
            if cfg.cluster.traceback:
                raise
            # Any rank may be the one that knows; cluster.traceback=true shows where.
            print(f"error on rank {world.rank} of {world.size}: {masked(str(error))}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        finally:
            world.close()

    hydra_main(work)


if __name__ == "__main__":
    main()

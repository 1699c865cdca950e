"""One start of a run: its position, what it records, and how it saves, resumes and ends."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any, NoReturn

import torch
from torch import Tensor

from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.data.tasks import Task
from dist_vlcl.dist.agree import ReplicaDivergedError, agree, agree_on_tensors, digest
from dist_vlcl.experiment import Experiment, PlannedStep
from dist_vlcl.orders import Order, describe
from dist_vlcl.run import checkpoint
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.folder import RunFolder
from dist_vlcl.run.log import RunLog, journalled_steps
from dist_vlcl.run.signals import report_status
from dist_vlcl.run.state import TrainState
from dist_vlcl.run.unit_records import UnitRecords
from dist_vlcl.step import HybridStep, StepReport
from dist_vlcl.zo.update import Move


class Requeued(Exception):
    """The run was asked to stop, has saved its state, and waits to be started again. The text is its folder."""


class Session:
    """One start of a run: its state, log and unit records. Every rank has one and calls every method; rank 0 writes."""

    def __init__(self, experiment: Experiment, step: HybridStep, folder: RunFolder, initial_adapters: Mapping[str, Tensor]):
        """Load the newest checkpoint and the journal's steps after it, and open the log and the unit records at that position.

        `initial_adapters`: the adapters that a run without a checkpoint starts from; {} for new ones.
        """
        self.experiment, self.step, self.folder = experiment, step, folder
        self.cfg, self.world, self.tasks = experiment.cfg, experiment.world, experiment.tasks
        world = self.world
        saved = world.on_main(lambda: checkpoint.load_newest(folder.path, folder.identity), "the checkpoint")
        self.state = TrainState.from_dict(saved.state) if saved else TrainState()
        if getattr(self.cfg.adapter, "init", None) and not saved and not initial_adapters:
            raise ValueError(f"{folder.path} has no intact checkpoint, and began with adapter.init: move it away to start anew")
        self.is_resumed = saved is not None
        self.tensors = saved.tensors if saved else {f"adapters/{name}": t for name, t in initial_adapters.items()}
        self.notes: list[str] = []  # what differs between this start and those before
        self.journalled = self._read_journal()
        threads = torch.get_num_threads() if world.device.type == "cpu" else 0
        for what, was, now in (("ranks", self.state.world_size, world.size), ("CPU threads per rank", self.state.threads, threads)):
            if saved and was and now and was != now:
                self.notes.append(f"resuming with {now} {what} what {was} have computed: the same batches, sums are rounded differently")
        self.state.world_size, self.state.threads = world.size, threads
        self.notes.append(folder.message + (f", after step {self.state.step}" if self.state.step else ""))
        self.accuracy = experiment.accuracy(self.state.accuracy)
        self.agreed_step = self.state.step  # the last step after which the ranks had the same adapters
        self.log = RunLog(folder.path, self.cfg.run, world, self.cfg.as_dict(), self.state)
        units = [(id.branch, id.layer, step.orders[id].value, unit.numel) for id, unit in step.towers.units.items()]
        self.records = UnitRecords(folder.path, units, self.cfg.run.record_every_steps, self.state.step, world.is_main)
        self.log.say("\n".join(self.notes))
        if world.is_main:
            replace_file(folder.path / "classes.json", json.dumps([task.names for task in self.tasks], ensure_ascii=False) + "\n")
            report_status("training")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.step.first.end()
        self.log.close()
        self.folder.close()

    def describe(self) -> None:
        """Print what is going to run: which units learn by which order, on which data."""
        cfg, world, index, orders = self.cfg, self.world, self.experiment.index, self.step.orders
        numel = {order: sum(unit.numel for id, unit in self.step.towers.units.items() if orders[id] is order) for order in Order}
        if (alone := [t.index + 1 for t in self.tasks if len(t.classes) == 1]) and self.step.learns and cfg.model.loss != "sigmoid":
            self.log.say(f"warning: task {alone[0]} has one class, so its loss is 0 and it is not learned; choose another tasks.increment")
        groups = f" in {world.data_size} parts, {world.direction_groups} direction groups" if world.direction_groups > 1 else ""
        epochs = sorted(set(map(self.experiment.num_epochs, self.tasks)))
        self.log.say("orders: 1 first (back-propagation), 0 zeroth (loss differences), - frozen")
        self.log.table("", ["branch", "layers"], describe(orders))
        self.log.say(
            f"{cfg.model.name}: {numel[Order.FIRST]:,} parameters learn by first order, {numel[Order.ZEROTH]:,} by zeroth order "
            f"({cfg.zo.name}), {numel[Order.FROZEN]:,} adapter parameters are frozen\n"
            f"{index.name}: {len(self.tasks)} {'task' if len(self.tasks) == 1 else 'tasks'}, {index.count('train'):,} training images; "
            f"{world.size} x {world.device.type} ({world.engine}), global batch {self.experiment.batch_size}{groups}, "
            f"epochs {epochs[0]}{f' to {epochs[-1]}' * (len(epochs) > 1)}"
        )

    def evaluate_untrained(self) -> None:
        """Measure the zero-shot accuracy, unless an earlier start has."""
        if self.state.task or self.is_resumed or not self.cfg.eval.zero_shot:
            return
        self.state.zero_shot = self.experiment.evaluate_untrained(self.log.progress)
        percent = [100 * accuracy for accuracy in self.state.zero_shot.values()]
        self.log.say(f"zero-shot accuracy in %: Last {percent[-1]:.2f}, Avg {mean(percent):.2f}")

    def tasks_left(self) -> list[Task]:
        """Return the tasks that are not finished."""
        return self.tasks[self.state.task :]

    def begin(self, task: Task) -> None:
        """Prepare the step for a task; after a resume also restore its tensors and repeat the journal's steps."""
        self.step.begin(task.names)
        is_start = self.tensors and not self.is_resumed
        if self.tensors:
            self.step.load_state_dict(self.tensors)
            self.tensors = {}
        if self.journalled:
            self.step.replay(self.journalled)
            agree(self.world, {"the adapters rebuilt from the journal": digest(self.step.towers.units.state_dict())})
            self.log.say(f"{len(self.journalled)} steps after the checkpoint were restored from the journal")
            self.journalled = []
        if is_start:
            self.save()  # so that a resume does not read adapter.init again

    def steps_left(self, task: Task) -> Iterator[PlannedStep]:
        """Yield the steps that are left in a task; none if no unit learns."""
        return iter(self.experiment.batches(task, self.state, self.log.progress) if self.step.learns else ())

    def is_time_to_save(self) -> bool:
        """Whether a checkpoint is due after this step."""
        every = self.cfg.run.save_every_steps
        return every > 0 and self.state.step % every == 0

    def any_rank(self, is_so: bool) -> bool:
        """Whether something is true on any rank, the same answer on every rank."""
        return bool(self.world.sum_exact(torch.tensor([int(is_so)]), "requests to stop")[0] > 0)

    def record(self, planned: PlannedStep, report: StepReport) -> None:
        """Count a step that was taken, and write it to metrics.jsonl, to the unit records and, last, to journal.jsonl."""
        state, seconds = self.state, time.perf_counter() - planned.started
        state.advance()
        state.seconds += seconds
        zo = {m.group.name: {"projected_gradient": mean(m.slope_sizes.values()), "coefficient": m.coefficient} for m in report.moves}
        place = {"step": state.step, "task": state.task}
        result = {"loss": report.loss, "lr": planned.lr, "gradient_norm": report.gradient_norm, "zo": zo}
        times = {"seconds": seconds, "data_seconds": planned.batch.waited_s, "images_per_second": report.count / seconds}
        self.log.step({**place, **result, **times, **self.world.take_peaks_gib()})
        if report.skipped:
            self.log.note(f"step {state.step} was skipped: {report.skipped}", **place)
        if report.unit_statistics is not None:
            self.records.add(state.step, state.task, report.unit_statistics, sizes_by_unit(self.step, report.moves))
        drawn = {"seed": planned.key.seed, "lr": planned.lr, "device": self.world.device.type}
        self.log.journal({**place, **drawn, "moves": [move.record() for move in report.moves]})

    def compare_ranks(self) -> None:
        """Raise ReplicaDivergedError, naming rank and tensor, unless all ranks have the same adapters.

        After an error the journal ends at the last step with equal adapters: later lines may come from the losses of the other rank.
        """
        try:
            agree_on_tensors(self.world, f"the adapters after step {self.state.step}", self.step.adapters())
        except ReplicaDivergedError:
            self.log.truncate_after(self.agreed_step)
            raise
        self.agreed_step = self.state.step

    def save(self) -> None:
        """Compare the ranks, wait until the disk has the log, then write the unit records and a checkpoint.

        Raises OSError on a full disk; the older checkpoint is then still there.
        """
        self.compare_ranks()
        state = self.state
        tensors = self.step.state_dict(optimizers=state.epoch > 0 or state.batch > 0)  # a new task begins with fresh optimisers
        if self.world.is_main:
            self.folder.check_owner()
            self.log.sync()
            self.records.flush()
            checkpoint.save(self.folder.path, state.step, tensors, asdict(state), self.cfg.run.keep, self.folder.identity)

    def finish(self, task: Task) -> None:
        """Evaluate after a task, write the accuracy, and save."""
        self.accuracy.append(self.experiment.evaluate(task, self.log.progress))
        self.state.accuracy = self.accuracy.rows
        summary = self.accuracy.summary()
        self.log.task({"step": self.state.step, "task": task.index, **summary, "zero_shot": self.state.zero_shot.get(task.index)})
        self.folder.write_accuracy({**summary, "rows": self.accuracy.rows})
        self.state.next_task()
        self.save()

    def requeue(self) -> NoReturn:
        """Leave the marker that the run waits to be started again, and raise Requeued."""
        self.folder.request_requeue()
        self.world.barrier()  # rank 0 saves: a launcher whose ranks have left may end the others
        raise Requeued(self.folder.path)

    def complete(self) -> AccuracyMatrix:
        """Write the plots and the final accuracy; return it."""
        path, plots = self.folder.path, self.cfg.run.plots
        if self.world.is_main and plots:
            from dist_vlcl.report.figures import plot_run  # matplotlib takes a second to import, and only rank 0 needs it

            plot_run(path)
        self.log.say(
            f"Done. See {path}/accuracy.json{f' and {path}/plots/*.png' if plots else ''}; every step is in {path}/metrics.jsonl.\n"
            f"Compare runs: dist-vlcl report runs/*; classify images: dist-vlcl predict {path} IMAGE"
        )
        trained = sum(map(self.experiment.num_trained, self.tasks)) if self.step.learns else 0
        ended = {"zero_shot": self.state.zero_shot, "seconds": self.state.seconds, "steps": self.state.step, "train_images": trained}
        self.folder.write_accuracy({**self.accuracy.summary(), "rows": self.accuracy.rows, **ended}, complete=True)
        return self.accuracy

    def _read_journal(self) -> list[dict[str, Any]]:
        """Return the journal's steps of this task after the checkpoint, and count them in the state.

        Empty if first-order units learn, since the journal does not know their updates: these steps are taken again. With normal directions
        it ends at the first step of another device type, since their last bits differ between devices.
        """
        state, folder, device = self.state, self.folder, self.world.device.type
        if not self.tasks_left():
            return []
        found = self.world.on_main(lambda: journalled_steps(folder.path, state), "the journal")
        if self.step.first.parameters:
            if found:
                self.notes.append(f"{len(found)} steps after the checkpoint are taken again: first-order updates are not in the journal")
            return []
        is_exact = self.cfg.zo.directions == "rademacher"
        records = list(itertools.takewhile(lambda record: is_exact or record.get("device") == device, found))
        if len(records) < len(found):
            first = found[len(records)]
            where = f"the steps from {first['step']} on were taken on {first.get('device', 'another device')}, this start is on {device}"
            self.notes.append(f"{where}: they are taken again, since normal directions differ in their last bits")
        per_epoch = self.experiment.steps_per_epoch(self.tasks[state.task])
        state.epoch, state.batch = divmod(state.epoch * per_epoch + state.batch + len(records), per_epoch)
        state.step += len(records)
        state.seconds += sum(record["seconds"] for record in records)
        return records


def sizes_by_unit(step: HybridStep, moves: list[Move]) -> list[float | None]:
    """Return the size of the projected gradient that moved each unit, in the order of the units; None for a unit that did not move."""
    sizes = {id: m.slope_sizes[b] for m in moves for b, part in m.group.slices.items() for id in step.flats[b].units_in(part)}
    return [sizes.get(id) for id in step.towers.units]

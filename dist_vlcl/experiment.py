"""What a configuration describes: data, tasks, model, training batches and evaluation. Training and `commands.evaluate` share it."""

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_vlcl.config import Config
from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.continual.metrics import AccuracyMatrix, Counts, SetsMatrix
from dist_vlcl.data.images import encoded
from dist_vlcl.data.loader import Batch, Loader
from dist_vlcl.data.names import class_order, paper_order, prompt_names
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import OF_THE_BUILD, Index, decode, open_sets
from dist_vlcl.data.tasks import SampleId, Task, TaskStream, generator, held_out
from dist_vlcl.data.transforms import EvalTransform, TrainTransform
from dist_vlcl.dist.agree import agree, digest
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import TwoTowers, build_clip, unit_ids
from dist_vlcl.orders import assign
from dist_vlcl.reading import warn
from dist_vlcl.run.environment import code_digest, package_versions
from dist_vlcl.run.state import TrainState
from dist_vlcl.schedule import warmup_cosine
from dist_vlcl.zo.noise import Key, derive_seed

Progress = Callable[..., Iterable[Any]]  # shows how far an iterable is, such as RunLog.progress


@dataclass
class PlannedStep:
    """One step before it is taken."""

    batch: Batch  # this rank's part of the global batch
    key: Key  # the same on every rank
    lr: float
    started: float = field(default_factory=time.perf_counter)

    def micro_batches(self, parts: int) -> list[Batch]:
        """Cut this rank's part into micro-batches, the same number on every rank. The first one carries the count of all."""
        batch, cuts = self.batch, [len(self.batch.labels) * k // parts for k in range(parts + 1)]
        return [replace(batch.cut(a, b), count=0 if k else batch.count) for k, (a, b) in enumerate(itertools.pairwise(cuts))]


@dataclass
class Experiment:
    """Data, tasks and model of a configuration, on this rank."""

    cfg: Config
    world: World
    index: Index
    tasks: TaskStream
    loader: Loader
    towers: TwoTowers  # with fresh adapters
    code: str  # a digest

    @classmethod
    def open(cls, cfg: Config, world: World) -> "Experiment":
        """Open the data and build the model. All ranks call this.

        Raises ValueError for a plan that the model cannot have, before any data is read, and DisagreementError if the ranks have different
        configurations, data or code.
        """
        assign(unit_ids(cfg.model), cfg.orders)
        index, tasks = open_tasks(cfg, world)
        code = code_digest()
        facts = {"configuration": cfg.as_dict(), "the data set": index.fingerprint, "the code": code, "packages": package_versions()}
        agree(world, facts, "Start every rank with the same command and the same files.")
        towers = build_towers(cfg, world)
        inputs = {"prompts": towers.prompts(tasks.seen(len(tasks) - 1).names), "image": transformed_sample(towers.image_size)}
        agree(world, {"the model's inputs": {name: digest({name: value}) for name, value in inputs.items()}}, "Install the same packages.")
        return cls(cfg, world, index, tasks, Loader(index, cfg.data, world.device), towers, code)

    @property
    def batch_size(self) -> int:
        """Return the number of samples in a global batch."""
        return self.cfg.train.batch_size or fitted_batch_size(self.index.count("train") / self.tasks.whole_length)

    def num_steps(self, task: Task) -> int:
        """Return the number of steps of a task."""
        return min(self.num_epochs(task) * self.steps_per_epoch(task), self.cfg.train.max_steps or sys.maxsize)

    def num_trained(self, task: Task) -> int:
        """Return the number of images that a task is trained on."""
        return self.index.count("train", task.classes) - len(held_out_samples(self.cfg, self.index, task))

    def steps_per_epoch(self, task: Task) -> int:
        """Return the number of global batches in one epoch of a task."""
        return math.ceil(self.num_trained(task) / self.batch_size)

    def num_epochs(self, task: Task) -> int:
        """Return the passes over a task's training samples: train.epochs, or as many as give at least 100 steps."""
        return self.cfg.train.epochs or math.ceil(100 / self.steps_per_epoch(task))

    def batches(self, task: Task, state: TrainState, progress: Progress) -> Iterable[PlannedStep]:
        """Return the steps that are left in a task. They advance the state's epoch; the caller advances its batch. All ranks call this."""
        total, done = self.num_steps(task), state.epoch * self.steps_per_epoch(task) + state.batch
        return progress(self._steps(task, state), total=total, completed=done, description=f"task {task.index + 1}/{len(self.tasks)}")

    def _steps(self, task: Task, state: TrainState) -> Iterator[PlannedStep]:
        cfg, world = self.cfg, self.world
        steps, per_epoch = self.num_steps(task), self.steps_per_epoch(task)
        warmup = steps // 10 if cfg.train.warmup_steps is None else cfg.train.warmup_steps
        # Rank 0 draws the seeds of the task's steps and sends them once.
        seeds = world.on_main(lambda: [derive_seed(cfg.seed, "step", task.index, k) for k in range(steps)], "the seeds of a task")
        options: dict[str, Any] = {"batch_size": self.batch_size, "rank": world.data_rank, "size": world.data_size}
        options |= {"transform": TrainTransform(self.towers.image_size), "without": held_out_samples(cfg, self.index, task)}
        while (done := state.epoch * per_epoch + state.batch) < steps:
            batches = self.loader.train(task, seed=cfg.seed, epoch=state.epoch, start=state.batch, **options)
            for batch in itertools.islice(batches, steps - done):
                yield PlannedStep(batch, Key(seeds[done], state.step), warmup_cosine(done, steps, cfg.first_order.lr, warmup))
                done += 1
            state.next_epoch()

    def evaluate(self, task: Task, progress: Progress = lambda batches, **_: batches, described: str = "") -> Counts:
        """Return the counts over the test samples of the classes seen, classified among these. All ranks call this.

        With several data sets the samples of every set are classified among the classes of that set.
        """
        together = self.tasks if self.cfg.tasks.sets else [self.tasks.seen(task.index)]
        described = described or f"evaluation after task {task.index + 1}"
        return [counts for one in together for counts in self.count(one, [len(one.classes)], described, progress)[0]]

    def evaluate_untrained(self, progress: Progress = lambda batches, **_: batches) -> dict[int, float]:
        """Return the zero-shot accuracy (a fraction) on the classes seen up to each task; its mean over several data sets.

        All ranks call this.
        """
        described, all_seen = "zero-shot evaluation", [self.tasks.seen(task.index) for task in self.tasks]
        if self.cfg.tasks.sets:
            rows = [self.evaluate(self.tasks[-1], progress, described)] * len(self.tasks)
        else:
            rows = self.count(all_seen[-1], [len(seen.classes) for seen in all_seen], described, progress)
        accuracy = self.accuracy(rows)
        return {task: accuracy.seen(task) for task in range(len(self.tasks))}

    def accuracy(self, rows: Sequence[Sequence[Sequence[int]]]) -> AccuracyMatrix:
        """Return the accuracy matrix with these rows, which may come from JSON."""
        own = [[(right, total) for right, total in row] for row in rows]
        return (SetsMatrix if self.cfg.tasks.sets else AccuracyMatrix)([len(task.classes) for task in self.tasks], own)

    def count(self, task: Task, prefixes: Sequence[int], described: str, progress: Progress = lambda batches, **_: batches) -> list[Counts]:
        """Return the counts over the test samples of a task's classes for each prefix: when only its first classes can be chosen.

        All ranks call this.
        """
        cfg, world, size = self.cfg, self.world, self.towers.image_size
        world.collectives.where = f"the {described}"
        transform = TrainTransform(size) if cfg.eval.train_transform else EvalTransform(size, *self.towers.resizing)
        options: dict[str, Any] = {"batch_size": cfg.eval.batch_size, "rank": world.rank, "size": world.size}
        batches = self.loader.test(task.classes, transform=transform, held_out=held_out_samples(cfg, self.index, task), **options)
        noise = Key(derive_seed(cfg.seed, "eval", task.index), 0) if getattr(cfg.adapter, "noise_at_eval", False) else None
        shown = progress(batches, total=len(batches), description=described)
        return count_correct(self.towers, shown, task.names, prefixes, world, noise).tolist()


def fitted_batch_size(images: float) -> int:
    """Return a power of two, 8 to 128, for 8 to 16 batches an epoch if these bounds allow it. images: of a task, mean over all tasks."""
    return min(128, max(8, 2 ** int(math.log2(max(1, images / 8)))))


def transformed_sample(size: int) -> torch.Tensor:
    """Return a made-up JPEG as the model would see it: `[3, size, size]`. Its bits depend on the image libraries of this machine."""
    pixels = (torch.arange(48 * 64 * 3) * 7919 % 251).to(torch.uint8).view(48, 64, 3).numpy()
    return EvalTransform(size)(decode(encoded(pixels, "JPEG"), "a sample"), generator())


def open_tasks(cfg: Config, world: World) -> tuple[Index, TaskStream]:
    """Return the index of the shards, which rank 0 builds if it can, and the tasks. All ranks call this and raise rank 0's error."""
    world.on_main(lambda: bool(open_sets(cfg.data, cfg.tasks.sets)), "the data set as rank 0 finds it")
    index, sizes = open_sets(cfg.data, cfg.tasks.sets)
    given = [name for name in OF_THE_BUILD if getattr(cfg.data, name) != getattr(DataConfig, name)]
    if world.is_main and (unread := [name for name in given if name != "split_seed" or not cfg.eval.holdout]):
        warn(f"data.{unread[0]} has no effect here: it counts when shards are written, by dist-vlcl data. These are in {index.location}")
    order = class_order(cfg.tasks.order, len(index.class_names), paper_order(index.reader))
    names = prompt_names(index.class_names, cfg.data.underscore_names)
    tasks = TaskStream(names, sizes or cfg.tasks.increment, order, cfg.tasks.base, cfg.tasks.num_tasks)
    counts = Counter(sample.class_id for task in tasks for sample in held_out_samples(cfg, index, task))
    if untrained := [index.class_names[c] for c, count in counts.items() if count == index.count("train", [c])]:
        raise ValueError(f"eval.holdout={cfg.eval.holdout:g}: no training image of {untrained[0]} is left; give less, or two of each class")
    return index, tasks


def build_towers(cfg: Config, world: World) -> TwoTowers:
    """Return CLIP with fresh adapters, the same on every rank and in every start. Raises ValueError for a precision without an engine."""
    if world.engine.startswith("zero") and cfg.model.precision != "fp32":
        raise ValueError(f"model.precision={cfg.model.precision}: DeepSpeed trains in fp32 only; use it, or launch with the engine ddp")
    return build_clip(cfg.model, cfg.adapter, seed=derive_seed(cfg.seed, "adapters")).to(world.device)


def held_out_samples(cfg: Config, index: Index, task: Task) -> list[SampleId]:
    """Return the training samples that are evaluated and not trained on (eval.holdout), others for each seed; none by default."""
    return held_out(index.sizes("train", task.classes), cfg.eval.holdout, cfg.data.split_seed + cfg.seed)

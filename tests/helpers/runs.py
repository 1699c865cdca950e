"""Run folders as the trainer writes them, made by the code that the trainer uses, with results that the caller chooses."""

import atexit
import functools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dist_vlcl.config import Config, compose_config
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import open_index
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import fitted_batch_size
from dist_vlcl.model.statistics import STATISTICS
from dist_vlcl.model.units import UnitId
from dist_vlcl.options import BRANCHES
from dist_vlcl.orders import Order, assign
from dist_vlcl.run.folder import RunFolder
from dist_vlcl.run.log import RunLog
from dist_vlcl.run.state import TrainState
from dist_vlcl.run.unit_records import UnitRecords

# A short real run for tests of commands that start runs: zeroth order alone, in the last block, ten steps of handwritten digits.
QUICK_RUN = ["tasks.num_tasks=1", "train.epochs=2", "train.batch_size=60", "train.warmup_steps=2", "cluster.threads=1"]
QUICK_RUN += ["run.progress=false", "run.plots=false", "run.record_every_steps=0"]
QUICK_RUN += ["eval.zero_shot=false", "orders.layers=[12]", "orders.rest=frozen"]

NUMEL = {"vision": 201344, "language": 134272}  # parameters of a unit of ViT-B/16

# Number of classes, training and test images per class.
CLASSES = {"cifar100": (100, 500, 100), "tiny_imagenet": (200, 500, 50), "imagenet_r": (200, 120, 30), "digits": (10, 144, 36)}
UNITS = [UnitId(branch, layer) for branch in ("language", "vision") for layer in range(1, 13)]


@functools.cache
def digits_root() -> str:
    """Return a `data.root` with the shards of the handwritten digits, which a process of tests builds once."""
    root = tempfile.mkdtemp(prefix="digits-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    open_index(DataConfig(root=root))
    return root


def write_run(
    root: Path,
    *overrides: str,
    last: float,
    avg: float,
    zero_shot: float | None = None,
    num_tasks_done: int | None = None,
    test_images: int | None = None,
    records: bool = False,
    peak_gib: float | None = None,
) -> Path:
    """Write a run whose A_t falls in a line to `last`, with mean `avg` (fractions); return its folder.

    zero_shot: A_T of the model before training. num_tasks_done: stop the run after so many tasks. test_images: per class, if not all.
    records: also write the losses of all steps and the statistics of all units. peak_gib: memory of every step.
    """
    cfg = compose_config([*overrides, f"run.root={root}", "run.trackers=[]"])
    num_classes, train_images, whole = CLASSES[cfg.data.name]
    sizes = [cfg.tasks.increment] * (cfg.tasks.num_tasks or num_classes // cfg.tasks.increment)
    num_images = cfg.tasks.increment * train_images
    steps = math.ceil(num_images / (cfg.train.batch_size or fitted_batch_size(num_images))) * (cfg.train.epochs or 1)
    learns = "first" in map(cfg.orders.rest_of, BRANCHES) or cfg.orders.order == "zeroth"
    run, log = _open(cfg)
    accuracy = AccuracyMatrix(sizes)
    for task in range(num_tasks_done or len(sizes)):
        if records and learns:
            _log_steps(log, cfg, task, steps, peak_gib)
        share = (len(sizes) - 1 - task) / max(1, len(sizes) - 1)
        accuracy.append(_counts(last + 2 * share * (avg - last), sum(sizes[: task + 1]), test_images or whole))
        log.task({"step": (task + 1) * steps, "task": task, **accuracy.summary()})
        run.write_accuracy({**accuracy.summary(), "rows": accuracy.rows})
    if not num_tasks_done:
        before = {} if zero_shot is None else {t: zero_shot + 0.02 * (len(sizes) - 1 - t) for t in range(len(sizes))}
        end = {"zero_shot": before, "seconds": 1.0, "steps": len(sizes) * steps if learns else 0}
        run.write_accuracy({**accuracy.summary(), "rows": accuracy.rows, **end}, complete=True)
    if records and learns:
        _journal(log, cfg, len(accuracy.rows) * steps)
    log.close()
    run.close()
    if records and learns:
        _record_units(run.path, cfg, len(accuracy.rows), steps)
    return run.path


def _open(cfg: Config) -> tuple[RunFolder, RunLog]:
    run = RunFolder.open(cfg.run, cfg.as_dict(), World.alone())
    return run, RunLog(run.path, cfg.run, World.alone(), cfg.as_dict(), TrainState(), Console(quiet=True))


def _counts(accuracy: float, num_classes: int, of_class: int) -> list[tuple[int, int]]:
    """Return correct and total images per class, which give the accuracy together."""
    right = round(accuracy * num_classes * of_class)
    return [(right // num_classes + (k < right % num_classes), of_class) for k in range(num_classes)]


def _log_steps(log: RunLog, cfg: Config, task: int, steps: int, peak_gib: float | None) -> None:
    """Log losses that fall within a task, further if more units learn by first order."""
    noise = np.random.default_rng([cfg.seed, task, *cfg.run.name.encode()]).normal(size=steps)
    share = np.mean([order is Order.FIRST for order in assign(UNITS, cfg.orders).values()])
    for k in range(steps):
        loss = (1.6 + 0.02 * task) * (1 - (0.15 + 0.6 * share) * (1 - math.exp(-4 * k / steps))) * (1 + 0.08 * noise[k])
        peaks = {} if peak_gib is None else {"peak_gib": peak_gib, "allocated_gib": 0.8 * peak_gib}
        log.step({"step": task * steps + k + 1, "task": task, "loss": loss, **peaks})


def _slopes(cfg: Config, steps: int) -> dict[str, np.ndarray]:
    """Return the one slope of each branch in every step."""
    rng = np.random.default_rng([cfg.seed, *cfg.run.name.encode()])
    return {branch: np.abs(rng.normal(size=steps)) + 0.05 for branch in ("language", "vision")}


def _journal(log: RunLog, cfg: Config, steps: int) -> None:
    """Journal ordinary steps at a learning rate of 0.001; every eighth decision stays, and the step after it is mirrored."""
    slopes = _slopes(cfg, steps)
    branches = {unit.branch for unit, order in assign(UNITS, cfg.orders).items() if order is Order.ZEROTH}
    decides = cfg.zo.acceptance != "always" and not cfg.zo.random_signs
    for k in range(steps):
        share = {0: 0.0, 1: 1.0}.get(k % 8, -1.0) if decides else -1.0
        coefficient = share * 0.001 * (1.0 if cfg.zo.lr_scale == "auto" else cfg.zo.lr_scale)
        moves = [
            {"group": branch, "projected_gradient": {branch: [slopes[branch][k]]}, "coefficient": coefficient}
            | ({"losses": [1.0, 1.0, 1.0]} if decides else {})
            for branch in sorted(branches)
        ]
        log.journal({"step": k + 1, "task": 0, "seed": k, "lr": 0.001, "device": "cpu", "moves": moves})


def _record_units(folder: Path, cfg: Config, num_tasks: int, steps: int) -> None:
    """Record statistics of the expected sizes: the variance of an estimate is s^2, that of a gradient |g|^2 / n."""
    rng = np.random.default_rng([cfg.seed, *cfg.run.name.encode()])
    orders = assign(UNITS, cfg.orders)
    slopes = _slopes(cfg, num_tasks * steps)
    figures = np.empty((num_tasks * steps, len(UNITS), len(STATISTICS)), dtype=np.float32)
    for column, (unit, order) in enumerate(orders.items()):
        numel = NUMEL[unit.branch]
        size = (0.5 if unit.branch == "vision" else 0.25) * (1 + 0.1 * unit.layer) * rng.lognormal(0, 0.3, num_tasks * steps)
        norm = {Order.FIRST: size, Order.ZEROTH: slopes[unit.branch] * math.sqrt(numel), Order.FROZEN: np.full_like(size, np.nan)}[order]
        is_sign = cfg.zo.transform == "sign" and order is Order.ZEROTH
        moved = np.full_like(size, 1e-3 * math.sqrt(numel)) if is_sign else np.nan_to_num(1e-3 * norm)
        figures[:, column] = np.stack([norm, 0 * norm, norm**2 / numel, moved, 0 * moved, moved**2 / numel, np.ones_like(norm)], 1)
    units = [(unit.branch, unit.layer, order.value, NUMEL[unit.branch]) for unit, order in orders.items()]
    records = UnitRecords(folder, units, every=1, step=0)
    for step in range(num_tasks * steps):
        sizes = [slopes[unit.branch][step] if order is Order.ZEROTH else None for unit, order in orders.items()]
        records.add(step + 1, step // steps, torch.from_numpy(figures[step]), sizes)
    records.flush()

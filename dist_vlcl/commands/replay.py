"""Rebuild the zeroth-order units of a run from a checkpoint and the journal:  dist-vlcl replay runs/NAME

Repeats every zeroth-order update from the seeds and coefficients in journal.jsonl, without data and without a forward pass. If the run has
a checkpoint of the last step, compares bit for bit. Exit status: 0 if equal or nothing to compare with, 1 if different, 2 after an error.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from dist_vlcl.config import Config, errors_refused, load_config
from dist_vlcl.model.units import FlatTensors, UnitId
from dist_vlcl.orders import Order, assign
from dist_vlcl.reading import warn
from dist_vlcl.run import checkpoint
from dist_vlcl.run.checkpoint import Checkpoint
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.log import JOURNAL, read_journal
from dist_vlcl.saved import digest_of, read_config
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrder


def rebuild(folder: Path, stop: int | None = None, device: str = "cpu", options: Sequence[str] = ()) -> Checkpoint:
    """Return the zeroth-order units after step `stop` (default: the journal's last), starting from the newest checkpoint before it.

    The result has the path of that checkpoint. Raises ValueError if the run has no such units, if the journal has a gap before stop, or if
    every checkpoint is after stop.
    """
    cfg = load_config(folder / "config.yaml", options, places=())
    steps = checkpoint.saved_steps(folder)
    if not steps:
        raise ValueError(f"{folder}/checkpoints has no checkpoint of this version to start from")
    end = max((record["step"] for record in read_journal(folder, steps[0])), default=steps[0]) if stop is None else stop
    identity = {"config": digest_of(read_config(folder / "config.yaml"))}
    if (saved := checkpoint.load_newest(folder, identity, before=end + (end == steps[0]))) is None:  # of no steps: from the first one
        raise ValueError(f"{folder} has no intact checkpoint before step {end}; it has checkpoints of steps {steps}")
    start = saved.step
    records = [record for record in read_journal(folder, start) if stop is None or record["step"] <= stop]
    reached = start + len(records)
    if stop is not None and reached < stop:
        raise ValueError(f"{folder}/{JOURNAL}: step {reached + 1} is missing or damaged, so step {stop} cannot be rebuilt")
    if stop is None and reached < steps[-1]:
        warn(f"{folder}/{JOURNAL}: step {reached + 1} is missing or damaged, and the newest checkpoint is of step {steps[-1]}")
    others = {str(record.get("device")) for record in records} - {"None", torch.device(device).type}
    if others and cfg.zo.directions != "rademacher":  # signs need no rounding
        raise ValueError(f"the run drew directions on {min(others)}, whose last bits differ: give --device {min(others)}")
    flats = {branch: FlatTensors(tensors) for branch, tensors in _zeroth_order(cfg, saved.tensors, device).items()}
    if not flats:
        raise ValueError(f"{folder} has no zeroth-order units (orders.branch={cfg.orders.branch}, orders.order={cfg.orders.order})")
    zeroth = ZerothOrder(flats, cfg.zo)
    for record in track(records, "replay", disable=not sys.stdout.isatty()):
        zeroth.replay(record["moves"], Key(record["seed"], record["step"] - 1))
    tensors = {f"adapters/{name}": t.cpu() for flat in flats.values() for name, t in flat.tensors().items()}
    return Checkpoint(reached, tensors, {}, saved.path)


def _zeroth_order(cfg: Config, saved: dict[str, Tensor], device: str) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the zeroth-order units by branch and name, in the order of the units."""
    adapters = checkpoint.adapters_in(saved)
    units = {name: UnitId.parse(name.split("/")[0]) for name in adapters}
    orders = assign(sorted(set(units.values())), cfg.orders)
    chosen = [name for name in sorted(adapters, key=units.__getitem__) if orders[units[name]] is Order.ZEROTH]
    by_branch = groupby(chosen, lambda name: units[name].branch)
    return {branch: {name: adapters[name].to(device) for name in names} for branch, names in by_branch}


def different_tensors(rebuilt: Checkpoint, saved: Checkpoint) -> list[str]:
    """Return the names of the tensors that are not bit for bit those of a checkpoint."""
    return [name for name, t in rebuilt.tensors.items() if not torch.equal(t, saved.tensors[name])]


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="dist-vlcl replay", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    parser.add_argument("--stop", type=int, metavar="STEP", help="stop after this step (default: the last one in the journal)")
    parser.add_argument("--device", default="cpu", help="the device on which the run drew its directions: cpu (default) or cuda")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="own classes that config.yaml names, such as zo.estimator=a:B")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rebuilt units to this safetensors file")
    options = parser.parse_intermixed_args()
    with errors_refused():
        rebuilt = rebuild(options.run, options.stop, options.device, options.options)
        if options.output:
            replace_file(options.output, save(rebuilt.tensors))
        saved = checkpoint.load(options.run, rebuilt.step) if rebuilt.step in checkpoint.saved_steps(options.run) else None
    numbers = sum(t.numel() for t in rebuilt.tensors.values())
    print(f"rebuilt {numbers:,} parameters of zeroth-order units after step {rebuilt.step}, from {rebuilt.path.name}")
    if saved is None:
        print(f"there is no checkpoint of step {rebuilt.step} to compare with")
    elif names := different_tensors(rebuilt, saved):
        sys.exit(f"DIFFERENT from the checkpoint of step {rebuilt.step}: {', '.join(names[:4])}")
    else:
        print(f"equal, bit for bit, to the checkpoint of step {rebuilt.step}")

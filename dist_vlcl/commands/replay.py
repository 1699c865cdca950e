"""Rebuild a run's zeroth-order units from a checkpoint and the journal, bit for bit:  python -m dist_vlcl.commands.replay runs/NAME"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from dist_vlcl.config import Config, load_config
from dist_vlcl.masking import masked
from dist_vlcl.model.units import UnitId
from dist_vlcl.orders import Order, assign
from dist_vlcl.run import checkpoint, journal
from dist_vlcl.zo.flat import StoredUnits
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrder


@dataclass(frozen=True)
class Rebuilt:
    """Zeroth-order units as they were after a step, made of a checkpoint and the journal."""

    start: int  # the checkpoint's step
    stop: int
    tensors: dict[str, Tensor]  # under the names that they have in a checkpoint
    journal_bytes: float  # a step


def rebuild(folder: Path, start: int | None = None, stop: int | None = None, device: str = "cpu") -> Rebuilt:
    """Return the zeroth-order units after step `stop` (default: the journal's last), from the checkpoint of `start` (the newest before it).

    Raises ValueError where the run has no such units or its journal does not reach from start to stop.
    """
    cfg = load_config(folder / "config.yaml")
    saved = _checkpoint(folder, start, stop)
    records = [record for record in journal.read_after(folder, saved.step) if stop is None or record["step"] <= stop]
    reached = saved.step + len(records)
    if stop is not None and reached < stop:
        raise ValueError(f"{folder}/{journal.FILE}: step {reached + 1} is missing or damaged, so step {stop} cannot be reached")
    flats = {branch: StoredUnits(tensors) for branch, tensors in _zeroth_order(cfg, saved.tensors, device).items()}
    if not flats:
        raise ValueError(f"{folder} has no zeroth-order units (orders.branch={cfg.orders.branch}, orders.order={cfg.orders.order})")
    zeroth, task = ZerothOrder(flats, cfg.zo), saved.state["task"]
    zeroth.load_state_dict({name.removeprefix("zo/"): t for name, t in saved.tensors.items() if name.startswith("zo/")})
    for record in track(records, "replay", disable=not sys.stdout.isatty()):
        if record["task"] != task:
            zeroth.begin()
            task = record["task"]
        zeroth.replay(record["moves"], Key(record["seed"], record["step"] - 1))
    tensors = {f"adapters/{name}": t.cpu() for flat in flats.values() for name, t in flat.tensors().items()}
    return Rebuilt(saved.step, reached, tensors, journal.bytes_per_step(folder))


def _checkpoint(folder: Path, start: int | None, stop: int | None) -> checkpoint.Checkpoint:
    """Return the checkpoint to start from: that of `start`, else the newest that lies before `stop`, else before the journal's end."""
    if start is not None:
        return checkpoint.load(folder, start)
    steps = checkpoint.saved_steps(folder)
    if not steps:
        raise ValueError(f"{folder}/checkpoints holds no checkpoint to start from")
    end = stop or max((record["step"] for record in journal.read_after(folder, steps[0])), default=steps[0])
    return checkpoint.load(folder, max((step for step in steps if step < end), default=steps[0]))


def _zeroth_order(cfg: Config, saved: Mapping[str, Tensor], device: str) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the zeroth-order units by branch and name, in the order of the units."""
    adapters = {name.removeprefix("adapters/"): t for name, t in saved.items() if name.startswith("adapters/")}
    units = {name: UnitId.parse(name.split("/")[0]) for name in adapters}
    orders = assign(sorted(set(units.values())), cfg.orders)
    result: dict[str, dict[str, Tensor]] = {}
    for name in sorted(adapters, key=lambda name: units[name]):
        if orders[units[name]] is Order.ZEROTH:
            result.setdefault(units[name].branch, {})[name] = adapters[name].to(device)
    return result


def differing(rebuilt: Rebuilt, saved: checkpoint.Checkpoint) -> list[str]:
    """Return the names of the tensors that are not, bit for bit, those of a checkpoint."""
    return [name for name, t in rebuilt.tensors.items() if not torch.equal(t, saved.tensors[name])]


def main() -> None:
    """Run the command line. Exit status 1 where the rebuilt units differ from the checkpoint of the same step, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m dist_vlcl.commands.replay", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/NAME")
    parser.add_argument("--start", type=int, metavar="STEP", help="the checkpoint to start from (default: the newest before the end)")
    parser.add_argument("--stop", type=int, metavar="STEP", help="the step to end at (default: the journal's last)")
    parser.add_argument("--device", default="cpu", help="where the run drew its directions: cpu (default) or cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rebuilt units here, as safetensors")
    options = parser.parse_args()
    try:
        rebuilt = rebuild(options.run, options.start, options.stop, options.device)
        if options.output:
            save_file(rebuilt.tensors, options.output)
        saved = checkpoint.load(options.run, rebuilt.stop) if rebuilt.stop in checkpoint.saved_steps(options.run) else None
    except (OSError, ValueError, RuntimeError, checkpoint.BrokenCheckpoint) as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    numbers = sum(t.numel() for t in rebuilt.tensors.values())
    print(f"rebuilt {numbers:,} numbers of the zeroth-order units after step {rebuilt.stop}, from the checkpoint of step {rebuilt.start}")
    print(f"the journal takes {rebuilt.journal_bytes:.0f} bytes a step")
    if saved is None:
        print(f"there is no checkpoint of step {rebuilt.stop} to compare with")
    elif names := differing(rebuilt, saved):
        print(f"DIFFERENT from the checkpoint of step {rebuilt.stop}: {', '.join(names[:4])}", file=sys.stderr)
        sys.exit(1)
    else:
        print(f"equal, bit for bit, to the checkpoint of step {rebuilt.stop}")


if __name__ == "__main__":
    main()

"""What a benchmark hands back: tables for people, records for programs, and on what machine with which versions it ran."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_vlcl import __version__


@dataclass
class Table:
    """Rows under named columns; cells are text or numbers, numbers are shown with three digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *[[shown(cell) for cell in row] for row in self.rows]]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


@dataclass
class Result:
    """Tables, and `records` of the same with all digits."""

    tables: list[Table]
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        return "\n\n".join([*[table.markdown() for table in self.tables], *self.notes])

    def write(self, path: Path, command: str) -> None:
        """Write the result as JSON, with the machine."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": command, "machine": machine(), "tables": [asdict(t) for t in self.tables], "records": self.records}
        path.write_text(json.dumps({**content, "notes": self.notes}, indent=1) + "\n")


def shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:#.3g}".rstrip(".") if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge a time."""
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dist_vlcl": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def machine_line() -> str:
    m = machine()
    return (
        f"{m['date']}, {', '.join(m['gpus']) or m['cpu']}, {m['cores']} cores, {m['threads']} threads, load {m['load']}; "
        f"torch {m['torch']}, Python {m['python']}, dist_vlcl {m['dist_vlcl']}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Return seconds of each variant, one after the other in turn, so that a busy machine is busy for all of them.

    On a CPU these are CPU seconds of all threads, elsewhere seconds until the device is done. The first turn is not counted,
    on a GPU the first three, of which the second records CUDA graphs.
    """
    warm = 3 if device == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm + repeats):
        for name, work in variants.items():
            elapsed = _timed(work, device)
            if turn >= warm:
                seconds[name].append(elapsed)
    return seconds


def _timed(work: Callable[[], Any], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Return how many times faster, `median (lowest to highest)`, over the turns in which the two ran side by side."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"

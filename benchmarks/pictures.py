"""Pictures of benchmarks: bars of what their tables say."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result import Result, Table, shown
from dist_vlcl.report import figures
from dist_vlcl.report.figures import BLUE, GREY, ORANGE, STYLE, new_figure, put_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Dark, light, hatched: what is compared with is open; each look is told apart in grey print, too.
OPEN = {"facecolor": "white", "edgecolor": GREY}
LOOKS: tuple[dict[str, Any], ...] = (
    {"facecolor": BLUE, "edgecolor": BLUE},
    {"facecolor": "#CFE3F0", "edgecolor": BLUE, "hatch": "////"},
    {"facecolor": ORANGE, "edgecolor": ORANGE},
    {"facecolor": "#F8DCCB", "edgecolor": ORANGE, "hatch": "////"},
)
ROW = 0.135  # inches of a bar
GAP = 0.6  # between groups, in bars
MARK: dict[str, Any] = {"fmt": "|", "color": "black", "markersize": 8, "markeredgewidth": 1.8}


@dataclass
class Bars:
    """A group of horizontal bars a plan, the first of each what the others are compared with.

    `bars[label][group]` is a length, `marks[label][group]` a mark on that bar; what is not there is not drawn.
    """

    title: str
    axis: str
    bars: dict[str, dict[str, float]]
    mark: str
    marks: dict[str, dict[str, float]]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for lengths in self.bars.values() for group in lengths))


def step_bars(result: Result) -> Bars:
    """FLOPs of every plan: naive, executed, and the model's as a mark on what is executed."""
    [table] = result.tables
    naive, executed, model = (
        {row["orders"]: row[column] for row in _rows(table)} for column in ("naive TFLOP", "executed TFLOP", "model TFLOP")
    )
    title = table.title.replace("A step, naive and fast", "FLOPs of a step")
    return Bars(title, "TFLOP a step", {"naive": naive, "executed": executed}, "cost model", {"executed": model})


def memory_bars(result: Result) -> Bars:
    """Peak of every plan: the paper's, counted ones by precision, and what a GPU saw as marks on them."""
    table = result.tables[-1]
    bars: dict[str, dict[str, float]] = {"paper": {}}
    marks: dict[str, dict[str, float]] = {}
    for row in _rows(table):
        label = row["precision"] + (", checkpoints" if row["checkpoint"] == "yes" else "")
        for of_label, column in ((bars.setdefault("paper", {}), "paper GB"), (bars.setdefault(label, {}), "counted GB")):
            if isinstance(row[column], float):
                of_label[row["orders"]] = row[column]
        if isinstance(row["GPU GB"], float):
            marks.setdefault(label, {})[row["orders"]] = row["GPU GB"]
    return Bars(table.title, "GB at a step's peak, ours counted", bars, "measured on a GPU", marks)


PICTURES: dict[str, Callable[[Result], Bars]] = {"step": step_bars, "memory": memory_bars}


def png(path: str) -> Path:
    """Read the value of --picture; argparse.ArgumentTypeError in words."""
    if not path.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{path}: give a file that ends in .png")
    return Path(path)


def write_picture(path: Path, bars: Bars) -> None:
    """Draw into a PNG."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures.write_picture(draw(bars), path)


def draw(bars: Bars) -> "Figure":
    """Groups from above, their bars in the order of `bars.bars`, each with its number as the table shows it."""
    step = len(bars.bars) + GAP
    figure = new_figure(6.9, 1.0 + ROW * step * len(bars.groups))
    axes = figure.subplots()
    for number, (label, lengths) in enumerate(bars.bars.items()):
        places = {group: step * index + number for index, group in enumerate(bars.groups) if group in lengths}
        look = LOOKS[number - 1] if number else OPEN
        axes.barh(list(places.values()), [lengths[group] for group in places], 0.86, label=label, linewidth=0.8, **look)
        marks = bars.marks.get(label, {})
        axes.errorbar(list(marks.values()), [places[group] for group in marks], **MARK)
        for group, place in places.items():
            end = max(lengths[group], marks.get(group, 0))
            axes.annotate(shown(lengths[group]), (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    if bars.marks:
        axes.errorbar([], [], label=bars.mark, **MARK)
    axes.set_yticks([step * index + (len(bars.bars) - 1) / 2 for index in range(len(bars.groups))], bars.groups, fontsize=9)
    axes.set_ylim(step * len(bars.groups) - GAP, -0.9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.07)
    axes.set_xlabel(f"{bars.axis} ({bars.title.split(': ', 1)[1]})")
    entries = len(bars.bars) + bool(bars.marks)
    put_legend(figure, axes, columns=entries if entries <= 5 else 3)
    return figure


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]

"""Pictures of one run, drawn without a display, and the style of all pictures: readable for colour-blind readers and in grey print."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
from matplotlib.ticker import MaxNLocator

from dist_vlcl.report.records import Records, read_records

# Okabe and Ito's palette, with Tol's wine as purple, since theirs is too pale for a thin line. Line styles repeat the distinction.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#882255", "#595959"
LOOKS = {"vision": (BLUE, "-"), "language": (ORANGE, "--")}
OTHER_LOOK = (GREEN, "-.")  # both branches moved as one
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names of data sets and options are the user's: a $ is a $
}
MAX_NUMBERED = 22  # columns of a matrix; with more, a cell has no room for its number


def plot_run(folder: Path | str) -> list[Path]:
    """Draw every picture for which a run's metrics.jsonl has data into its folder plots/, and return the paths."""
    records, plots = read_records(folder), Path(folder) / "plots"
    plots.mkdir(exist_ok=True)
    names = {"accuracy_matrix": plot_matrix, "accuracy": plot_accuracy, "loss": plot_loss, "projected_gradient": plot_projected_gradients}
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, plot in names.items():
            if figure := plot(records):
                drawn.append(plots / f"{name}.png")
                write_picture(figure, drawn[-1])
    return drawn


def plot_matrix(records: Records) -> Figure | None:
    """Draw the accuracy on task j after task i as a heat map with numbers, and A_t in a column beside it; None without data."""
    matrix = percents(pd.DataFrame(records.matrix))  # rows that end at the newest task are filled up with NaN
    num_rows, num_tasks = matrix.shape
    if not num_tasks:
        return None
    cells = np.column_stack([matrix, np.full(num_rows, np.nan), percents(records.of_tasks("seen"))])  # an empty column, and A_t
    low = np.floor(np.nanmin(cells) / 10) * 10
    figure = Figure(figsize=(min(0.5 * num_tasks + 2.7, 12), np.clip(0.5 * num_rows + 1.4, 2.6, 11)))
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="cividis", vmin=low, vmax=100, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value) and max(cells.shape) <= MAX_NUMBERED:
            color = "black" if value > (low + 100) / 2 else "white"
            axes.text(column, row, f"{value:.{1 if num_tasks <= 12 else 0}f}", ha="center", va="center", fontsize=8, color=color)
    shown = range(0, num_tasks, _stride(num_tasks))
    axes.set_xticks([*shown, num_tasks + 1], [*(str(task + 1) for task in shown), "$A_t$"], parse_math=True)
    axes.set_yticks(shown[:num_rows], [str(task + 1) for task in shown[:num_rows]])
    axes.set(xlabel="accuracy on task", ylabel="after task")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.9, pad=0.02)
    return figure


def plot_accuracy(records: Records) -> Figure | None:
    """Draw A_t after every task, and the zero-shot accuracy on the same classes if it is known; None without data."""
    seen, zero_shot = percents(records.of_tasks("seen")), percents(records.of_tasks("zero_shot"))
    if not np.isfinite(seen).any():
        return None
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    after = np.array(records.of_tasks("task")) + 1
    axes.plot(after, seen, color=BLUE, marker="o", label="after training")
    if np.isfinite(zero_shot).any():
        axes.plot(after, zero_shot, color=GREY, linestyle="--", marker="s", markersize=3, label="zero-shot, same classes")
        put_legend(figure, axes)
    axes.margins(y=0.15)
    axes.set(xlabel="task", ylabel="accuracy A_t (%)", xlim=(0.5, after.max() + 0.5))
    axes.set_xticks(range(1, after.max() + 1, _stride(after.max())))
    return figure


def plot_loss(records: Records) -> Figure | None:
    """Draw the base loss of every step, raw and smoothed, with the tasks' borders; None without data."""
    steps = _step_values(records, lambda record: record.get("loss"))
    if steps.empty:
        return None
    figure = Figure(figsize=(7.2, 3.8))
    axes = figure.subplots()
    axes.plot(steps.step, steps.value, color=BLUE, alpha=0.35, linewidth=0.7, label="every step")
    for index, (_, part) in enumerate(steps.groupby("task")):  # a loss jumps where a task begins
        label = "" if index else "smoothed within a task"
        axes.plot(part.step, smoothed(part.value), color=BLUE, linewidth=1.8, label=label)
    axes.set(xlabel="step", ylabel="loss")
    put_legend(figure, axes)
    draw_borders(axes, steps)
    return figure


def plot_projected_gradients(records: Records) -> Figure | None:
    """Draw the size of each branch's projected gradient, and the share of its moves that were accepted; None without zeroth-order steps."""
    branches = sorted({branch for record in records.steps for branch in record.get("zo") or {}}, reverse=True)
    gradients = {branch: _zo_values(records, branch, "projected_gradient") for branch in branches}
    gradients = {branch: steps[steps.value > 0] for branch, steps in gradients.items() if (steps.value > 0).any()}
    if not gradients:
        return None
    figure = Figure(figsize=(7.2, 5.4))
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for branch, sizes in gradients.items():
        color, line = LOOKS.get(branch, OTHER_LOOK)
        top.plot(sizes.step, sizes.value, color=color, alpha=0.2, linewidth=0, marker=".", markersize=3)
        for index, (_, part) in enumerate(sizes.groupby("task")):
            mean = np.exp(smoothed(np.log(part.value), at_least=20))
            top.plot(part.step, mean, color=color, linestyle=line, linewidth=1.8, label="" if index else branch)
        for _, part in _zo_values(records, branch, "coefficient").groupby("task"):
            below.plot(part.step, 100 * smoothed(part.value > 0, at_least=20), color=color, linestyle=line)
    top.set(yscale="log", ylabel="|projected gradient|")
    put_legend(figure, top)
    below.set(ylim=(-4, 104), xlabel="step", ylabel="moves accepted (%)")
    steps = _step_values(records, lambda record: record["step"])
    draw_borders(top, steps)
    draw_borders(below, steps, labels=False)
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path)


def percents(fractions: Any) -> np.ndarray:
    """Return fractions in percent, NaN for None."""
    return 100 * np.array(fractions, dtype=float)


def _step_values(records: Records, value_of: Callable[[dict[str, Any]], Any]) -> pd.DataFrame:
    """Return step, task and a value of every step that has one; values that are not finite are left out."""
    steps = [(record["step"], record.get("task", 0), value_of(record)) for record in records.steps]
    frame = pd.DataFrame(steps, columns=["step", "task", "value"]).astype({"value": float})
    return frame[np.isfinite(frame.value)]


def _zo_values(records: Records, branch: str, name: str) -> pd.DataFrame:
    """Return step, task and the size of one number of a branch's zeroth-order move."""
    steps = _step_values(records, lambda record: ((record.get("zo") or {}).get(branch) or {}).get(name))
    return steps.assign(value=steps.value.abs())


def smoothed(values: Any, at_least: int = 1) -> Any:
    """Return the mean of each value (of a Series, or of each column) and its neighbours: a tenth of all values, fewer at the ends."""
    reach = max(at_least, min(len(values) // 10, 200)) // 2
    return values.rolling(2 * reach + 1, center=True, min_periods=1).mean()


def put_legend(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Put the legend of `axes` above all axes of the figure, in one line or in so many columns."""
    handles, labels = axes.get_legend_handles_labels()
    # Outside the axes, because data may be anywhere inside.
    figure.legend(handles, labels, loc="outside upper right", ncols=columns or len(labels), fontsize=9)


def draw_borders(axes: Axes, steps: pd.DataFrame, labels: bool = True) -> None:
    """Draw a line where each task but the first begins, given `step` and `task` of all steps, with as many numbers as there is room for."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above: dict[str, Any] = {"xytext": (2, 3), "textcoords": "offset points", "fontsize": 8, "color": GREY}
    begins = steps.groupby("task").step.min()
    for task, begin in begins.iloc[:: _stride(len(begins))].items():
        if begin > begins.iloc[0]:
            axes.axvline(begin, color=GREY, linewidth=0.7, linestyle=":")
        if labels and len(begins) > 1:
            axes.annotate(f"{task + 1}", (begin, 1), xycoords=("data", "axes fraction"), **above)
    if labels and len(begins) > 1:
        axes.annotate("task", (0, 1), xycoords="axes fraction", ha="right", **above)


def _stride(number: int) -> int:
    """Return n such that there is room for the number of every n-th task."""
    return -(-number // MAX_NUMBERED)

"""Pictures of one run, drawn without a display, and the style of all pictures: readable for colour-blind readers and in grey print."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
from matplotlib.ticker import MaxNLocator

from dist_vlcl.report.records import Records, read_records
from dist_vlcl.run.files import replace_file

# Okabe and Ito's palette, with Tol's wine as purple, since theirs is too pale for a thin line. Line styles repeat the distinction.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#882255", "#595959"
STYLE = Path(__file__).with_name("figures.mplstyle")
MAX_NUMBERED = 22  # columns of a matrix; with more, a cell has no room for its number


def plot_run(folder: Path | str) -> list[Path]:
    """Draw every picture for which a run's metrics.jsonl has data into its folder plots/, and return the paths."""
    records, plots = read_records(folder), Path(folder) / "plots"
    plots.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.rc_context(fname=STYLE):
        for name, plot in {"accuracy_matrix": plot_matrix, "accuracy": plot_accuracy, "loss": plot_loss}.items():
            if figure := plot(records):
                stream = io.BytesIO()
                figure.savefig(stream)
                drawn.append(plots / f"{name}.png")
                replace_file(drawn[-1], stream.getvalue())
    return drawn


def plot_matrix(records: Records) -> Figure | None:
    """Draw the accuracy on task j after task i as a heat map with numbers, and A_t in a column beside it; None without data."""
    # rows that end at the newest task are filled up with NaN
    matrix = 100 * pd.DataFrame([record.get("per_task") or [] for record in records["task"]]).to_numpy(dtype=float)
    num_rows, num_tasks = matrix.shape
    if not num_tasks:
        return None
    seen = 100 * np.array([record.get("seen") for record in records["task"]], dtype=float)
    cells = np.column_stack([matrix, np.full(num_rows, np.nan), seen])  # an empty column, and A_t
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
    seen, zero_shot = (100 * np.array([record.get(name) for record in records["task"]], dtype=float) for name in ("seen", "zero_shot"))
    if not np.isfinite(seen).any():
        return None
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    after = np.array([record["task"] for record in records["task"]]) + 1
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
    steps = pd.DataFrame(records["step"]).reindex(columns=["step", "task", "loss"]).astype({"loss": float})
    steps = steps[np.isfinite(steps.loss)]
    if steps.empty:
        return None
    figure = Figure(figsize=(7.2, 3.8))
    axes = figure.subplots()
    axes.plot(steps.step, steps.loss, color=BLUE, alpha=0.35, linewidth=0.7, label="every step")
    draw_loss(axes, steps.assign(run=""), "smoothed within a task", color=BLUE)
    put_legend(figure, axes)
    draw_borders(axes, steps)
    return figure


def draw_loss(axes: Axes, steps: pd.DataFrame, label: str, **look: Any) -> None:
    """Draw the loss of runs (columns run, task, step, loss), smoothed within each task: their mean, and their range as a band."""
    for index, (_, of_task) in enumerate(steps.groupby("task")):  # a loss jumps where a task begins
        by_run = smoothed(of_task.pivot_table(index="step", columns="run", values="loss").dropna())
        axes.plot(by_run.index, by_run.mean(axis=1), linewidth=1.7, label="" if index else label, **look)
        axes.fill_between(by_run.index, by_run.min(axis=1), by_run.max(axis=1), color=look["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="loss")


def smoothed(values: Any) -> Any:
    """Return the mean of each value (of a Series, or of each column) and its neighbours: a tenth of all values, fewer at the ends."""
    reach = min(len(values) // 10, 200) // 2
    return values.rolling(2 * reach + 1, center=True, min_periods=1).mean()


def put_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of `axes` above all axes of the figure, because data may be anywhere inside of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)


def draw_borders(axes: Axes, steps: pd.DataFrame) -> None:
    """Draw a line where each task begins, given `step` and `task` of all steps, with as many numbers as there is room for."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    begins = steps.groupby("task").step.min()
    for task, begin in begins.iloc[:: _stride(len(begins))].items():
        axes.axvline(begin, color=GREY, linewidth=0.7, linestyle=":")
        name = f"task {task + 1}" if task == begins.index[0] else task + 1
        axes.annotate(name, (begin, 1), (2, 3), ("data", "axes fraction"), "offset points", fontsize=8, color=GREY)


def _stride(number: int) -> int:
    """Return n such that there is room for the number of every n-th task."""
    return -(-number // MAX_NUMBERED)

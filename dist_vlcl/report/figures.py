"""Pictures of one run, drawn without a display, and the style of all pictures: readable for colour-blind readers and in grey print."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_vlcl.report.records import Records, read_records

if TYPE_CHECKING:  # matplotlib takes half a second to import, and not every run draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
}
MAX_NUMBERED = 22  # columns of a matrix; with more, a cell has no room for its number


def plot_run(folder: Path | str) -> list[Path]:
    """Draw every picture for which a run's metrics.jsonl has data into its folder plots/, and return the paths."""
    import matplotlib

    records = read_records(folder)
    plots = Path(folder) / "plots"
    plots.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "accuracy_matrix": plot_matrix(records),
            "accuracy": plot_accuracy(records),
            "loss": plot_loss(records),
            "projected_gradient": plot_projected_gradients(records),
        }
        drawn = {plots / f"{name}.png": figure for name, figure in figures.items() if figure}
        for path, figure in drawn.items():
            write_picture(figure, path)
        return list(drawn)


def plot_matrix(records: Records) -> "Figure | None":
    """Draw the accuracy on task j after task i as a heat map with numbers, and A_t in a column beside it; None without data."""
    num_rows, num_tasks = len(records.matrix), max(map(len, records.matrix), default=0)
    if not num_tasks:
        return None
    cells = np.full((num_rows, num_tasks + 2), np.nan)  # an empty column, and A_t
    for after, row in enumerate(records.matrix):
        cells[after, : len(row)] = percents(row)
    cells[:, -1] = percents(records.seen)
    low = np.floor(np.nanmin(cells) / 10) * 10
    figure = new_figure(min(0.5 * num_tasks + 2.7, 12), np.clip(0.5 * num_rows + 1.4, 2.6, 11))
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
    axes.set_xticks([*shown, num_tasks + 1], [*(str(task + 1) for task in shown), "$A_t$"])
    axes.set_yticks(shown[:num_rows], [str(task + 1) for task in shown[:num_rows]])
    axes.set(xlabel="accuracy on task", ylabel="after task")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.9, pad=0.02)
    return figure


def plot_accuracy(records: Records) -> "Figure | None":
    """Draw A_t after every task, and the zero-shot accuracy on the same classes if it is known; None without data."""
    seen, zero_shot = percents(records.seen), percents(records.zero_shot)
    if not np.isfinite(seen).any():
        return None
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    after = np.array([record["task"] + 1 for record in records.tasks])
    axes.plot(after, seen, color=BLUE, marker="o", label="after training")
    if np.isfinite(zero_shot).any():
        axes.plot(after, zero_shot, color=GREY, linestyle="--", marker="s", markersize=3, label="zero-shot, same classes")
        put_legend(figure, axes)
    axes.margins(y=0.15)
    axes.set(xlabel="task", ylabel="accuracy on all classes seen (%)", xlim=(0.5, after.max() + 0.5))
    axes.set_xticks(range(1, after.max() + 1, _stride(after.max())))
    return figure


def plot_loss(records: Records) -> "Figure | None":
    """Draw the base loss of every step, raw and smoothed, with the tasks' borders; None without data."""
    steps, losses = _series((record["step"], record.get("loss")) for record in records.steps)
    if not len(steps):
        return None
    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    axes.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=0.7, label="every step")
    for index, part in enumerate(_by_task(records, steps)):
        axes.plot(steps[part], smoothed(losses[part]), color=BLUE, linewidth=1.8, label="" if index else "smoothed within a task")
    axes.set(xlabel="step", ylabel="loss")
    put_legend(figure, axes)
    draw_borders(axes, _first_steps(records))
    return figure


def plot_projected_gradients(records: Records) -> "Figure | None":
    """Draw the size of each branch's projected gradient, and the share of its moves that were accepted; None without zeroth-order steps."""
    branches = sorted({branch for record in records.steps for branch in record.get("zo") or {}}, reverse=True)
    gradients = {branch: _zo_series(records, branch, "projected_gradient") for branch in branches}
    gradients = {branch: (steps[sizes > 0], sizes[sizes > 0]) for branch, (steps, sizes) in gradients.items() if (sizes > 0).any()}
    if not gradients:
        return None
    figure = new_figure(7.2, 5.4)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for branch, (steps, sizes) in gradients.items():
        color, line = LOOKS.get(branch, OTHER_LOOK)
        top.plot(steps, sizes, color=color, alpha=0.2, linewidth=0, marker=".", markersize=3)
        for index, part in enumerate(_by_task(records, steps)):
            mean = np.exp(smoothed(np.log(sizes[part]), at_least=20))
            top.plot(steps[part], mean, color=color, linestyle=line, linewidth=1.8, label="" if index else branch)
        steps, coefficients = _zo_series(records, branch, "coefficient")
        for part in _by_task(records, steps):
            share = smoothed((coefficients[part] > 0).astype(float), at_least=20)
            below.plot(steps[part], 100 * share, color=color, linestyle=line)
    top.set(yscale="log", ylabel="|projected gradient|")
    put_legend(figure, top)
    below.set(ylim=(-4, 104), xlabel="step", ylabel="moves accepted (%)")
    draw_borders(top, _first_steps(records))
    draw_borders(below, _first_steps(records), labels=False)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    return Figure(figsize=(width, height))


def write_picture(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG of 96 colours. It has a third of the size, and documentation keeps such files."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, pil_kwargs={"compress_level": 1})  # it is only read again below
    Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path)


def percents(fractions: Sequence[float | None]) -> np.ndarray:
    """Return fractions in percent, NaN for None."""
    return np.array([np.nan if fraction is None else 100 * fraction for fraction in fractions], dtype=float)


def _series(points: Iterable[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values, without those that are missing or not finite."""
    known = [(step, value) for step, value in points if value is not None and np.isfinite(value)]
    array = np.array(known, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _zo_series(records: Records, branch: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and sizes of one zeroth-order number; for several probes their mean size."""
    values = ((record["step"], ((record.get("zo") or {}).get(branch) or {}).get(name)) for record in records.steps)
    return _series((step, None if value is None or value == [] else np.mean(np.abs(value))) for step, value in values)


def _by_task(records: Records, steps: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each task's steps. A loss jumps where a task begins, so it is smoothed within a task only."""
    of_step = {record["step"]: record.get("task", 0) for record in records.steps}
    tasks = np.array([of_step[step] for step in steps])
    return [np.flatnonzero(tasks == task) for task in np.unique(tasks)]


def smoothed(values: np.ndarray, at_least: int = 1) -> np.ndarray:
    """Return the mean of each value and its neighbours: a tenth of all values, fewer at the ends."""
    reach = max(at_least, min(len(values) // 10, 200)) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    begins = np.maximum(positions - reach, 0)
    ends = np.minimum(positions + reach + 1, len(values))
    return (sums[ends] - sums[begins]) / (ends - begins)


def put_legend(figure: "Figure", axes: "Axes", columns: int | None = None) -> None:
    """Put the legend of `axes` above all axes of the figure, in one line or in so many columns."""
    handles, labels = axes.get_legend_handles_labels()
    # Outside the axes, because data may be anywhere inside.
    figure.legend(handles, labels, loc="outside upper right", ncols=columns or len(labels), fontsize=9)


def _first_steps(records: Records) -> dict[int, int]:
    """Return the first step of every task."""
    begins: dict[int, int] = {}
    for record in records.steps:
        begins.setdefault(record.get("task", 0), record["step"])
    return begins


def draw_borders(axes: "Axes", begins: Mapping[int, int], labels: bool = True) -> None:
    """Draw a line where each task but the first begins, given the first step of every task, with as many numbers as there is room for."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above: dict[str, Any] = {"xytext": (2, 3), "textcoords": "offset points", "fontsize": 8, "color": GREY}
    for index, (task, begin) in enumerate(begins.items()):
        if index % _stride(len(begins)):
            continue
        if index:
            axes.axvline(begin, color=GREY, linewidth=0.7, linestyle=":")
        if labels and len(begins) > 1:
            axes.annotate(f"{task + 1}", (begin, 1), xycoords=("data", "axes fraction"), **above)
    if labels and len(begins) > 1:
        axes.annotate("task", (0, 1), xycoords="axes fraction", ha="right", **above)


def _stride(number: int) -> int:
    """Return n such that there is room for the number of every n-th task."""
    return -(-number // MAX_NUMBERED)

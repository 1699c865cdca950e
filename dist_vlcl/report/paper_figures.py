"""Figures 2 to 8 of the paper and its memory table as a picture, each with what is plotted, from which runs, as a tidy table."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_vlcl.report.cells import DATASETS, ZERO_SHOT, Entry, Method, Section, Stream, first_order
from dist_vlcl.report.claims import CLAIMS
from dist_vlcl.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, draw_borders, new_figure, put_legend, smoothed
from dist_vlcl.report.paper_tables import METRICS, accuracies, cell_columns, comparison_frame, paired_test

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour, line and marker each tell curves apart: by colour-blind readers, in grey print, where curves cross.
LOOKS: tuple[tuple[str, Any, str], ...] = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, (0, (1, 1)), "D"))
LABEL_WIDTH = 40  # characters of a line beside a row; every setting of a note begins a line


class Statistic(NamedTuple):
    """A number of a unit, from what was recorded of it at every step."""

    column: str
    over_steps: str
    axis: str
    caption: str


STATISTICS = {
    "coordinate_variance": Statistic(
        "gradient_variance", "mean", "variance over\ncoordinates", "variance over the coordinates of a unit's gradient, mean over steps"
    ),
    "norm_variance": Statistic("gradient_norm", "var", "variance over\nsteps of the norm", "variance over steps of its norm"),
    "mean_update": Statistic("update_norm", "mean", "norm of\nthe update", "norm of the update that was applied, mean over steps"),
}
TOWERS = ("vision", "language")


@dataclass
class Picture:
    """A figure with its caption and its data; `figure` is None where `caption` says why there is none."""

    name: str
    title: str
    caption: str
    figure: "Figure | None" = None
    data: "pd.DataFrame | None" = None


@dataclass(frozen=True)
class Plan:
    """A figure of the paper: which methods it compares, given the adapter."""

    number: int
    title: str
    draw: Callable[[Section, Stream, Sequence[Method]], "tuple[Figure, pd.DataFrame, str]"]
    methods: tuple[tuple[str, str, str], ...]  # branch, layers, variant

    def of(self, adapter: str) -> list[Method]:
        return [Method(adapter, *method) for method in self.methods]


class NothingToDraw(Exception):
    """A figure has no data; the message says which."""


def draw_losses(section: Section, stream: Stream, methods: Sequence[Method]) -> "tuple[Figure, pd.DataFrame, str]":
    """The base loss of every step, smoothed within a task: the mean over seeds, and the range of the seeds as a band."""
    data = _gathered(section, stream, methods, lambda entry: entry.run.losses())
    if data is None:
        raise NothingToDraw("no run of it has losses in metrics.jsonl")
    figure = new_figure(6.9, 3.9)
    axes = figure.subplots()
    for index, method in enumerate(methods):
        color, line, _ = LOOKS[index]
        for task, curves in _only(data, method).groupby("task"):
            by_seed = curves.pivot_table(index="step", columns="run", values="loss").dropna()
            smooth = np.apply_along_axis(smoothed, 0, by_seed.to_numpy())
            label = method.short if task == _only(data, method).task.min() else ""
            axes.plot(by_seed.index, smooth.mean(1), color=color, linestyle=line, linewidth=1.6, label=label)
            axes.fill_between(by_seed.index, smooth.min(1), smooth.max(1), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="loss")
    put_legend(figure, axes, columns=2)
    draw_borders(axes, _longest(section, stream, methods).run.records)
    return (
        figure,
        data,
        "The loss of the global batch at every step, smoothed over neighbouring steps within a task. Lines: mean over seeds, bands: their "
        "range.",
    )


def draw_units(
    section: Section, stream: Stream, methods: Sequence[Method], statistics: Sequence[str] = ("coordinate_variance", "norm_variance")
) -> "tuple[Figure, pd.DataFrame, str]":
    """Statistics of every unit's gradient or estimate against its layer, a column a tower."""
    data = _gathered(section, stream, methods, unit_statistics)
    if data is None:
        raise NothingToDraw("no run of it has recorded its units (units/*.parquet)")
    figure = new_figure(6.9, 0.9 + 2.0 * len(statistics))
    grid = figure.subplots(len(statistics), len(TOWERS), sharex="col", sharey="row", squeeze=False)
    for row, statistic in zip(grid, statistics, strict=True):
        for axes, tower in zip(row, TOWERS, strict=True):
            for index, method in enumerate(methods):
                units = _only(data, method)
                # Side by side, since units of first order are much alike whatever the plan.
                _draw_unit_curve(axes, units[units.tower == tower], statistic, index, 0.13 * (index - (len(methods) - 1) / 2))
            axes.set_yscale("log")
        row[0].set_ylabel(STATISTICS[statistic].axis)
    for axes, tower in zip(grid[0], TOWERS, strict=True):
        axes.set_title(f"{tower} tower", fontsize=10)
    for axes in grid[-1]:
        axes.set(xlabel="layer", xticks=range(1, int(data.layer.max()) + 1, -(-int(data.layer.max()) // 12)))
    _put_unit_legend(figure, grid[0, 0], {i: method for i, method in enumerate(methods) if not _only(data, method).empty})
    shown = "; ".join(STATISTICS[statistic].caption for statistic in statistics)
    what = (
        f"By row: {shown}. Filled marks: first order, the gradient; open marks: zeroth order, the estimate before any sign. "
        "Lines join layers of one order; marks: mean over seeds, bars: their range. An estimate's variance is far larger than a gradient's "
        "by construction (s² against |g|²/n), and one estimate a branch gives all its zeroth-order layers nearly the same."
    )
    return figure, data, what


def draw_mozo(section: Section, stream: Stream, methods: Sequence[Method]) -> "tuple[Figure, pd.DataFrame, str]":
    """The same with the applied update, on which MoZO's sign acts."""
    return draw_units(section, stream, methods, tuple(STATISTICS))


def unit_statistics(entry: Entry) -> "pd.DataFrame":
    """One line a unit of a run: tower, layer, order, steps, and STATISTICS over its steps; none where units were not recorded."""
    units = entry.run.units()
    known = units[(units.order != "frozen") & np.isfinite(units.gradient_variance)]
    over_steps = known.groupby([known.branch.astype(str).rename("tower"), "layer", known.order.astype(str).rename("order")])
    named = {name: (statistic.column, statistic.over_steps) for name, statistic in STATISTICS.items()}
    return over_steps.agg(steps=("step", "size"), **named).reset_index()


def _draw_unit_curve(axes: "Axes", units: "pd.DataFrame", statistic: str, index: int, offset: float) -> None:
    color, line, marker = LOOKS[index]
    over_seeds = units.groupby(["layer", "order"])[statistic].agg(["mean", "min", "max"]).reset_index()
    for order, part in over_seeds.groupby("order"):
        bars = np.maximum([part["mean"] - part["min"], part["max"] - part["mean"]], 0)
        face = color if order == "first" else "white"
        looks = {"color": color, "linestyle": line, "marker": marker, "markerfacecolor": face, "markersize": 4}
        axes.errorbar(part.layer + offset, part["mean"], bars, linewidth=0.9, elinewidth=0.8, **looks)


def _put_unit_legend(figure: "Figure", axes: "Axes", methods: dict[int, Method]) -> None:
    for index, method in methods.items():
        color, line, marker = LOOKS[index]
        axes.plot([], [], color=color, linestyle=line, marker=marker, markersize=4, label=method.short)
    for face, label in (("black", "first-order layer"), ("white", "zeroth-order layer")):
        axes.plot([], [], color="black", marker="o", linewidth=0, markerfacecolor=face, markersize=4, label=label)
    columns = 2 if len(methods) <= 2 else 3
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8.5, columnspacing=1.2)


def draw_seeds(section: Section, stream: Stream, _: Sequence[Method]) -> "tuple[Figure, pd.DataFrame, str]":
    """Last of every seed with a 95 % interval of the mean, and the paired differences to first order and to the control."""
    import pandas as pd

    cells = {(e.method, e.note): accuracies(section, stream, e.method, e.note, "last") for e in section.entries if e.stream == stream}
    cells = {cell: cells[cell] for cell in sorted(cells, key=lambda cell: (cell[0].order, cell[1])) if cell[0] != ZERO_SHOT}
    if max(map(len, cells.values()), default=0) < 2:
        raise NothingToDraw("no method has runs with two seeds")
    differences = _seed_differences(section, stream, list(cells))
    labels = [_row_label(method, note) for method, note in cells]
    places = _places(labels)
    figure = new_figure(6.9, 1.1 + 0.27 * _height(labels))
    left, *others = figure.subplots(1, 2 if differences else 1, sharey=True, squeeze=False)[0]
    seeds = [(value, place) for place, values in zip(places, cells.values(), strict=True) for value in values.values()]
    left.plot(*zip(*seeds, strict=True), color=GREY, marker="|", linewidth=0, markersize=9, label="a seed")
    for place, values in zip(places, cells.values(), strict=True):
        _draw_interval(left, place, paired_test(list(values.values())), BLUE, "o", BLUE, "mean" if place == places[0] else "")
    zero_shot = list(accuracies(section, stream, ZERO_SHOT, (), "last").values())
    if zero_shot:
        left.axvline(float(np.mean(zero_shot)), color=GREY, linestyle="--", linewidth=1, label="zero-shot CLIP")
    for right in others:
        _draw_differences(right, [(places[row], is_control, test) for row, is_control, test in differences])
    left.set_yticks(places, labels, fontsize=9)
    left.set_ylim(_height(labels) - 0.4, -0.6)
    left.set_xlabel("Last (%)")
    looks: dict[str, Any] = {"ncols": 3, "fontsize": 8, "handletextpad": 0.4, "columnspacing": 1}
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", **looks)
    for right in others:
        right.set_xlabel("difference in Last (points)")
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", **looks)
    lines = [
        {**cell_columns(stream, *cell), "seed": seed, "last": value} for cell, values in cells.items() for seed, value in values.items()
    ]
    what = (
        "Last of every seed, with the mean and its 95 % t-interval; beside it, where they can be had, differences over the seeds that both "
        "methods have, with their 95 % intervals (paired; not corrected for their number); control: the same units frozen, or zero-shot "
        "CLIP where nothing else learns. "
        "Marks without a bar are single seeds. The paper's figure has the whole branches only."
    )
    return figure, pd.DataFrame(lines), what


def _row_label(method: Method, note: Iterable[str]) -> str:
    """What stands beside a row, in lines of at most LABEL_WIDTH characters."""
    return "\n".join(line for text in (method.label, *note) for line in textwrap.wrap(text, LABEL_WIDTH))


def _height(labels: Iterable[str]) -> float:
    """What rows of these labels need, in rows of one line: a further line needs less than a row with its marks."""
    return sum(1 + 0.65 * label.count("\n") for label in labels)


def _places(labels: Sequence[str]) -> list[float]:
    """The middles of rows below each other, each as high as its own label."""
    return [_height(labels[:row]) + (_height([label]) - 1) / 2 for row, label in enumerate(labels)]


def _seed_differences(section: Section, stream: Stream, cells: Sequence[tuple[Method, tuple[str, ...]]]) -> list[tuple[int, bool, dict]]:
    """The tests of Last of each zeroth-order cell, by its row, against its control or against first order."""
    tests = comparison_frame(section).to_dict("records")
    found = []
    for row, (method, note) in enumerate(cells):
        for is_control, other in ((False, first_order(method.adapter)), (True, method.twin)):
            wanted = {**cell_columns(stream, method, note), "against": other.label, "metric": "last"}
            matching = (test for test in tests if method.is_zeroth and all(test[key] == value for key, value in wanted.items()))
            found += [(row, is_control, test) for test in matching]
    return found


def _draw_differences(axes: "Axes", differences: Sequence[tuple[float, bool, dict]]) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8)
    for of_control, offset, color, marker, face, label in (
        (False, -0.14, ORANGE, "s", ORANGE, "less first order"),
        (True, 0.14, GREEN, "^", "white", "less the control"),
    ):
        axes.plot([], [], color=color, marker=marker, markerfacecolor=face, label=label)
        for place, is_control, test in differences:
            if is_control == of_control:
                _draw_interval(axes, place + offset, test, color, marker, face)


def _draw_interval(axes: "Axes", place: float, test: dict[str, Any], color: str, marker: str, face: str, label: str = "") -> None:
    reach = None if np.isnan(test["low"]) else [[test["mean"] - test["low"]], [test["high"] - test["mean"]]]
    axes.errorbar(
        [test["mean"]], [place], xerr=reach, color=color, fmt=marker, markerfacecolor=face, markersize=5, capsize=2.5, label=label
    )


def draw_claims(comparisons: "pd.DataFrame") -> "Figure":
    """The differences that each claim of the paper rests on, a row of axes a claim and a column a data set."""
    streams = list(dict.fromkeys(zip(comparisons.dataset, comparisons.increment, strict=True)))
    claims = [claim for claim in CLAIMS if claim.name in set(comparisons.claim)]
    labels = {claim.name: list(dict.fromkeys(_difference_labels(comparisons[comparisons.claim == claim.name]))) for claim in claims}
    heights = [_height(labels[claim.name]) for claim in claims]
    figure = new_figure(max(6.9, 2.3 + 2.6 * len(streams)), 0.7 + sum(0.5 + 0.24 * height for height in heights))
    ratios = [height + 0.4 for height in heights]
    grid = figure.subplots(len(claims), len(streams), sharex="row", sharey="row", squeeze=False, height_ratios=ratios)
    for claim, row in zip(claims, grid, strict=True):
        for axes, (dataset, increment) in zip(row, streams, strict=True):
            of_cell = (comparisons.claim == claim.name) & (comparisons.dataset == dataset) & (comparisons.increment == increment)
            _draw_claim(axes, comparisons[of_cell], labels[claim.name], claim.bound or 0.0)
        row[0].set_yticks(_places(labels[claim.name]), labels[claim.name], fontsize=8)
        row[0].set_ylim(_height(labels[claim.name]) - 0.3, -0.7)
        row[0].set_title(claim.question, fontsize=9, loc="left", fontweight="bold")
    for axes, (dataset, increment) in zip(grid[-1], streams, strict=True):
        axes.set_xlabel(f"{Stream(dataset, increment).label}: difference (points)", fontsize=9)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", ncols=2, fontsize=8, handletextpad=0.4, columnspacing=1.2)
    return figure


def _draw_claim(axes: "Axes", comparisons: "pd.DataFrame", labels: Sequence[str], bound: float) -> None:
    axes.axvline(bound, color=GREY, linewidth=1, linestyle="--" if bound else "-")
    axes.tick_params(labelsize=8)
    for offset, metric, color, marker, face, theirs in ((-0.17, "last", BLUE, "o", BLUE, "x"), (0.17, "avg", ORANGE, "s", "white", "+")):
        name = METRICS[metric]
        axes.plot([], [], color=color, marker=marker, markerfacecolor=face, markersize=5, label=f"{name}, with 95 % interval")
        axes.plot([], [], color=GREY, marker=theirs, linewidth=0, markersize=5, label=f"{name} in the paper")
        of_metric = comparisons[comparisons.metric == metric]
        for label, test in zip(_difference_labels(of_metric), of_metric.to_dict("records"), strict=True):
            place = _places(labels)[labels.index(label)] + offset
            _draw_interval(axes, place, test, color, marker, face)
            axes.plot([test["paper"]], [place], color=GREY, marker=theirs, markersize=5, linewidth=0)


def _difference_labels(comparisons: "pd.DataFrame") -> list[str]:
    rows = comparisons.to_dict("records")
    methods = [Method(row["adapter"], row["branch"], row["layers"], row["variant"]) for row in rows]
    return [_row_label(method, row["settings"].split("; ")) for method, row in zip(methods, rows, strict=True)]


def _is_gapless(comparisons: "pd.DataFrame") -> bool:
    """Whether every row of every claim has a comparison in every column of `draw_claims`."""
    rows = set(zip(comparisons.claim, _difference_labels(comparisons), strict=True))
    marked = set(zip(comparisons.claim, _difference_labels(comparisons), comparisons.dataset, comparisons.increment, strict=True))
    return len(marked) == len(rows) * len(set(zip(comparisons.dataset, comparisons.increment, strict=True)))


def claims_pictures(section: Section, comparisons: "pd.DataFrame") -> Iterator[Picture]:
    """One picture a data set of what the claims rest on; the two data sets beside each other are its increments."""
    of_claims = comparisons[comparisons.claim != ""] if len(comparisons) else comparisons
    for dataset in dict.fromkeys(stream.dataset for stream in section.streams):
        data = of_claims[of_claims.dataset == dataset] if len(of_claims) else of_claims
        if len(data):
            name = DATASETS.get(dataset, dataset)
            what = (
                "Mean paired difference of each method to the one that the question names, with the 95 % interval where there are seeds "
                "for one (where freezing leaves nothing that learns, the other is zero-shot CLIP). Grey: the same difference of the "
                "published numbers. Line: the bound that the question asks about."
            )
            what += "" if _is_gapless(data) else " Empty: not run, or without a seed that both methods have."
            title = f"The paper's claims on {name}"
            yield Picture(f"claims-{dataset}", title, f"{section.title}. {what}", draw_claims(data), data)


def draw_memory(frame: "pd.DataFrame") -> "Figure":
    """Table 5 as bars: the paper's beside ours."""
    figure = new_figure(6.9, 3.2)
    grid = figure.subplots(1, frame.adapter.nunique(), sharey=True, squeeze=False)[0]
    for axes, (adapter, rows) in zip(grid, frame.groupby("adapter", sort=False), strict=True):
        places = np.arange(len(rows))
        for offset, column, color, hatch, label in (
            (-0.2, "paper_gb", "#BBBBBB", "", "paper (GB)"),
            (0.2, "peak_gib", BLUE, "//", "ours (GiB)"),
        ):
            bars = axes.bar(places + offset, rows[column], 0.4, color=color, edgecolor="white", hatch=hatch, label=label)
            axes.bar_label(bars, [f"{value:.1f}" if np.isfinite(value) else "" for value in rows[column]], fontsize=8, padding=2)
        axes.set_xticks(places, ["first order" if setting == "fo" else f"{setting}" for setting in rows.setting], fontsize=9)
        axes.set_title(str(adapter), fontsize=10)
        axes.margins(y=0.1)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x", visible=False)
    grid[0].set_ylabel("peak memory of a step")
    put_legend(figure, grid[0])
    return figure


FIGURES = (
    Plan(
        2,
        "Loss by branch that learns by zeroth order",
        draw_losses,
        (("none", "none", "none"), ("dual", "all", "conservative"), ("vision", "all", "conservative"), ("language", "all", "conservative")),
    ),
    Plan(3, "Loss with hop_odd", draw_losses, (("dual", "hop_odd", "conservative"), ("language", "hop_odd", "conservative"))),
    Plan(
        4,
        "Gradient variance across layers, four layer plans of the language branch",
        draw_units,
        tuple(("language", plan, "conservative") for plan in ("hop_odd", "hop_even", "prefix", "suffix")),
    ),
    *(
        Plan(
            number,
            f"Gradient variance across layers by branch, {plan}",
            draw_units,
            (("none", "none", "none"), *((branch, plan, "conservative") for branch in ("dual", "vision", "language"))),
        )
        for number, plan in ((5, "hop_odd"), (6, "hop_even"))
    ),
    Plan(
        7,
        "Gradient variance across layers with and without MoZO",
        draw_mozo,
        tuple(("dual", plan, variant) for plan in ("hop_odd", "hop_even") for variant in ("conservative", "mozo")),
    ),
    Plan(8, "Significance over seeds", draw_seeds, ()),
)


def pictures_of(section: Section) -> Iterator[Picture]:
    """Figures 2 to 8 for every data set of a section; where there is nothing to draw, with the reason.

    The paper's adapter is moe; another one's figures are there where there is something to draw.
    """
    others = sorted({entry.method.adapter for entry in section.entries} - {"moe", ZERO_SHOT.adapter})
    for plan in FIGURES:
        for stream in section.streams:
            yield _picture(section, stream, plan, "moe")
            more = [_picture(section, stream, plan, adapter) for adapter in others if plan.methods]
            yield from (picture for picture in more if picture.figure is not None)


def _picture(section: Section, stream: Stream, plan: Plan, adapter: str) -> Picture:
    methods = plan.of(adapter)
    suffix = "" if adapter == "moe" else f"-{adapter}"
    name = f"figure{plan.number}-{stream.slug}{suffix}"
    title = f"Figure {plan.number}. {plan.title}; {stream.label}{suffix.replace('-', ', ')}"
    try:
        # What a figure is about is the variant of its last method; the others are for comparison.
        subjects = [method for method in methods if method.variant == methods[-1].variant]
        if methods and not any(_entries(section, stream, method) for method in subjects):
            raise NothingToDraw(f"not run: {'; '.join(method.short for method in subjects)}")
        figure, data, what = plan.draw(section, stream, methods)
    except NothingToDraw as reason:
        return Picture(name, title, str(reason))
    absent = [method.short for method in methods if _only(data, method).empty]
    missing = f" Without: {'; '.join(absent)} (not run, or not recorded)." if absent else ""
    return Picture(name, title, f"{section.title}. {what} From {_sources(data)}.{missing}", figure, data)


def _sources(data: "pd.DataFrame") -> str:
    """The methods and seeds that a figure's data are from; methods with the same seeds together."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for (*cell, note), lines in data.groupby(["adapter", "branch", "layers", "variant", "settings"], sort=False):
        by_seeds.setdefault(tuple(sorted(set(lines.seed))), []).append(Method(*cell).label + (f" ({note})" if note else ""))
    runs = sum(len(seeds) * len(labels) for seeds, labels in by_seeds.items())
    texts = [f"{'seeds' if len(s) > 1 else 'seed'} {', '.join(map(str, s))} of {'; '.join(labels)}" for s, labels in by_seeds.items()]
    return f"{runs} run{'s' if runs > 1 else ''}: {', and '.join(texts)}"


def _entries(section: Section, stream: Stream, method: Method) -> list[Entry]:
    """The runs of a cell; of several variants the plainest."""
    return next((found for note in section.notes(method) if (found := section.find(stream, method, note))), [])


def _gathered(
    section: Section, stream: Stream, methods: Iterable[Method], read: Callable[[Entry], "pd.DataFrame"]
) -> "pd.DataFrame | None":
    """The records of all runs of the methods below each other, each line with its cell, run and seed; None where there are none."""
    import pandas as pd

    parts = []
    for method in methods:
        for entry in _entries(section, stream, method):
            records = read(entry)
            if len(records):
                columns = {**cell_columns(stream, method, entry.note), "run": entry.run.name, "seed": entry.run.seed}
                parts.append(pd.DataFrame([columns]).merge(records, how="cross"))
    return pd.concat(parts, ignore_index=True) if parts else None


def _only(data: "pd.DataFrame", method: Method) -> "pd.DataFrame":
    return data[(data.branch == method.branch) & (data.layers == method.layers) & (data.variant == method.variant)]


def _longest(section: Section, stream: Stream, methods: Iterable[Method]) -> Entry:
    return max((e for method in methods for e in _entries(section, stream, method)), key=lambda e: len(e.run.records.steps))

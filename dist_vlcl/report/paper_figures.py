"""Figures 2 to 8 of the paper and its claims as pictures, each with the data that it shows as a tidy table."""

import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_vlcl.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, draw_borders, put_legend, smoothed
from dist_vlcl.report.records import CELL, TASKS, gather, read_units, step_frame
from dist_vlcl.report.statistics import CLAIMS, GROUP, METHOD, in_paper_order, paired_test
from dist_vlcl.report.tables import DATASETS, METRICS, method_label, tasks_label

Drawn = tuple[Figure, pd.DataFrame, str]  # the data that the figure shows, and its caption
# Colour, line and marker each distinguish the curves: for colour-blind readers, in grey print, and where curves cross.
LOOKS: tuple[tuple[str, Any, str], ...] = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, (0, (1, 1)), "D"))
LABEL_WIDTH = 40  # characters of a line beside a row
BRANCHES, TOWERS = ("dual", "vision", "language"), ("vision", "language")
# Statistic of a unit -> its column, how it is reduced over steps, the label of its axis. The caption explains the labels.
UNIT_STATISTICS = {
    "coordinate_variance": ("gradient_variance", "mean", "variance over\ncoordinates"),
    "norm_variance": ("gradient_norm", "var", "variance over\nsteps of the norm"),
    "mean_update": ("update_norm", "mean", "norm of\nthe update"),
}
CLAIM_MARKS = {"last": (-0.17, BLUE, "o", BLUE, "x"), "avg": (0.17, ORANGE, "s", "white", "+")}  # offset, colour, ours, face, theirs


@dataclass(frozen=True)
class Picture:
    """A figure with its file's name, its title, its caption and its data."""

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


def draw_losses(runs: pd.DataFrame, methods: Sequence[str]) -> Drawn | None:
    """Draw the base loss of every step, smoothed within a task: the mean over seeds, and the range of the seeds as a band."""
    data = gather(runs, step_frame).drop(columns=["peak_gib", "allocated_gib"], errors="ignore").dropna()
    if data.empty:
        return None
    figure = Figure(figsize=(6.9, 3.9))
    axes = figure.subplots()
    for (color, line, _), method in zip(LOOKS, methods, strict=False):
        for index, (_, curves) in enumerate(data[data.method == method].groupby("task")):
            by_seed = smoothed(curves.pivot_table(index="step", columns="run", values="loss").dropna())
            axes.plot(by_seed.index, by_seed.mean(axis=1), color=color, linestyle=line, linewidth=1.6, label="" if index else method)
            axes.fill_between(by_seed.index, by_seed.min(axis=1), by_seed.max(axis=1), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="loss")
    put_legend(figure, axes, columns=2)
    draw_borders(axes, data)
    caption = "The loss of the global batch, smoothed over neighbouring steps within a task. Lines: mean over seeds; bands: range."
    return figure, data, caption


def draw_units(runs: pd.DataFrame, methods: Sequence[str], names: Sequence[str] = ("coordinate_variance", "norm_variance")) -> Drawn | None:
    """Draw statistics of every unit's gradient or estimate by layer, one column per tower."""
    data = gather(runs, unit_statistics)
    if data.empty:
        return None
    figure = Figure(figsize=(6.9, 0.9 + 2.0 * len(names)))
    grid = figure.subplots(len(names), len(TOWERS), sharex="col", sharey="row", squeeze=False)
    every = -(-int(data.layer.max()) // 12)
    for (name, tower), axes in zip(itertools.product(names, TOWERS), grid.flat, strict=True):
        for index, method in enumerate(methods):
            units = data[(data.method == method) & (data.tower == tower)]
            # Side by side, because first-order units have similar values in all plans.
            _draw_unit_curve(axes, units, name, LOOKS[index], offset=0.13 * (index - (len(methods) - 1) / 2))
        axes.set(yscale="log", xlabel="layer", ylabel=UNIT_STATISTICS[name][2], xticks=range(1, int(data.layer.max()) + 1, every))
        axes.set_title(f"{tower} tower" if name == names[0] else "", fontsize=10)
        axes.label_outer()
    put_legend(figure, grid[0, 0], columns=2)
    caption = (
        "By row: the variance over the coordinates of a unit's gradient, mean over steps; the variance over steps of its norm; for MoZO "
        "also the norm of the applied update, mean over steps. Filled marks: first order, the gradient. Open marks: zeroth order, the "
        "estimate before any sign. Lines join layers of one order; marks: mean over seeds; bars: range. By construction an estimate's "
        "variance (s²) is far larger than a gradient's (|g|²/n), and nearly equal for all units that share an estimate."
    )
    return figure, data, caption


def unit_statistics(folder: Any) -> pd.DataFrame:
    """Return one row per trained unit of a run: tower, layer, order, steps, and UNIT_STATISTICS over its steps."""
    units = read_units(folder).to_pandas()
    if units.empty:
        return units
    known = units[(units.order != "frozen") & np.isfinite(units.gradient_variance)].rename(columns={"branch": "tower"})
    statistics: dict[str, Any] = {name: reduced[:2] for name, reduced in UNIT_STATISTICS.items()}
    return known.groupby(["tower", "layer", "order"]).agg(steps=("step", "size"), **statistics).reset_index()


def _draw_unit_curve(axes: Axes, units: pd.DataFrame, name: str, look: tuple[str, Any, str], offset: float) -> None:
    color, line, marker = look
    over_seeds = units.groupby(["method", "layer", "order"])[name].agg(["mean", "min", "max"]).reset_index()
    for number, ((method, order), part) in enumerate(over_seeds.groupby(["method", "order"])):
        bars = np.maximum([part["mean"] - part["min"], part["max"] - part["mean"]], 0)
        face = color if order == "first" else "white"
        looks: dict[str, Any] = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "markerfacecolor": face}
        label = "" if number else method
        axes.errorbar(part.layer + offset, part["mean"], bars, linewidth=0.9, elinewidth=0.8, label=label, **looks)


def _first_and_each_branch(layers: str) -> list[str]:
    return ["first order", *(f"{branch} {layers}, conservative" for branch in BRANCHES)]


FOUR_PLANS = [f"language {plan}, conservative" for plan in ("hop_odd", "hop_even", "prefix", "suffix")]
MOZO_OR_NOT = [f"dual {plan}, {variant}" for plan in ("hop_odd", "hop_even") for variant in ("conservative", "mozo")]
draw_units_and_updates = partial(draw_units, names=tuple(UNIT_STATISTICS))
FIGURES: dict[int, tuple[str, Callable[[pd.DataFrame, Sequence[str]], Drawn | None], list[str]]] = {  # title, function, methods
    2: ("Loss by the branch that learns by zeroth order", draw_losses, _first_and_each_branch("all")),
    3: ("Loss with hop_odd", draw_losses, ["dual hop_odd, conservative", "language hop_odd, conservative"]),
    4: ("Gradient variance by layer, four layer plans of the language branch", draw_units, FOUR_PLANS),
    5: ("Gradient variance by layer and branch, hop_odd", draw_units, _first_and_each_branch("hop_odd")),
    6: ("Gradient variance by layer and branch, hop_even", draw_units, _first_and_each_branch("hop_even")),
    7: ("Gradient variance by layer with and without MoZO", draw_units_and_updates, MOZO_OR_NOT),
}


def draw_seeds(results: pd.DataFrame) -> Drawn | None:
    """Draw Last and Avg of every seed of every method, with the mean and its 95 % interval."""
    trained = in_paper_order(results[results.variant != "zero_shot"], METHOD)
    methods = list(trained.groupby(METHOD, sort=False))
    if max((len(seeds) for _, seeds in methods), default=0) < 2:
        return None
    labels = [_row_label(method_label(*key[:4]), key[4]) for key, _ in methods]
    figure = Figure(figsize=(9.0, 1.1 + len(labels) * _row_height(labels)))
    both = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(both, METRICS.items(), strict=True):
        for row, (_, seeds) in enumerate(methods):
            first = row == 0
            axes.plot(seeds[metric], [row] * len(seeds), color=GREY, marker="|", linewidth=0, markersize=9, label="a seed" if first else "")
            test, label = paired_test(seeds[metric].to_numpy()), "mean, 95 % interval" if first else ""
            _draw_interval(axes, row, test, BLUE, "o", BLUE, label)
        if len(zero_shot := results[results.variant == "zero_shot"]):
            axes.axvline(zero_shot[metric].mean(), color=GREY, linestyle="--", linewidth=1, label="zero-shot CLIP")
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel=f"{name} (%)")
    both[0].set_yticks(range(len(labels)), labels, fontsize=9)
    put_legend(figure, both[0])
    caption = "Last and Avg of every seed, with the mean and its 95 % interval. The paper's figure shows only whole branches."
    return figure, trained[[*CELL, "other_settings", "run", "seed", *METRICS]], caption


def _draw_interval(axes: Axes, place: float, test: Any, color: str, marker: str, face: str, label: str = "") -> None:
    reach = None if np.isnan(test["low"]) else [[test["mean"] - test["low"]], [test["high"] - test["mean"]]]
    looks: dict[str, Any] = {"color": color, "fmt": marker, "markerfacecolor": face, "markersize": 5, "capsize": 2.5}
    axes.errorbar([test["mean"]], [place], xerr=reach, label=label, **looks)


def _row_label(name: str, settings: str) -> str:
    """Return the text beside a row in lines of at most LABEL_WIDTH characters. Every setting begins a line."""
    return "\n".join(line for text in (name, *settings.split("; ")) for line in textwrap.wrap(text, LABEL_WIDTH))


def _row_height(labels: Sequence[str]) -> float:
    """Return how high a row must be for the longest of these labels, in inches."""
    return 0.27 + 0.17 * max(label.count("\n") for label in labels)


def draw_claims(comparisons: pd.DataFrame) -> Drawn:
    """Draw the differences that bear on each claim of the paper: one row of axes per claim, one column per data set."""
    rows = comparisons.assign(label=[_row_label(method_label(*key[:4]), key[4]) for key in comparisons[METHOD].to_numpy()])
    columns = list(rows.groupby(TASKS, sort=False))
    claims = [name for name in CLAIMS if name in set(rows.claim)]
    labels = {name: list(rows[rows.claim == name].label.unique()) for name in claims}
    heights = [0.5 + _row_height(labels[name]) * len(labels[name]) for name in claims]
    figure = Figure(figsize=(max(6.9, 2.3 + 2.6 * len(columns)), 0.7 + sum(heights)))
    grid = figure.subplots(len(claims), len(columns), sharex="row", sharey="row", squeeze=False, height_ratios=heights)
    for name, row in zip(claims, grid, strict=True):
        for axes, (_, of_column) in zip(row, columns, strict=True):
            _draw_claim(axes, of_column[of_column.claim == name], labels[name], CLAIMS[name].bound or 0.0)
        row[0].set_yticks(range(len(labels[name])), labels[name], fontsize=8)
        row[0].set_ylim(len(labels[name]) - 0.3, -0.7)
        row[0].set_title(CLAIMS[name].statement, fontsize=9, loc="left", fontweight="bold")
    for axes, (tasks, _) in zip(grid[-1], columns, strict=True):
        axes.set_xlabel(f"{tasks_label(*tasks)}: difference (points)", fontsize=9)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", ncols=2, fontsize=8, handletextpad=0.4, columnspacing=1.2)
    caption = (
        "Mean paired difference of each method to the one that the claim names, with its 95 % interval. Grey: the same difference of the "
        "published numbers. Line: the bound of the claim. Rows without a mark were not run, or have no seed in common."
    )
    return figure, comparisons, caption


def _draw_claim(axes: Axes, comparisons: pd.DataFrame, labels: list[str], bound: float) -> None:
    axes.axvline(bound, color=GREY, linewidth=1, linestyle="--" if bound else "-")
    axes.tick_params(labelsize=8)
    for metric, (offset, color, marker, face, theirs) in CLAIM_MARKS.items():
        name = METRICS[metric]
        axes.plot([], [], color=color, marker=marker, markerfacecolor=face, markersize=5, label=f"{name}, with 95 % interval")
        axes.plot([], [], color=GREY, marker=theirs, linewidth=0, markersize=5, label=f"{name} in the paper")
        for _, test in comparisons[comparisons.metric == metric].iterrows():
            place = labels.index(test.label) + offset
            _draw_interval(axes, place, test, color, marker, face)
            axes.plot([test.paper], [place], color=GREY, marker=theirs, markersize=5, linewidth=0)


def pictures_of(complete: pd.DataFrame, results: pd.DataFrame, comparisons: pd.DataFrame) -> list[Picture]:
    """Return every picture that has data: the claims and Figures 2 to 8, each per data set and group of settings."""
    found: dict[str, Picture] = {}

    def add(name: str, title: str, settings: str, drawn: Drawn | None) -> None:
        if drawn:
            figure, data, caption = drawn
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
            name = next(n for n in (name, *(f"{name}-{k}" for k in range(2, len(found) + 3))) if n not in found)
            caption += f" Other settings than the paper's: {settings}." if settings else ""
            found[name] = Picture(name, title, caption, figure, data)

    of_accuracy = comparisons[(comparisons.claim != "") & comparisons.metric.isin(list(METRICS))]
    for (dataset, settings), tests in of_accuracy.groupby(["dataset", "shared_settings"], sort=False):
        add(f"claims-{dataset}", f"The paper's claims on {DATASETS.get(dataset, dataset)}", settings, draw_claims(tests))
    trained = in_paper_order(complete[complete.variant != "zero_shot"], CELL)
    groups = list(trained.groupby([*GROUP, "adapter"], sort=False))
    for (number, (title, *_)), ((dataset, increment, settings, adapter), runs) in itertools.product(FIGURES.items(), groups):
        suffix, where = ("", "") if adapter == "moe" else (f"-{adapter}", f", {adapter}")
        title = f"Figure {number}. {title}; {tasks_label(dataset, increment)}{where}"
        add(f"figure{number}-{dataset}-inc{increment}{suffix}", title, settings, draw_figure(number, runs))
    for (dataset, increment, settings), runs in in_paper_order(results, CELL).groupby(GROUP, sort=False):
        title = f"Figure 8. Results over seeds; {tasks_label(dataset, increment)}"
        add(f"figure8-{dataset}-inc{increment}", title, settings, draw_seeds(runs))
    return list(found.values())


def draw_figure(number: int, runs: pd.DataFrame) -> Drawn | None:
    """Draw Figure 2 to 7 from the runs of one group; None without a run of the variant that it is about: that of its last method."""
    _, draw, methods = FIGURES[number]
    runs = runs.assign(method=[method_label("", *fields) for fields in runs[CELL[3:]].to_numpy()])
    if number == 4 and (by_unit := runs.method_settings.str.contains("zo.granularity=unit", regex=False)).any():
        runs = runs[by_unit]  # with one slope for a whole branch, all its layers have the same variance
    fewest = runs.groupby("method").method_settings.transform(lambda texts: min(texts, key=lambda text: (len(text), text)))
    runs = runs[runs.method.isin(methods) & (runs.method_settings == fewest)]  # of several settings of a method the fewest
    is_subject = runs.variant == methods[-1].split(", ")[-1]
    drawn = draw(runs[[*CELL, "method", "other_settings", "run", "seed", "path"]], methods) if is_subject.any() else None
    if drawn is None:
        return None
    figure, data, caption = drawn
    absent = [method for method in methods if method not in set(data.method)]
    caption += f" From {data.run.nunique()} runs." + (f" Without a run or its records: {'; '.join(absent)}." if absent else "")
    return figure, data, caption

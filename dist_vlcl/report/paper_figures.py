"""Pictures of a report: of each run, and Figures 2 to 8 of the paper; each with the data that it shows as a tidy table."""

import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from dist_vlcl.masking import explained
from dist_vlcl.reading import or_warn
from dist_vlcl.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, draw_borders, draw_loss, plot_accuracy, plot_matrix, put_legend
from dist_vlcl.report.records import CELL, gather, read_records, read_units, step_frame
from dist_vlcl.report.statistics import GROUP, METHOD, in_paper_order, paired_test
from dist_vlcl.report.tables import METRICS, UNITS_CAPTION, method_label, tasks_label

# Colour, line and marker each distinguish the curves: for colour-blind readers, in grey print, and where curves cross.
LOOKS: tuple[tuple[str, Any, str], ...] = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, (0, (1, 1)), "D"))
LABEL_WIDTH = 40  # characters of a line beside a row
MOST_RUNS = 24  # that have pictures of their own, which take up to a second a run
BRANCHES, TOWERS = ("dual", "vision", "language"), ("vision", "language")
# Statistic of a unit -> its column, how it is reduced over steps, the label of its axis. The caption explains the labels.
UNIT_STATISTICS = {
    "coordinate_variance": ("gradient_variance", "mean", "variance over\ncoordinates"),
    "norm_variance": ("gradient_norm", "var", "variance over\nsteps of the norm"),
    "mean_update": ("update_norm", "mean", "norm of\nthe update"),
}


class ShortLog(LogFormatter):
    """Labels of a logarithmic axis with two digits, at the ticks for which there is room."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick, "" for none."""
        return f"{x:.2g}".replace("-", "−") if super().__call__(x, pos) else ""


@dataclass(frozen=True)
class Picture:
    """A figure, the data that it shows, and its caption; in a report also the name of its file and its title."""

    figure: Figure
    data: pd.DataFrame
    caption: str
    name: str = ""
    title: str = ""


def draw_losses(runs: pd.DataFrame, methods: Sequence[str]) -> Picture | None:
    """Draw the base loss of every step, smoothed within a task: the mean over seeds, and the range of the seeds as a band."""
    data = gather(runs, step_frame).drop(columns=["peak_gib", "allocated_gib"]).dropna()
    if data.empty:
        return None
    figure = Figure(figsize=(6.9, 3.9))
    axes = figure.subplots()
    for (color, line, _), method in zip(LOOKS, methods, strict=False):
        draw_loss(axes, data[data.method == method], method, color=color, linestyle=line)
    put_legend(figure, axes)
    draw_borders(axes, data)
    caption = "The loss of the global batch, smoothed over neighbouring steps within a task. Lines: mean over seeds; bands: range."
    return Picture(figure, data, caption)


def draw_units(runs: pd.DataFrame, methods: Sequence[str], read: Callable[[Path], pd.DataFrame] | None = None) -> Picture | None:
    """Draw statistics of every unit's gradient or estimate by layer, one row per statistic, one column per tower.

    read: returns the `unit_statistics` of a run's path; those of its folder by default.
    """
    data = gather(runs, read or unit_statistics)
    if data.empty:
        return None
    figure = Figure(figsize=(6.9, 6.9))
    grid = figure.subplots(len(UNIT_STATISTICS), len(TOWERS), sharex="col", sharey="row")
    for (name, tower), axes in zip(itertools.product(UNIT_STATISTICS, TOWERS), grid.flat, strict=True):
        for index, method in enumerate(methods):
            units = data[(data.method == method) & (data.tower == tower)]
            # Side by side, because first-order units have similar values in all plans.
            _draw_unit_curve(axes, units, name, LOOKS[index], offset=0.13 * (index - (len(methods) - 1) / 2))
        axes.set(yscale="log", xlabel="layer", ylabel=UNIT_STATISTICS[name][2])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(ShortLog())  # the default one writes mathematics, which is shown as it is
        axes.yaxis.set_minor_formatter(ShortLog(labelOnlyBase=False))
        axes.label_outer()
    for axes, tower in zip(grid[0], TOWERS, strict=True):
        axes.set_title(f"{tower} tower", fontsize=10)
    put_legend(figure, grid[0, 0])
    return Picture(figure, data, UNITS_CAPTION)


def unit_statistics(folder: Path) -> pd.DataFrame:
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
        axes.errorbar(part.layer + offset, part["mean"], bars, linewidth=0.9, elinewidth=0.8, label="" if number else method, **looks)


def _first_and_each_branch(layers: str) -> list[str]:
    return ["first order", *(f"{branch} {layers}, conservative" for branch in BRANCHES)]


FOUR_PLANS = [f"language {plan}, conservative" for plan in ("hop_odd", "hop_even", "prefix", "suffix")]
MOZO_OR_NOT = [f"dual {plan}, {variant}" for plan in ("hop_odd", "hop_even") for variant in ("conservative", "mozo")]
FIGURES: dict[int, tuple[str, Callable[[pd.DataFrame, Sequence[str]], Picture | None], list[str]]] = {  # title, function, methods
    2: ("Loss by the branch that learns by zeroth order", draw_losses, _first_and_each_branch("all")),
    3: ("Loss with hop_odd", draw_losses, ["dual hop_odd, conservative", "language hop_odd, conservative"]),
    4: ("Gradient variance by layer, four layer plans of the language branch", draw_units, FOUR_PLANS),
    5: ("Gradient variance by layer and branch, hop_odd", draw_units, _first_and_each_branch("hop_odd")),
    6: ("Gradient variance by layer and branch, hop_even", draw_units, _first_and_each_branch("hop_even")),
    7: ("Gradient variance by layer with and without MoZO", draw_units, MOZO_OR_NOT),
}


def draw_figure(number: int, runs: pd.DataFrame) -> Picture | None:
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
    absent = [method for method in methods if method not in set(drawn.data.method)]
    without = f" Without a run or its records: {'; '.join(absent)}." if absent else ""
    shown = runs[runs.run.isin(drawn.data.run) & (runs.method_settings != "")].drop_duplicates("method")
    settings = "".join(f" {row.method}: {row.method_settings}." for row in shown.itertuples())
    return replace(drawn, caption=f"{drawn.caption} From {drawn.data.run.nunique()} runs.{without}{settings}")


def draw_seeds(results: pd.DataFrame) -> Picture | None:
    """Draw Last and Avg of every seed of every method, with the mean and its 95 % interval; None without a second seed.

    Settings that all methods share are not shown, nor intervals of two seeds, which are 13 times as wide as the seeds are apart.
    """
    trained = in_paper_order(results[results.variant != "zero_shot"], METHOD)
    methods = list(trained.groupby(METHOD, sort=False))
    if max((len(seeds) for _, seeds in methods), default=0) < 2:
        return None
    settings = [key[4].split("; ") for key, _ in methods]
    common = set.intersection(*map(set, settings)) if len(settings) > 1 else set()
    texts = [  # every setting begins a line
        [method_label(*key[:4]), *(text for text in of_method if text not in common)]
        for (key, _), of_method in zip(methods, settings, strict=True)
    ]
    labels = ["\n".join(itertools.chain(*(textwrap.wrap(text, LABEL_WIDTH) for text in of_method))) for of_method in texts]
    height = 0.27 + 0.17 * max(label.count("\n") for label in labels)
    figure = Figure(figsize=(9.0, 1.1 + len(labels) * height))
    both = figure.subplots(1, 2, sharey=True)
    rows = trained.groupby(METHOD, sort=False).ngroup()
    for axes, (metric, name) in zip(both, METRICS.items(), strict=True):
        axes.plot(trained[metric], rows, color=GREY, marker="|", linewidth=0, markersize=9, label="a seed")
        tests = pd.DataFrame([paired_test(seeds[metric].to_numpy()) for _, seeds in methods])
        reach = [part.where(tests.seeds > 2) for part in (tests["mean"] - tests.low, tests.high - tests["mean"])]
        axes.errorbar(tests["mean"], tests.index, xerr=reach, color=BLUE, fmt="o", markersize=5, capsize=2.5, label="mean, 95 % interval")
        if len(zero_shot := results[(results.variant == "zero_shot") & results.seed.isin(trained.seed)]):
            axes.axvline(zero_shot[metric].mean(), color=GREY, linestyle="--", linewidth=1, label="zero-shot CLIP")
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel=f"{name} (%)")
    both[0].set_yticks(range(len(labels)), labels, fontsize=9)
    put_legend(figure, both[0])
    caption = "Last and Avg of every seed, with the mean and, of three seeds or more, its 95 % interval."
    caption += " The paper's figure shows only whole branches."
    return Picture(figure, trained[[*CELL, "other_settings", "run", "seed", *METRICS]], caption)


def pictures_of_runs(complete: pd.DataFrame) -> Iterator[Picture]:
    """Yield the accuracy matrix and the curve of each run, of at most MOST_RUNS runs: those with the best Last."""
    shown = complete.sort_values("last", ascending=False, kind="stable")[:MOST_RUNS]
    rest = f"; the other {len(complete) - len(shown)} runs have theirs in their folders plots/" if len(complete) > len(shown) else ""
    for number, path in enumerate(shown.path, start=1):
        records = read_records(path)
        of_tasks = pd.DataFrame(records["task"]).drop(columns=["kind", "crc"], errors="ignore")
        for name, plot, caption in (
            ("accuracy_matrix", plot_matrix, f"Row t: accuracy on each task after training on task t{rest}."),
            ("accuracy", plot_accuracy, "Accuracy on all classes seen so far."),
        ):
            drawn = explained(f"{path.name}: no picture")(plot)  # an error names the run
            if figure := or_warn(partial(drawn, records), None):
                yield Picture(figure, of_tasks, caption, f"{name}-{number}", path.name)


def pictures_of(complete: pd.DataFrame, results: pd.DataFrame) -> list[Picture]:
    """Return Figures 2 to 8 where they have data, each per data set and group of settings."""
    trained, found = in_paper_order(complete[complete.variant != "zero_shot"], CELL), dict[str, Picture]()
    groups, all_adapters = trained.groupby([*GROUP, "adapter"], sort=False), in_paper_order(results, CELL).groupby(GROUP, sort=False)
    drawn = [(n, title, key, draw_figure(n, runs)) for n, (title, *_) in FIGURES.items() for key, runs in groups]
    drawn += [(8, "Results over seeds", (*key, "moe"), draw_seeds(runs)) for key, runs in all_adapters]
    for number, title, (dataset, increment, settings, adapter), picture in drawn:
        if picture is None:
            continue
        suffix, where = ("", "") if adapter == "moe" else (f"-{adapter}", f", {adapter}")
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"figure{number}-{dataset}{f'-inc{increment}' if increment else ''}{suffix}")
        name = next(n for n in (name, *(f"{name}-{k}" for k in range(2, len(found) + 3))) if n not in found)
        title = f"Figure {number}. {title}; {tasks_label(dataset, increment)}{where}"
        caption = f"{picture.caption} Other settings than the paper's: {settings}." if settings else picture.caption
        found[name] = replace(picture, name=name, title=title, caption=caption)
    return list(found.values())

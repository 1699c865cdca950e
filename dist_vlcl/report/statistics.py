"""Averages over seeds, paired differences with their intervals, and what these say about the paper's claims."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from dist_vlcl.report.records import CELL, TASKS, UNTRAINED, WITHOUT_ZEROTH
from dist_vlcl.report.tables import DATASETS, METRICS, UNKNOWN, method_label

GROUP = [*TASKS, "shared_settings"]  # runs are compared within a group only
METHOD = ["adapter", "branch", "layers", "variant", "method_settings"]
ORDER = {  # as the paper lists them
    "dataset": tuple(DATASETS),
    "adapter": ("", "moe", "lora"),
    "branch": ("none", "dual", "vision", "language"),
    "layers": ("none", "all", "hop_odd", "hop_even", "prefix", "suffix"),
    "variant": ("zero_shot", "none", "frozen", "naive", "sign", "conservative", "mozo"),
}
MARGIN = 1.0  # points: a method that is less than this behind has reached the other
SUPPORTED, CONTRADICTED, NOT_DECIDED = "supported", "contradicted", "not decided"
RULE = (
    f"A claim is *{SUPPORTED}* if the whole 95 % interval of the mean paired difference (Δ) lies on the claim's side of its bound, "
    f"*{CONTRADICTED}* if the whole interval lies on the other side, and *{NOT_DECIDED}* if the interval contains the bound. "
    f"{UNKNOWN}: no interval, because there is one seed or all differences are equal. "
    "The intervals are not corrected for their number: one in twenty misses the true difference."
)


@dataclass(frozen=True)
class Claim:
    """A statement about a difference of two methods in points. Without a bound it says that there is a difference in either direction."""

    statement: str
    condition: str  # on the difference, as it is printed
    bound: float | None = 0.0
    is_below: bool = False  # the claim is that the difference is less than the bound

    def verdict(self, low: float, high: float) -> str:
        """Return what the 95 % interval of the mean difference says, by RULE."""
        if math.isnan(low):
            return UNKNOWN
        if self.bound is None:
            return f"{SUPPORTED} (higher)" if low > 0 else f"{SUPPORTED} (lower)" if high < 0 else NOT_DECIDED
        if low <= self.bound <= high:
            return NOT_DECIDED
        return SUPPORTED if (high < self.bound) == self.is_below else CONTRADICTED


CLAIMS = {
    "dual_behind_first_order": Claim("Zeroth order in both branches is behind first order.", "Δ < 0", is_below=True),
    "language_above_vision": Claim("Zeroth order in the language branch beats zeroth order in vision.", "Δ > 0"),
    "hop_reaches_first_order": Claim("Zeroth order in every other layer reaches first order.", f"Δ > −{MARGIN:g} point", bound=-MARGIN),
    "mozo_above_its_plan": Claim("MoZO beats the same plan without it.", "Δ > 0"),
    "differs_from_control": Claim("Zeroth order differs from freezing the same units.", "Δ ≠ 0", bound=None),
}


def in_paper_order(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return a frame sorted by some columns: data sets and methods as the paper lists them, others by value."""

    def rank(column: pd.Series) -> pd.Series:
        known = ORDER.get(str(column.name), ())
        if column.name == "increment":
            return -column
        return column.map(lambda value: f"{known.index(value) if value in known else len(known)} {value}") if known else column

    return frame.sort_values(list(columns), key=rank, kind="stable", ignore_index=True)


def complete_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose accuracy counts: complete, not cut short, and of runs with equal settings and seed the first."""
    return runs[runs.is_complete & ~runs.is_probe].drop_duplicates([*GROUP, *METHOD, "seed"])


def results_of(complete: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell, setting and seed: the runs of `complete_of`, with the untrained model in every group that it belongs to.

    The untrained model is known from its own runs and from every run that was evaluated before training. How the other runs of a group
    are trained does not matter to it.
    """
    trained, untrained = complete[complete.variant != "zero_shot"], complete[complete.variant == "zero_shot"]
    before = complete[complete.zero_shot_last.notna()].assign(**UNTRAINED, method_settings="")
    before = before.assign(last=before.zero_shot_last, avg=before.zero_shot_avg, other_settings=before.model_settings)
    untrained = pd.concat([untrained, before]).rename(columns={"shared_settings": "measured_in"})
    groups = trained[[*GROUP, "model_settings"]].drop_duplicates()
    untrained = untrained.merge(groups, on=[*TASKS, "model_settings"], how="left")
    untrained = untrained.assign(shared_settings=untrained.shared_settings.fillna(untrained.measured_in))
    untrained["is_own"] = untrained.measured_in == untrained.shared_settings  # a measurement within the group comes first
    untrained = untrained.sort_values("is_own", kind="stable").drop_duplicates([*GROUP, "seed"], keep="last")
    return in_paper_order(pd.concat([trained, untrained[trained.columns]]), [*GROUP, *METHOD, "seed"])


def compare(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair of methods of a group and metric: the mean difference over the seeds that both have, and a paired t-test.

    `low` and `high` bound the 95 % interval; they and `p` are NaN with fewer than two seeds. `claim` and `verdict`: the claim of the paper
    that the difference bears on, if any, and what it says about it. `paper`: the same difference of the published numbers.
    """
    pairs = pd.DataFrame(_pairs(results), columns=[*GROUP, *METHOD, *(f"{name}_2" for name in METHOD), "claim"])
    values = results[[*GROUP, *METHOD, "other_settings", "seed", *METRICS]]
    other = values.drop(columns="other_settings").rename(columns={name: f"{name}_2" for name in (*METHOD, *METRICS)})
    joined = pairs.merge(values).merge(other)
    known = published.set_index(CELL)
    rows = []
    for _, both in joined.groupby(list(pairs.columns), sort=False):
        first = both.iloc[0]
        cells = [tuple(first[TASKS]) + tuple(first[[f"{name}{end}" for name in METHOD[:-1]]]) for end in ("", "_2")]
        for metric in METRICS:
            test = paired_test((both[metric] - both[f"{metric}_2"]).to_numpy())
            rows.append(
                {
                    **first[[*CELL, "other_settings", "shared_settings", "method_settings"]],
                    **{"against": method_label(*cells[1][2:]), "metric": metric, **test},
                    "paper": known[metric].get(cells[0], np.nan) - known[metric].get(cells[1], np.nan),
                    "claim": first.claim,
                    "verdict": CLAIMS[first.claim].verdict(test["low"], test["high"]) if first.claim else "",
                }
            )
    names = [*CELL, "other_settings", "shared_settings", "method_settings", "against", "metric", *paired_test([])]
    return pd.DataFrame(rows, columns=[*names, "paper", "claim", "verdict"])


def _pairs(results: pd.DataFrame) -> Iterator[tuple]:
    """Yield every comparison: a group, a method, another method, and the name of the claim or ""."""
    for group_and_method in results[[*GROUP, *METHOD]].drop_duplicates().itertuples(index=False):
        *_, adapter, branch, layers, variant, settings = group_and_method
        is_zeroth, is_whole = variant not in WITHOUT_ZEROTH, layers == "all"
        if not is_zeroth and variant != "frozen":
            continue
        # A run without zeroth order does not read zo options: it has none of these settings.
        without = "; ".join(text for text in settings.split("; ") if text and not text.startswith("zo."))
        if is_zeroth and is_whole and branch == "dual":
            yield (*group_and_method, *UNTRAINED.values(), "", "differs_from_control")
        elif is_zeroth:
            yield (*group_and_method, adapter, branch, layers, "frozen", without, "differs_from_control")
        behind = "dual_behind_first_order" if is_whole and branch == "dual" else ""
        claim = "hop_reaches_first_order" if layers in ("hop_odd", "hop_even") else behind
        yield (*group_and_method, adapter, "none", "none", "none", without, claim)
        if variant == "mozo":
            yield (*group_and_method, adapter, branch, layers, "conservative", settings, "mozo_above_its_plan")
        if is_whole and branch == "language":
            yield (*group_and_method, adapter, "vision", "all", variant, settings, "language_above_vision")


def paired_test(differences: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return seeds, mean, low, high, p of a t-test of paired differences."""
    found = {"seeds": len(differences), "mean": float(np.mean(differences)) if len(differences) else np.nan}
    if len(differences) < 2 or np.allclose(differences, differences[0], rtol=0, atol=1e-9):
        return {**found, "low": np.nan, "high": np.nan, "p": np.nan}
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return {**found, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def cells_of(results: pd.DataFrame, comparisons: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell, setting and metric: the paper's accuracy and ours (mean, standard deviation with n - 1, number of seeds).

    `seeds` is 0 for a published cell without a run. `difference`: ours less the paper's. `gain`: ours less the control's, over the
    `gain_seeds` that both have, with its 95 % interval. `to_first`: ours less first order's. `paper_to_first`: the same in the paper.
    """
    keys = [*CELL, "other_settings", "metric"]
    once = results.drop_duplicates([*CELL, "other_settings", "seed"])  # the untrained model stands in every group
    ours = once.melt([*CELL, "other_settings"], list(METRICS), "metric").groupby(keys, sort=False).value
    summary = ours.agg(mean="mean", std="std", seeds="count").reset_index()
    paper = published.melt([*CELL, "id", "table"], list(METRICS), "metric", "paper").rename(columns={"id": "paper_id"})
    first = paper[paper.variant == "none"].rename(columns={"paper": "paper_first"})[[*TASKS, "adapter", "metric", "paper_first"]]
    cells = summary.merge(paper, on=[*CELL, "metric"], how="outer").merge(first, on=[*TASKS, "adapter", "metric"], how="left")
    cells = cells.fillna({"other_settings": "", "paper_id": "", "seeds": 0})
    gain = {"mean": "gain", "low": "gain_low", "high": "gain_high", "seeds": "gain_seeds"}
    control = comparisons[comparisons.claim == "differs_from_control"].rename(columns=gain)
    to_first = comparisons[comparisons.against.str.startswith("first order")].rename(columns={"mean": "to_first"})
    for of_comparison in (control[[*keys, *gain.values()]], to_first[[*keys, "to_first"]]):
        cells = cells.merge(of_comparison, on=keys, how="left")
    is_zeroth = ~cells.variant.isin(WITHOUT_ZEROTH)
    cells["difference"] = cells["mean"] - cells.paper
    cells["paper_to_first"] = (cells.paper - cells.pop("paper_first")).where(is_zeroth)
    cells["metric"] = pd.Categorical(cells.metric, list(METRICS))
    return in_paper_order(cells.astype({"seeds": int}), keys)


def missing_of(cells: pd.DataFrame) -> pd.DataFrame:
    """Return one row per published cell that has no run with the paper's settings, and per zeroth-order result without its control."""
    once = cells[cells.metric == "last"]
    run = once[(once.seeds > 0) & (once.other_settings == "")]
    cell = once[(once.paper_id != "") & ~once.paper_id.isin(run.paper_id)].drop_duplicates("paper_id").assign(missing="run")
    is_zeroth = (once.seeds > 0) & ~once.variant.isin(WITHOUT_ZEROTH)
    control = once[is_zeroth & once.gain_seeds.isna()].assign(missing="control")
    return pd.concat([cell.assign(other_settings=""), control])[["missing", *CELL, "other_settings", "paper_id"]]

"""Averages over seeds, paired differences with their intervals, and what these say about the paper's claims."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from dist_vlcl.paper import WALK_OF
from dist_vlcl.report.measures import MEASURES
from dist_vlcl.report.records import CELL, CONTROLS, TASKS, UNTRAINED, WITHOUT_ZEROTH
from dist_vlcl.report.tables import DATASETS, METRICS, RULE_TEXT, UNKNOWN, method_label

GROUP = [*TASKS, "shared_settings"]  # runs are compared within a group only
METHOD = ["adapter", "branch", "layers", "variant", "method_settings"]
ORDER = {  # as the paper lists them
    "dataset": tuple(DATASETS),
    "adapter": ("", "moe", "lora"),
    "branch": ("none", "dual", "vision", "language"),
    "layers": ("none", "all", "hop_odd", "hop_even", "prefix", "suffix"),
    "variant": ("zero_shot", "none", "frozen", "naive", "sign", "conservative", "mozo", "many_probes"),
}
MARGIN = 1.0  # points: a method that is less than this behind has reached the other
SAME = 0.5  # points: two methods that differ by less count as the same
REST_FROZEN, WARM = "orders.rest=frozen", "adapter.init="
RECOVERED = "recovered_{}"  # column: R of Last or Avg
YES, NO, NOT_DECIDED = "yes", "no", "not decided"
RULE = RULE_TEXT.format(YES=YES, NO=NO, NOT_DECIDED=NOT_DECIDED, SAME=SAME, UNKNOWN=UNKNOWN)


@dataclass(frozen=True)
class Claim:
    """A question about a difference of two methods. Without a bound it asks whether they differ in either direction.

    `measures`: pairs of columns; the difference is the method's first less the other method's second.
    """

    statement: str
    condition: str  # on the difference, as it is printed
    bound: float | None = 0.0
    is_below: bool = False  # the answer is yes if the difference is less than the bound
    measures: tuple[tuple[str, str], ...] = (("last", "last"), ("avg", "avg"))

    def verdict(self, low: float, high: float) -> str:
        """Return what the 95 % interval of the mean difference says, by RULE."""
        if np.isnan(low):
            return UNKNOWN
        if self.bound is None and low > -SAME and high < SAME:
            return f"{NO} (within ±{SAME:g})"
        if self.bound is None:
            return f"{YES} (higher)" if low > 0 else f"{YES} (lower)" if high < 0 else NOT_DECIDED
        return NOT_DECIDED if low <= self.bound <= high else YES if (high < self.bound) == self.is_below else NO


VISION, LANGUAGE, ROUGHNESS = (((name, name),) for name in ("variance_vision", "variance_language", "roughness"))
VISION_AND_LANGUAGE = (("variance_vision", "variance_language"),)
CLAIMS = {
    "dual_behind_first_order": Claim("Is zeroth order in both branches behind first order?", "Δ < 0", is_below=True),
    "language_above_vision": Claim("Does zeroth order in language beat zeroth order in vision?", "Δ > 0"),
    "hop_reaches_first_order": Claim("Does zeroth order in every other layer reach first order?", f"Δ > −{MARGIN:g} point", bound=-MARGIN),
    "hop_above_block": Claim("Do interleaved layers beat contiguous ones?", "Δ > 0"),
    "above_naive": Claim("Do sign and conservative steps beat naive ones?", "Δ > 0"),
    "mozo_above_its_plan": Claim("Does MoZO beat the same plan without it?", "Δ > 0"),
    "mozo_above_sign": Claim("Does MoZO's smaller epsilon for vision matter beside sign alone?", "Δ ≠ 0", bound=None),
    "above_random_walk": Claim("Does zeroth order beat steps of the same length with random signs?", "Δ > 0"),
    "differs_from_control": Claim("Does zeroth order differ from freezing the same units?", "Δ ≠ 0", bound=None),
    "vision_varies_more": Claim("Do estimates vary more in vision than in language?", "Δ > 0 in log10", measures=VISION_AND_LANGUAGE),
    "hop_varies_less": Claim(
        "Do estimates vary less in interleaved layers than in contiguous ones?", "Δ < 0 in log10", is_below=True, measures=LANGUAGE
    ),
    "mozo_varies_less": Claim("Does MoZO lower the variance in vision?", "Δ < 0 in log10", is_below=True, measures=VISION),
    "dual_oscillates": Claim("Is the loss rougher with zeroth order in both branches than in one?", "Δ > 0", measures=ROUGHNESS),
}


AGAINST = "against"
QUESTIONS = {AGAINST: Claim("Does a method differ from the one that was chosen?", "Δ ≠ 0", bound=None), **CLAIMS}


def in_paper_order(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return a frame sorted by some columns: data sets and methods as the paper lists them, others by value."""

    def rank(column: pd.Series) -> pd.Series:
        return column.map([*ORDER.get(str(column.name), ()), *sorted(set(column), reverse=column.name == "increment")].index)

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
    untrained = untrained.merge(trained[[*GROUP, "model_settings"]].drop_duplicates(), on=[*TASKS, "model_settings"], how="left")
    untrained = untrained.assign(shared_settings=untrained.shared_settings.fillna(untrained.measured_in))
    untrained["is_own"] = untrained.measured_in == untrained.shared_settings  # a measurement within the group comes first
    untrained = untrained.sort_values("is_own", kind="stable").drop_duplicates([*GROUP, "seed"], keep="last")
    untrained = untrained[trained.columns].assign(**dict.fromkeys(MEASURES, np.nan))
    return with_recovered(in_paper_order(pd.concat([trained, untrained]), [*GROUP, *METHOD, "seed"]))


def with_recovered(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results with R = (ours - zero-shot) / (first order on the same units - zero-shot), of Last and of Avg.

    It is known where no other unit learns (orders.rest=frozen, or dual all) and the same seed has the other two runs in its group.
    """
    keys, metrics = [*GROUP, "seed"], list(METRICS)
    is_alone = results.method_settings.astype(str).str.contains(REST_FROZEN, regex=False)
    is_whole = (results.branch == "dual") & (results.layers == "all")
    # a warm start has the gain of an earlier run
    own = results[~results.variant.isin(WITHOUT_ZEROTH) & (is_alone | is_whole) & ~results.method_settings.astype(str).str.contains(WARM)]
    if own.empty:
        return results.assign(**{RECOVERED.format(metric): np.nan for metric in metrics})
    partner = own[[*GROUP, *METHOD, "seed"]].copy()
    whole = is_whole[own.index]
    partner["layers"] = ("all but " + own.branch + " " + own.layers).mask(whole, "none")
    partner["branch"], partner["variant"] = (pd.Series(name, own.index).mask(whole, "none") for name in ("dual", "frozen"))
    partner["method_settings"] = [_without_zo(text, drops_rest=every) for text, every in zip(own.method_settings, whole, strict=True)]
    first = partner.merge(results, on=[*GROUP, *METHOD, "seed"], how="left")[metrics].set_index(own.index)
    before = partner[keys].merge(results[results.variant == "zero_shot"], on=keys, how="left")[metrics].set_index(own.index)
    ratio = (own[metrics] - before) / (first - before).where(lambda gain: gain.abs() > 1e-9)
    return results.join(ratio.rename(columns=RECOVERED.format))


def _without_zo(settings: str, drops_rest: bool = False) -> str:
    """Return the settings that a run without zeroth order reads."""
    dropped = ("zo.", "orders.rest=") if drops_rest else ("zo.",)
    return "; ".join(text for text in settings.split("; ") if text and not text.startswith(dropped))


def compare(results: pd.DataFrame, published: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Return one row per pair of methods of a group and measure: the mean difference over the seeds that both have, and a paired t-test.

    against: a method's name, such as "dual hop_odd, naive" or "dual hop_odd, naive; zo.lr_scale=3.0"; every other method that has a seed
    and the settings of training in common with it is compared with it, too (AGAINST).
    `low` and `high` bound the 95 % interval; they and `p` are NaN with fewer than two seeds. `claim` and `verdict`: the claim of the paper
    that the difference bears on, if any, and what it says about it. `paper`: the same difference of the published numbers.
    """
    pairs = pd.DataFrame(_pairs(results), columns=[*GROUP, *METHOD, *(f"{name}_2" for name in METHOD), "claim"])
    pairs = pd.concat([pairs, *([] if against is None else [_pairs_with(results, against)])])
    measured = [*METRICS, *(name for name in MEASURES if name in results)]
    values = results[[*GROUP, *METHOD, "other_settings", "seed", *measured]]
    other = values.drop(columns="other_settings").rename(columns={name: f"{name}_2" for name in (*METHOD, *measured)})
    known, rows, about = published.set_index(CELL), [], [*CELL, "other_settings", "shared_settings", "method_settings"]
    for _, both in pairs.merge(values).merge(other).groupby(list(pairs.columns), sort=False):
        first = both.iloc[0]
        cells = [tuple(first[TASKS]) + tuple(first[[f"{name}{end}" for name in METHOD[:-1]]]) for end in ("", "_2")]
        claim = QUESTIONS.get(first.claim, Claim("", ""))
        for metric, subtracted in claim.measures:
            if metric not in measured or (differences := (both[metric] - both[f"{subtracted}_2"]).dropna()).empty:
                continue
            test = paired_test(differences.to_numpy())
            theirs = known[metric].get(cells[0], np.nan) - known[metric].get(cells[1], np.nan) if metric in METRICS else np.nan
            settings = first.method_settings_2 if first.claim == AGAINST else ""
            name = _full_name(cells[1][2:], settings) if metric == subtracted else "its language branch"
            verdict = claim.verdict(test["low"], test["high"]) if first.claim else ""
            found = {"against": name, "metric": metric, **test, "paper": theirs, "claim": first.claim, "verdict": verdict}
            rows.append({**first[about], **found})
    return pd.DataFrame(rows, columns=[*about, "against", "metric", *paired_test([]), "paper", "claim", "verdict"])


def _pairs_with(results: pd.DataFrame, chosen: str) -> pd.DataFrame:
    """Return every other trained method of a group beside the chosen one. Raises ValueError if none, or several, have its name."""
    methods = results[[*GROUP, *METHOD]].drop_duplicates()
    names = pd.Series([_full_name(cell, settings) for *cell, settings in methods[METHOD].to_numpy()], methods.index, dtype=str)
    fits = (names == chosen) | names.str.startswith(f"{chosen}; ")
    found = methods.assign(is_exact=names == chosen)[fits].sort_values("is_exact", ascending=False, kind="stable")
    rivals = found[found.duplicated(GROUP, keep=False) & ~found.groupby(GROUP).is_exact.transform("any").astype(bool)]
    if found.empty or len(rivals):
        why = f"{len(set(names[fits]))} methods have this name" if len(rivals) else "no complete run has this method"
        known = sorted(set(names[rivals.index] if len(rivals) else names))
        raise ValueError(f"--against {chosen!r}: {why}; choose from:\n  " + "\n  ".join(known or ["(no run is complete)"]))
    pairs = methods[methods.variant != "zero_shot"].merge(found.drop_duplicates(GROUP), on=GROUP, suffixes=("", "_2"))
    differs = (pairs[METHOD].to_numpy() != pairs[[f"{name}_2" for name in METHOD]].to_numpy()).any(axis=1)
    return pairs[differs].drop(columns="is_exact").assign(claim=AGAINST)


def _full_name(cell: Sequence[str], settings: str) -> str:
    return method_label(*cell) + (f"; {settings}" if settings else "")


def _pairs(results: pd.DataFrame) -> Iterator[tuple]:
    """Yield every comparison: a group, a method, another method, and the name of the claim or ""."""
    for group_and_method in results[[*GROUP, *METHOD]].drop_duplicates().itertuples(index=False):
        *_, adapter, branch, layers, variant, settings = group_and_method
        learns, is_whole, is_hop = variant not in (*WITHOUT_ZEROTH, *CONTROLS), layers == "all", layers in ("hop_odd", "hop_even")
        if not learns and variant not in CONTROLS:
            continue

        def pair(claim: str, *other: str, found: tuple = group_and_method) -> tuple:
            return (*found, *other, claim)

        without, units = _without_zo(settings), (adapter, branch, layers)
        if variant != "frozen" and ((is_whole and branch == "dual") or REST_FROZEN in settings):  # nothing else learns
            yield from [pair("differs_from_control", *UNTRAINED.values(), "")] * (WARM not in settings)
        elif variant != "frozen":
            yield pair("differs_from_control", *units, "frozen", without)
        claim = "hop_reaches_first_order" if is_hop else "dual_behind_first_order" if is_whole and branch == "dual" and learns else ""
        yield pair(claim, adapter, "none", "none", "none", without)
        if is_whole and branch == "language":
            yield pair("language_above_vision", adapter, "vision", "all", variant, settings)
        if not learns:
            continue
        walk = "; ".join(text for text in settings.split("; ") if not text.startswith("zo.acceptance="))
        yield pair("above_random_walk", *units, WALK_OF.get(variant, "signwalk"), walk)
        if variant == "mozo":
            yield pair("mozo_above_its_plan", *units, "conservative", settings)
            yield pair("mozo_varies_less", *units, "conservative", settings)
            yield pair("mozo_above_sign", *units, "sign", settings)
        if variant in ("sign", "conservative"):
            yield pair("above_naive", *units, "naive", settings)
        if branch == "dual" and variant != "many_probes" and "zo.probes={" not in settings:  # a mean of more probes varies less
            yield pair("vision_varies_more", *group_and_method[-len(METHOD) :])
        for block in ("prefix", "suffix") if is_hop else ():
            yield pair("hop_above_block", adapter, branch, block, variant, settings)
            if branch == "language" and "zo.granularity=unit" in settings:  # otherwise all layers have one slope
                yield pair("hop_varies_less", adapter, branch, block, variant, settings)
        for single in ("vision", "language") if is_whole and branch == "dual" else ():
            yield pair("dual_oscillates", adapter, single, layers, variant, settings)


def paired_test(differences: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return seeds, mean, low, high, p of a t-test of paired differences."""
    found = {"seeds": len(differences), "mean": float(np.mean(differences)) if len(differences) else np.nan}
    if len(differences) < 2 or np.allclose(differences, differences[0], rtol=0, atol=1e-9):
        return {**found, "low": np.nan, "high": np.nan, "p": np.nan}
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return {**found, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def _unbeaten(once: pd.DataFrame) -> pd.DataFrame:
    """Return, by cell, settings and metric, whether no other method has a higher mean over the same seeds; False without another one."""
    rows = []
    for metric in METRICS:
        for _, part in once.groupby(TASKS):
            by_seed = part.pivot(index="seed", columns=[*CELL, "other_settings"], values=metric)
            for method in by_seed:
                means = by_seed.loc[by_seed[method].notna()].dropna(axis=1).mean()
                rows.append((*method, metric, len(means) > 1 and means[method] >= means.max() - 1e-9))
    return pd.DataFrame(rows, columns=[*CELL, "other_settings", "metric", "is_best"])


def cells_of(results: pd.DataFrame, comparisons: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell, setting and metric: the paper's accuracy and ours (mean, standard deviation with n - 1, number of seeds).

    `seeds` is 0 for a published cell without a run. `difference`: ours less the paper's. `gain`: ours less the control's, over the
    `gain_seeds` that both have, with its 95 % interval. `to_first`: ours less first order's. `paper_to_first`: the same in the paper.
    R (RECOVERED) and MEASURES are means over seeds. `is_best`: see _unbeaten.
    """
    keys = [*CELL, "other_settings", "metric"]
    once = results.drop_duplicates([*CELL, "other_settings", "seed"])  # the untrained model stands in every group
    ours = once.melt([*CELL, "other_settings", "seed"], list(METRICS), "metric").groupby(keys, sort=False, as_index=False)
    summary = ours.agg(mean=("value", "mean"), std=("value", "std"), seeds=("value", "count"))
    summary = summary.merge(_unbeaten(once), on=keys)
    paper = published.melt([*CELL, "id", "table"], list(METRICS), "metric", "paper").rename(columns={"id": "paper_id"})
    first = paper[paper.variant == "none"].rename(columns={"paper": "paper_first"})[[*TASKS, "adapter", "metric", "paper_first"]]
    cells = summary.merge(paper, on=[*CELL, "metric"], how="outer").merge(first, on=[*TASKS, "adapter", "metric"], how="left")
    worth = once.groupby(keys[:-1]).agg(dict.fromkeys([*map(RECOVERED.format, METRICS), *MEASURES], "mean") | {"method_settings": "first"})
    cells = cells.merge(worth, on=keys[:-1], how="left").fillna({"other_settings": "", "method_settings": "", "paper_id": "", "seeds": 0})
    gain = {"mean": "gain", "low": "gain_low", "high": "gain_high", "seeds": "gain_seeds"}
    control = comparisons[comparisons.claim == "differs_from_control"].rename(columns=gain)
    is_to_first = comparisons.against.str.startswith("first order") & (comparisons.claim != AGAINST)
    to_first = comparisons[is_to_first].rename(columns={"mean": "to_first"})
    for of_comparison in (control[[*keys, *gain.values()]], to_first[[*keys, "to_first"]]):
        cells = cells.merge(of_comparison, on=keys, how="left")
    cells["difference"] = cells["mean"] - cells.paper
    cells["paper_to_first"] = (cells.paper - cells.pop("paper_first")).where(~cells.variant.isin(WITHOUT_ZEROTH))
    cells["metric"] = pd.Categorical(cells.metric, list(METRICS))
    return in_paper_order(cells.astype({"seeds": int}), keys)

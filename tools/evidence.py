"""The data behind docs/results.md, docs/one-seed.md and docs/claims.md, and the pages' tables and figures from these data alone.

    python tools/evidence.py collect runs/* --out docs/results/cifar100.csv     one row per complete run; --add keeps the file's other rows
    python tools/evidence.py tables docs/results                                write the pages' parts between their two marker lines

The pages then show exactly what the CSV files hold; a test compares them. Runs with zo.granularity=unit also have their statistics by layer
in FILE-layers.csv, for Figure 4.
"""

import argparse
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import yaml
from scipy import stats

from dist_vlcl.paper import CONFIG_FOLDER, paper_runs
from dist_vlcl.report import tables
from dist_vlcl.report.figures import STYLE
from dist_vlcl.report.page import CONTRIBUTION_TERMS, TERMS
from dist_vlcl.report.paper_figures import FOUR_PLANS, Picture, draw_seeds, draw_units, unit_statistics
from dist_vlcl.report.records import CELL, CONTROLS, run_frame
from dist_vlcl.report.statistics import (
    CLAIMS,
    GROUP,
    METHOD,
    NO,
    NOT_DECIDED,
    RECOVERED,
    RULE,
    SAME,
    YES,
    cells_of,
    compare,
    complete_of,
    paired_test,
    results_of,
)
from dist_vlcl.run.files import replace_file

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, ONE_SEED, QUESTIONS = PAGES = ("results.md", "one-seed.md", "claims.md")
LAYERS = "-layers.csv"
BEGIN, END = "<!-- results: begin (tools/evidence.py writes this part) -->", "<!-- results: end -->"
TEXTS = ["adapter", "other_settings", "method_settings", "shared_settings", "model_settings"]  # "" in a CSV is a text, and no gap
ANSWERS = (
    f"*{YES}*: p after Holm's correction is below 0.05. *{NO}*: the 95 % interval, which is not corrected, lies beyond the bound. "
    f"Otherwise {NOT_DECIDED}. *so far*: with fewer seeds than were planned."
)
MEASURED_ONCE = "Methods with one seed have these numbers in the CSV files."
HIDDEN = ("path", "data", "is_probe", "is_complete", "tasks_done")


def collect(runs: list[Path], earlier: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return one row per complete run: what was run, Last, Avg, R, and what its zeroth-order steps measured.

    earlier: rows of runs whose folders need not exist any more. Those of a run that is collected anew are replaced.
    """
    found, unreadable = run_frame(runs)
    for name, reason in unreadable.items():
        print(f"left out: {name} ({reason})")
    if found.empty:
        raise SystemExit("none of these is a run folder")
    if earlier is not None and len(earlier):
        kept = earlier[~earlier.run.isin(found.run[found.is_complete & ~found.is_probe])].drop(
            columns=[RECOVERED.format(metric) for metric in tables.METRICS]
        )
        found = pd.concat([found, kept], ignore_index=True)
    complete = complete_of(found)
    if repeated := sorted(complete.run[complete.run.duplicated()]):
        raise SystemExit(f"two folders have the name {repeated[0]}; rows are known by it, so rename one")
    for name in found.run[found.is_complete & ~found.is_probe & ~found.index.isin(complete.index)]:
        print(f"left out: {name} (repeats the settings and the seed of another run)")
    complete = complete.sort_values("run", ignore_index=True)
    results = results_of(complete)
    by_run = results[results.variant != "zero_shot"].set_index(
        "run"
    )  # the untrained model's rows have the name of the run that measured it
    ratios = by_run.reindex(columns=[RECOVERED.format(metric) for metric in tables.METRICS])
    numbers = complete.drop(columns=list(HIDDEN)).join(ratios, on="run")
    return numbers.round(4).astype({"steps": "Int64"})  # runs that are not complete have no number of steps


def read(folder: Path) -> pd.DataFrame:
    """Return the runs of every CSV file of a folder; an empty frame without one."""
    return read_files([path for path in sorted(folder.glob("*.csv")) if not path.name.endswith(LAYERS)])


def read_files(paths: list[Path]) -> pd.DataFrame:
    """Return the runs of these CSV files; an empty frame without one."""
    parts = [pd.read_csv(path, keep_default_na=False, na_values={}) for path in paths]
    if not parts:
        return pd.DataFrame()
    runs = pd.concat(parts, ignore_index=True)
    known = {"run", "dataset", "branch", "layers", "variant", *TEXTS}
    for column in runs.columns.difference(list(known)):
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    return runs.assign(is_complete=True, is_probe=False)


def layers_of(runs: list[Path], rows: pd.DataFrame) -> pd.DataFrame:
    """Return the statistics by layer of the runs in which each unit has its own estimate."""
    by_unit = set(rows.run[rows.method_settings.str.contains("zo.granularity=unit", regex=False)])
    return pd.concat([pd.DataFrame(), *(unit_statistics(run).assign(run=run.name) for run in runs if run.name in by_unit)])


def draw_layers(runs: pd.DataFrame, folder: Path) -> Picture | None:
    """Draw Figure 4 of the paper from the FILE-layers.csv of a folder."""
    layers = pd.concat([pd.DataFrame({"run": []}), *map(pd.read_csv, sorted(folder.glob(f"*{LAYERS}")))])
    shown = runs[runs.run.isin(layers.run)].assign(path=lambda found: found.run)
    if shown.empty:
        return None
    shown = shown.assign(method=[tables.method_label("", *fields) for fields in shown[CELL[3:]].to_numpy()])
    return draw_units(shown, FOUR_PLANS, lambda run: layers[layers.run == run].drop(columns="run"))


def parts_of_pages(runs: pd.DataFrame, pictures: Path | None = None, folder: Path | None = None) -> dict[str, str]:
    """Return each page's part about these runs.

    Figures are written into the folder `pictures`. folder: where the statistics by layer are, if there are any.
    """
    results = results_of(complete_of(runs.drop(columns=[RECOVERED.format(metric) for metric in tables.METRICS])))
    shared = {}
    for (dataset, increment), part in results.groupby(["dataset", "increment"], sort=False):
        common = set.intersection(*(set(text.split("; ")) for text in part.other_settings[part.variant != "zero_shot"])) - {""}
        results.loc[part.index, "other_settings"] = [
            "; ".join(t for t in text.split("; ") if t not in common) for text in part.other_settings
        ]
        shared[tables.tasks_label(dataset, increment)] = "; ".join(sorted(common)) or "none"
    published = pd.DataFrame(map(asdict, paper_runs().values()))
    comparisons = compare(results, published)
    cells = cells_of(results, comparisons, published)
    ours = cells[cells.seeds > 0]
    contrasts = contrasts_of(results, yaml.safe_load((CONFIG_FOLDER / "contrasts.yaml").read_text()))
    blocks = [
        "## The primary contrasts",
        ANSWERS,
        "\n".join(map(sentence, contrasts[contrasts.seeds > 0].itertuples())) or "None was run yet.",
        contrast_table(contrasts),
    ]
    several, single = ours[ours.seeds > 1], ours[ours.seeds == 1]
    blocks += [
        "## All runs with several seeds",
        "Other settings than the paper's, in all runs:",
        "\n".join(f"- {tasks}: {text}" for tasks, text in shared.items()),
    ]
    blocks += [TERMS, tables.result_table(several)]
    without_ratios = several.assign(**dict.fromkeys(map(RECOVERED.format, tables.METRICS), np.nan))  # these have a table with intervals
    contribution = [table for table in (tables.contribution_table(without_ratios), ratio_table(results)) if table]
    if contribution:
        blocks += ["## What did zeroth order contribute?", f"{CONTRIBUTION_TERMS} {MEASURED_ONCE}", *contribution]
    counted = comparisons[~comparisons.variant.isin(CONTROLS)]
    asked = {name: counted[counted.claim == name] for name in CLAIMS}
    claims, asked_once = [RULE], []
    for name, found in asked.items():
        if found.empty:
            continue
        question = f"**{CLAIMS[name].statement}** ({CLAIMS[name].condition})"
        decidable, undecidable = found[found.seeds > 1], found[found.seeds == 1]
        claims += [question, summary(found)]
        if name == "differs_from_control":  # the tables of runs have these differences
            claims.append("Each difference is in [results.md](results.md#all-runs-with-several-seeds) or in [one-seed.md](one-seed.md).")
            continue
        claims += [tables.comparison_table(decidable)] if len(decidable) else []
        asked_once += [question, tables.comparison_table(undecidable)] if len(undecidable) else []
    unasked = [CLAIMS[name].statement for name, found in asked.items() if found.empty]
    claims.append(f"Questions of the report without runs here: {' '.join(unasked) or 'none'}")
    for old in pictures.glob("results-*.png") if pictures else ():
        old.unlink()
    with matplotlib.rc_context(fname=STYLE):
        repeated = results.groupby([*GROUP, *METHOD]).filter(lambda seeds: len(seeds) > 1)
        drawn = repeated.groupby(GROUP).filter(lambda group: group[group.variant != "zero_shot"].groupby(METHOD).ngroups > 1)
        for number, ((dataset, increment, settings), part) in enumerate(drawn.groupby(GROUP, sort=False), 1):
            if picture := draw_seeds(part):
                tasks, inc = tables.tasks_label(dataset, increment), f"-inc{increment}" if increment else ""
                name = f"results-{dataset}{inc}-{number}.png"
                own = "; ".join(text for text in settings.split("; ") if text not in shared[tasks].split("; "))
                caption = f"{tasks}{own and f' ({own})'}: {picture.caption.split('.')[0]}"
                blocks.append(f"{caption}:\n![{caption}](images/{name})")
                if pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    picture.figure.savefig(pictures / name)
        if folder and (picture := draw_layers(runs, folder)):
            claims.append(f"![Our layers, as in Figure 4](images/results-layers.png)\n\nAs in Figure 4 of the paper. {picture.caption}")
            if pictures:
                picture.figure.savefig(pictures / "results-layers.png")
    once = [TERMS, tables.result_table(single)] if len(single) else ["No plan has run once."]
    once += ["## Questions with one seed in common", *asked_once] if asked_once else []
    found = {RESULTS: blocks, ONE_SEED: once, QUESTIONS: claims}
    return {page: "\n\n".join(block.rstrip() for block in part if block) for page, part in found.items()}


def contrasts_of(results: pd.DataFrame, plan: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row per contrast that was named before the runs (configs/contrasts.yaml): difference, interval, p, Holm's p, answer.

    A contrast has the claim `above` (the difference exceeds `bound`; one-sided paired t-test) or `same` (it lies within ±SAME; two
    one-sided tests, the larger p). Holm's correction counts every contrast, also those without runs.
    """
    rows = []
    for contrast in plan["contrasts"]:
        differences, settings = paired(results, contrast)
        bound, test, is_same = float(contrast.get("bound", 0)), paired_test(differences), contrast["claim"] == "same"
        p = max(p_above(differences, -SAME), p_above(-differences, -SAME)) if is_same else p_above(differences, bound)
        is_refuted = test["low"] > SAME or test["high"] < -SAME if is_same else test["high"] < bound
        condition = f"|Δ| < {SAME:g}" if is_same else f"Δ > {bound:g}"
        rows.append({"name": contrast["name"], "question": contrast["question"], "condition": condition, "metric": contrast["metric"]})
        rows[-1] |= {**test, "p": p, "is_refuted": is_refuted, "settings": settings}
    found = pd.DataFrame(rows)
    found["p_holm"] = holm(found.p)
    found["answer"] = np.select([found.p_holm < 0.05, found.is_refuted, found.seeds > 0], [YES, NO, NOT_DECIDED], "not run")
    found.loc[(found.seeds > 0) & (found.seeds < plan.get("seeds", 0)), "answer"] += " so far"
    return found.drop(columns="is_refuted")


def p_above(differences: np.ndarray, bound: float) -> float:
    """Return p of a one-sided t-test, of a sign test if all differences are equal and have no standard error, NaN with fewer than two."""
    if len(differences) < 2:
        return np.nan
    if np.ptp(differences) < 1e-9:
        return float(stats.binomtest(int(np.sum(differences > bound)), len(differences), alternative="greater").pvalue)
    return float(stats.ttest_1samp(differences, bound, alternative="greater").pvalue)


def holm(p: pd.Series) -> pd.Series:
    """Return p-values after Holm's correction for their number: each is a bound on the error of any of them. Unknown ones count, too."""
    ordered = p.sort_values()
    return (ordered * list(range(len(p), 0, -1))).cummax().clip(upper=1.0).reindex(p.index)


def paired(results: pd.DataFrame, contrast: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    """Return a contrast's differences by seed, from the group with the most seeds, and the settings of that group."""
    method, other = (chosen(results, {**contrast["where"], **contrast[side]}) for side in ("method", "against"))
    both = method.merge(other, on=[*GROUP, "seed"], suffixes=("", "_2"))
    ours, theirs = (column.map(_without_zo_and_orders) for column in (both.method_settings, both.method_settings_2))
    both = both.assign(fixed=ours + "; " + both.shared_settings)[(ours == theirs) | (both.variant_2 == "zero_shot")]
    if both.empty:
        return np.array([]), ""
    of_group = both[both.fixed == min(both.fixed.mode(), key=len)]
    metric = contrast["metric"]
    return (of_group[metric] - of_group[f"{metric}_2"]).to_numpy(), of_group.other_settings.iloc[0]


def _without_zo_and_orders(settings: str) -> str:
    return "; ".join(text for text in settings.split("; ") if not text.startswith(("zo.", "orders.")))


def chosen(results: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    """Return the results with the wanted fields, and with exactly the wanted settings of zo and orders; others must only be there."""
    fields = {key: value for key, value in wanted.items() if key in CELL}
    found = results[(results[list(fields)] == pd.Series(fields)).all(axis=1)]
    settings = set(wanted.get("settings", ()))

    def fits(row: Any) -> bool:
        given = set(f"{row.method_settings}; {row.shared_settings}".split("; "))
        return settings <= given and {text for text in given if text.startswith(("zo.", "orders."))} <= settings

    return found[np.array([fits(row) for row in found.itertuples()], dtype=bool)]


def ratio_table(results: pd.DataFrame) -> str:
    """Return R with its interval, one row per method with several seeds and first order on the same units beside it; "" without one."""
    rows, columns = [], [RECOVERED.format(metric) for metric in tables.METRICS]
    for (*cell, settings), part in results.dropna(subset=columns).groupby([*CELL, "other_settings"], sort=False):
        row = [tables.tasks_label(*cell[:2]), tables.method_label(*cell[2:]), settings, len(part)]
        for column in columns:
            test = paired_test(part[column].to_numpy())
            row += [tables.number(test["mean"]), tables.interval(test["low"], test["high"])]
        rows += [row] if len(part) > 1 else []
    heads = [head for name in tables.METRICS.values() for head in (f"R {name}", "95 % interval")]
    return tables.markdown_table(["data", "method", "other settings", "seeds", *heads], rows, num_left=3) if rows else ""


def summary(found: pd.DataFrame) -> str:
    """Return what the comparisons of one claim say together: the range of Δ (of Avg, if they have it), the answers, the paper's range."""
    metric = found.metric.iloc[-1]
    part = found[found.metric == metric]
    name = f" {tables.METRICS[metric]}" if metric in tables.METRICS else ""

    def span(values: pd.Series) -> str:
        return " to ".join(dict.fromkeys(map(tables.signed, (values.min(), values.max()))))

    text = f"{len(part)} {'comparison' if len(part) == 1 else 'comparisons'}, Δ{name} {span(part['mean'])}."
    several = part[part.seeds > 1].verdict.value_counts(sort=False)
    if len(several):
        counts = ", ".join(f"{verdict} {count}" for verdict, count in several.items())
        text += f" Answers{name and f' in{name}'} from several seeds: {counts}."
    text += f" {(part.seeds == 1).sum()} with one seed, which is no answer." if (part.seeds == 1).any() else ""
    return text + (f" The paper's Δ{name}: {span(part.paper.dropna())}." if part.paper.notna().any() else "")


def contrast_table(contrasts: pd.DataFrame) -> str:
    """Return one row per contrast."""
    rows = []
    for c in contrasts.itertuples():
        tested = [tables.signed(c.mean), tables.interval(c.low, c.high), *map(shown_p, (c.p, c.p_holm))]
        rows.append([c.question, c.condition, tables.METRICS[c.metric], c.seeds, *tested, c.answer])
    heads = ["question", "condition", "metric", "seeds", "Δ", "95 % interval", "p", "p, Holm", "answer"]
    return tables.markdown_table(heads, rows, num_left=3)


def shown_p(p: float) -> str:
    """Return a p-value as text."""
    return "< 0.001" if p < 0.001 else tables.number(p, ".3f")


def sentence(contrast) -> str:
    """Return the answer to a contrast in one sentence, from its numbers."""
    numbers = f"Δ {tables.METRICS[contrast.metric]} {tables.signed(contrast.mean)} points, {contrast.seeds} seeds"
    if contrast.low == contrast.low:
        numbers += f", 95 % interval {tables.signed(contrast.low)} to {tables.signed(contrast.high)}"
    return f"- {contrast.question} {contrast.answer.capitalize()} ({numbers})."


def with_section(page: str, text: str) -> str:
    """Return a page with the part between its marker lines replaced. Raises ValueError for a page without them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs these two lines once, in this order: {BEGIN} and {END}")
    lines = [line if line.startswith(("|", "!", "#")) else textwrap.fill(line, 150, break_long_words=False) for line in text.splitlines()]
    text = "\n".join(lines)
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{text}\n\n{page[page.index(END) :]}"


def write_csv(runs: list[Path], out: Path, adds: bool = False) -> None:
    """Write the rows of these runs to a CSV file, and those by layer beside it. adds: keep the rows of other runs."""
    by_layer = out.with_name(out.stem + LAYERS)
    rows = collect(runs, read_files([out]) if adds and out.exists() else None)
    layers = layers_of(runs, rows)
    if adds and by_layer.exists():
        kept = pd.read_csv(by_layer)
        layers = pd.concat([kept[kept.run.isin(rows.run) & ~kept.run.isin(layers.get("run", ()))], layers], ignore_index=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out, index=False)
    print(f"{len(rows)} runs in {out}")
    if len(layers):
        layers.to_csv(by_layer, index=False, float_format="%.4g")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write a CSV file from run folders")
    collecting.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    collecting.add_argument("--out", type=Path, required=True, metavar="FILE")
    collecting.add_argument("--add", action="store_true", help="keep the rows of FILE whose runs are not among these")
    writing = commands.add_parser("tables", help="write the page's tables and figures from the CSV files of a folder")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--docs", type=Path, default=DOCS, help="the folder of the pages (default: docs)")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        write_csv(arguments.runs, arguments.out, arguments.add)
        return
    runs = read(arguments.folder)
    if runs.empty:
        parser.error(f"no *.csv in {arguments.folder}; write them with: python tools/evidence.py collect runs/* --out FILE")
    for name, part in parts_of_pages(runs, arguments.docs / "images", arguments.folder).items():
        page = with_section((arguments.docs / name).read_text(), part)
        replace_file(arguments.docs / name, page)
        print(json.dumps({"runs": len(runs), "page": name, "lines": page.count("\n")}))


if __name__ == "__main__":
    main()

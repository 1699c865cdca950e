"""Tables as Markdown, accuracies in percent with two digits: those of a report and of a search over options."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd

from dist_vlcl.masking import masked
from dist_vlcl.report.measures import DECISIONS, MEASURES
from dist_vlcl.report.records import CELL, TASKS, WITHOUT_ZEROTH

TERMS, CONTRIBUTION_TERMS, RULE_TEXT, UNITS_CAPTION = Path(__file__).with_name("terms.md").read_text(encoding="utf-8").splitlines()
UNKNOWN = "–"
METRICS = {"last": "Last", "avg": "Avg"}
CONTRIBUTION = {"recovered_last": "R Last", "recovered_avg": "R Avg"}  # with these of MEASURES:
CONTRIBUTION |= {name: MEASURES[name] for name in ("cosine", "descent", *DECISIONS)}
DATASETS = {"cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "imagenet_r": "ImageNet-R"}
PAPER_TABLES = {  # number -> title, and which published cells it shows (Tables 3 and 4 repeat rows for comparison)
    1: ("Zeroth order in a whole branch", "layers in ('none', 'all') and variant in ('none', 'conservative')"),
    2: ("Zeroth order in half of the layers", "layers not in ('none', 'all') and variant == 'conservative'"),
    3: ("MoZO and the same plans without it", "branch == 'dual' and layers in ('hop_odd', 'hop_even')"),
    4: ("Naive, sign and conservative zeroth order in a whole branch", "adapter == 'moe' and layers == 'all'"),
}


def escape(text: Any) -> str:
    """Return text that Markdown shows as it is. Names of runs and tasks are the user's: they must not become links or pictures."""
    return re.sub(r"([\\`*<>|&]|(?<=\])\()", r"\\\1", " ".join(masked(str(text)).split()))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], num_left: int = 1) -> str:
    """Return a Markdown table. The first `num_left` columns are aligned left, the others right, and left out if no row has a value."""
    rule, rows = [":---"] * num_left + ["---:"] * (len(columns) - num_left), [list(map(escape, row)) for row in rows]
    kept = [place < num_left or {row[place] for row in rows} - {"", UNKNOWN} for place in range(len(columns))]
    lines = [list(map(escape, columns)), rule, *rows]
    return "".join(f"| {' | '.join(compress(line, kept))} |\n" for line in lines)


def number(value: float | None, form: str = ".2f") -> str:
    """Return a number as text, or a dash if it is unknown (None or NaN)."""
    return UNKNOWN if value is None or value != value else f"{value:{form}}".replace("-", "−")


def tasks_label(dataset: str, increment: int) -> str:
    """Return how a page calls a data set in tasks of so many classes, such as CIFAR-100 Inc20; its name alone for 0."""
    return DATASETS.get(dataset, dataset) + (f" Inc{increment}" if increment else "")


def method_label(adapter: str, branch: str, layers: str, variant: str) -> str:
    """Return how a page calls a method, such as "dual hop_odd, mozo". The adapter is named unless it is moe."""
    shown = {"walk": "random walk", "signwalk": "random walk of signs", "manywalk": "random walk of many_probes"}
    name = {"none": "first order", "zero_shot": "zero-shot CLIP"}.get(variant) or f"{branch} {layers}, {shown.get(variant, variant)}"
    if layers.startswith("all but ") and variant == "frozen":
        name = f"{layers.removeprefix('all but ')}, first order"
    return name if adapter in ("moe", "") else f"{name} ({adapter})"


def signed(value: float) -> str:
    """Return a difference with its sign, or a dash if it is NaN."""
    return number(value, "+.2f")


def interval(low: float, high: float) -> str:
    """Return the bounds of an interval, or a dash if they are NaN."""
    return UNKNOWN if low != low else f"[{signed(low)}, {signed(high)}]"


def _ours(cell: Any) -> str:
    """Return mean ± standard deviation (number of seeds)."""
    deviation = "" if cell.std != cell.std else f" ± {cell.std:.2f}"
    return f"{cell.mean:.2f}{deviation} ({cell.seeds})" if cell.seeds else UNKNOWN


def _by_metric(frame: pd.DataFrame, more: Sequence[str], heads: Sequence[str], texts_of: Callable[[Any], list[str]]) -> str:
    """Return a table with one row per method and settings (and columns `more`), with the texts of the metrics side by side."""
    names = [{**METRICS, **MEASURES}[metric] for metric in dict.fromkeys(frame.metric)]
    rows = []
    for keys, both in frame.groupby([*CELL, "other_settings", *more], sort=False):
        texts = [text for row in both.itertuples() for text in texts_of(row)]
        rows.append([tasks_label(*keys[:2]), method_label(*keys[2:6]), *keys[7:], *texts, keys[6]])
    columns = ["data", "method", *more, *(head.format(name) for name in names for head in heads), "other settings"]
    shown = len(columns) if frame.other_settings.any() else -1
    return markdown_table(columns[:shown], [row[:shown] for row in rows], num_left=2)


def result_table(ours: pd.DataFrame) -> str:
    """Return our results, of each data set the best Last first, with paired differences to their controls.

    ★ marks a method that no other one beats over the same seeds.
    """
    is_zeroth, is_whole = ~ours.variant.isin(WITHOUT_ZEROTH), (ours.branch == "dual") & (ours.layers == "all")
    is_alone = is_whole | ours.method_settings.str.contains("orders.rest=frozen", regex=False)
    ours = ours.assign(control=is_alone.map({True: "zero-shot", False: "frozen"}).where(is_zeroth, ""))

    def texts(cell: Any) -> list[str]:
        return [_ours(cell) + " ★" * cell.is_best, signed(cell.gain), interval(cell.gain_low, cell.gain_high)]

    return _by_metric(best_first(ours), ["control"], ["{}", "Δ {}", "95 % interval"], texts)


def best_first(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells sorted by data set, and there by Last."""
    tasks = cells.groupby(TASKS, sort=False).ngroup()
    best = cells.groupby([*CELL, "other_settings"])["mean"].transform("first")
    return cells.assign(tasks=tasks, best=best).sort_values(["tasks", "best"], ascending=[True, False], kind="stable")


def contribution_table(ours: pd.DataFrame) -> str:
    """Return what zeroth order contributed: R, and what its steps measured, one row per method that has any of it; "" without one."""
    known = ours[(ours.metric == "last") & ours[list(CONTRIBUTION)].notna().any(axis=1)]
    if known.empty:
        return ""
    digits = {name: ".4f" if name in ("cosine", "descent") else ".2f" if name.startswith("recovered") else ".1f" for name in CONTRIBUTION}
    rows = []
    for c in best_first(known).to_dict("records"):
        method = [tasks_label(c["dataset"], c["increment"]), method_label(*(c[field] for field in CELL[2:])), c["other_settings"]]
        rows.append([*method, *(number(c[name], form) for name, form in digits.items())])
    return markdown_table(["data", "method", "other settings", *CONTRIBUTION.values()], rows, num_left=3)


def comparison_table(comparisons: pd.DataFrame) -> str:
    """Return one row per comparison of a claim: mean difference, interval, answer, and of an accuracy the paper's own difference."""
    heads = ["Δ {}", "95 % interval", "answer", "paper's Δ {}"][: 4 if comparisons.metric.isin(list(METRICS)).all() else 3]

    def texts(test: Any) -> list[str]:
        return [signed(test.mean), interval(test.low, test.high), test.verdict, signed(test.paper)][: len(heads)]

    return _by_metric(comparisons.rename(columns={"against": "compared with"}), ["compared with", "seeds"], heads, texts)


def paper_table(cells: pd.DataFrame, table: int) -> str:
    """Return Table 1, 2, 3 or 4 of the paper with our results; "" without a run. Only data sets and adapters with a run are shown."""
    published = cells[cells.paper_id != ""].query(PAPER_TABLES[table][1])
    run = published[(published.table == table) & (published.seeds > 0)]
    shown = published.merge(run[[*TASKS, "adapter"]].drop_duplicates())

    def texts(cell: Any) -> list[str]:
        difference = UNKNOWN if "model." in cell.other_settings else signed(cell.difference)  # of two models it means nothing
        return [f"{cell.paper:.2f}", _ours(cell), difference, signed(cell.paper_to_first), signed(cell.to_first)]

    heads = ["paper's {}", "our {}", "ours − paper's", "paper's Δ to first order", "our Δ to first order"]
    return _by_metric(shown, [], heads, texts) if len(shown) else ""


def memory_of(runs: pd.DataFrame, published_gb: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return Table 5, one row per adapter and setting: the paper's GB, and the most GiB that a step has reserved and allocated."""
    rows = [(adapter, setting, gb) for adapter, settings in published_gb.items() for setting, gb in settings.items()]
    is_whole = (runs.layers == "all") & (runs.variant == "conservative")
    ours = runs[runs.is_complete & runs.peak_gib.notna() & (is_whole | (runs.variant == "none"))]
    by_setting = ours.assign(setting=ours.branch.replace("none", "fo")).groupby(["adapter", "setting", *TASKS, "other_settings"])
    peaks = by_setting.agg(peak_gib=("peak_gib", "max"), allocated_gib=("allocated_gib", "max"), runs=("run", "nunique"))
    both = pd.DataFrame(rows, columns=["adapter", "setting", "paper_gb"]).merge(peaks.reset_index(), on=["adapter", "setting"], how="left")
    return both.fillna({"dataset": "", "increment": 0, "other_settings": "", "runs": 0}).astype({"increment": int, "runs": int})


def memory_table(memory: pd.DataFrame) -> str:
    """Return Table 5 with one row per setting."""
    rows = []
    for row in memory.itertuples():
        setting = "first order" if row.setting == "fo" else f"{row.setting} all"
        sizes = [row.paper_gb, row.allocated_gib, row.peak_gib, row.peak_gib / row.paper_gb]
        data = tasks_label(row.dataset, row.increment) if row.runs else ""
        rows.append([row.adapter, setting, data, row.other_settings, *map(number, sizes)])
    heads = ["adapter", "setting", "data", "other settings", "paper (GB)", "allocated (GiB)", "reserved (GiB)", "reserved / paper"]
    return markdown_table(heads, rows, num_left=4)


def ranked(trials: pd.DataFrame) -> pd.DataFrame:
    """Return one row per choice of options, the best first: accuracy (mean over seeds), lowest, highest, seeds, loss.

    `trials` has one row per choice and seed: the options as text, `accuracy` on held-out images in percent (NaN for a failed run) and
    `loss`. Choices with equal accuracy are ordered by loss, because few held-out images often give equal accuracies. Those with a failed
    run come last: the other seeds may be the easy ones.
    """
    options = [column for column in trials if column not in ("accuracy", "loss")]
    by_choice = trials.groupby(options, sort=False)
    found = by_choice.accuracy.agg(accuracy="mean", lowest="min", highest="max", seeds="count").assign(loss=by_choice.loss.mean())
    return found.sort_values(["seeds", "accuracy", "loss"], ascending=[False, False, True], kind="stable").reset_index()


def trial_table(choices: pd.DataFrame, references: Mapping[str, float]) -> str:
    """Return a table of ranked choices, followed by the accuracies in percent that they are compared with."""
    options, rows = list(choices.columns[:-5]), []
    for row in choices.to_dict("records"):
        spread = f"{row['lowest']:.2f} – {row['highest']:.2f}" if row["seeds"] > 1 else ""
        rows.append([*(row[option] for option in options), number(row["accuracy"]), spread, row["seeds"], number(row["loss"], ".4f")])
    rows += [[name, *[""] * (len(options) - 1), number(value), "", "", ""] for name, value in references.items()]
    return markdown_table([*options, "held-out accuracy", "lowest – highest", "seeds", "loss"], rows)

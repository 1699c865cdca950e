"""Tables as Markdown, accuracies in percent with two digits: the summary of a run, and the tables of a report."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dist_vlcl.masking import masked
from dist_vlcl.report.measures import MEASURES
from dist_vlcl.report.records import CELL, TASKS, WITHOUT_ZEROTH, read_records

Row = Sequence[float | None]
UNKNOWN = "–"
METRICS = {"last": "Last", "avg": "Avg"}
WORTH = ("cosine", "descent", "ordinary", "stayed", "mirrored", "shortened")
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
    """Return a Markdown table. The first `num_left` columns are aligned left, the others right."""
    rule = [":---"] * num_left + ["---:"] * (len(columns) - num_left)
    lines = [list(map(escape, columns)), rule, *(list(map(escape, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent with two digits, or a dash if it is unknown."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.2f}"


def accuracy_table(matrix: Sequence[Row], seen: Row) -> str:
    """Return a table with one row per finished task: the accuracy on each task, and A_t over all classes seen.

    `matrix[i][j]` is the accuracy on task j after task i, and `seen[i]` is A_t after task i: fractions, or None if it was not measured.
    Row i ends at task i, or holds all tasks; a task that was not measured is blank.
    """
    names = [f"task {task + 1}" for task in range(max(map(len, [matrix, *matrix])))]
    rows = [
        [name, *map(percent, row), *[""] * (len(names) - len(row)), percent(mean)]
        for name, row, mean in zip(names, matrix, seen, strict=False)
    ]
    return markdown_table(["after", *names, "A_t"], rows)


def summarize_run(folder: Path | str) -> str:
    """Return a Markdown page about a run folder: Last, Avg, forgetting, and the accuracy on every task after every task."""
    records = read_records(folder)
    newest = records.tasks[-1] if records.tasks else {}
    numbers = {"Last": newest.get("last"), "Avg": newest.get("avg")}
    more = {"Transfer": newest.get("transfer"), "forgetting": newest.get("forgetting"), "zero-shot": newest.get("zero_shot")}
    numbers |= {name: value for name, value in more.items() if value is not None}
    head = markdown_table(list(numbers), [[percent(value) for value in numbers.values()]])
    note = "Accuracy in %. A_t: over all classes seen after task t; Last: the final A_t; Avg: the mean of A_t over the tasks."
    note += " Each task is a data set: A_t is the mean over all, Transfer that before their training." if "Transfer" in numbers else ""
    table = accuracy_table(records.matrix, records.of_tasks("seen")) if records.tasks else "No task is finished yet.\n"
    return f"# {escape(Path(folder).resolve().name)}\n\n{head}\n{table}\n{note}\n{_waiting_time(records.steps)}"


def _waiting_time(steps: Sequence[dict[str, Any]]) -> str:
    """Return a line on the time that steps waited for their images; "" if no step recorded it."""
    waited = sum(record.get("data_seconds", 0.0) for record in steps)
    total = waited + sum(record.get("seconds", 0.0) for record in steps)
    if not waited:
        return ""
    advice = " More `data.num_workers`, or shards built with `data.encoding=pixels`, would help." if waited > 0.05 * total else ""
    return f"\nWaiting for images took {percent(waited / total)} % of the time of the steps.{advice}\n"


def tasks_label(dataset: str, increment: int) -> str:
    """Return how a page calls a data set in tasks of so many classes, such as CIFAR-100 Inc20."""
    return f"{DATASETS.get(dataset, dataset)} Inc{increment}"


def method_label(adapter: str, branch: str, layers: str, variant: str) -> str:
    """Return how a page calls a method, such as "dual hop_odd, mozo". The adapter is named unless it is moe."""
    fixed = {"none": "first order", "zero_shot": "zero-shot CLIP"}
    shown = {"walk": "random walk", "signwalk": "random walk of signs", "manywalk": "random walk of many_probes"}
    name = fixed.get(variant) or f"{branch} {layers}, {shown.get(variant, variant)}"
    if layers.startswith("all but "):
        name = f"{layers.removeprefix('all but ')}, first order alone"
    return name if adapter in ("moe", "") else f"{name} ({adapter})"


def signed(value: float) -> str:
    """Return a difference with its sign, or a dash if it is NaN."""
    return UNKNOWN if value != value else f"{value:+.2f}".replace("-", "−")


def _interval(low: float, high: float) -> str:
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
    """Return our results, of each data set the best Last first, each with its paired differences to its control."""
    is_zeroth, is_whole = ~ours.variant.isin(WITHOUT_ZEROTH), (ours.branch == "dual") & (ours.layers == "all")
    ours = ours.assign(control=is_whole.map({True: "zero-shot", False: "frozen"}).where(is_zeroth, ""))
    heads = ["{}", "Δ {}", "95 % interval"]
    return _by_metric(best_first(ours), ["control"], heads, lambda c: [_ours(c), signed(c.gain), _interval(c.gain_low, c.gain_high)])


def best_first(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells sorted by data set, and there by Last."""
    tasks = cells.groupby(TASKS, sort=False).ngroup()
    best = cells.groupby([*CELL, "other_settings"])["mean"].transform("first")
    return cells.assign(tasks=tasks, best=best).sort_values(["tasks", "best"], ascending=[True, False], kind="stable")


def worth_table(ours: pd.DataFrame) -> str:
    """Return what zeroth order was worth: R, and what its steps measured, one row per method that has any of it; "" without one."""
    columns = {"recovered_last": "R Last", "recovered_avg": "R Avg", **{name: MEASURES[name] for name in WORTH}}
    known = ours[(ours.metric == "last") & ours[list(columns)].notna().any(axis=1)]
    if known.empty:
        return ""
    digits = {name: ".4f" if name in ("cosine", "descent") else ".1f" if name in WORTH else ".2f" for name in columns}
    rows = [
        [tasks_label(c["dataset"], c["increment"]), method_label(*(c[field] for field in CELL[2:])), c["other_settings"]]
        + [UNKNOWN if c[name] != c[name] else f"{c[name]:{digits[name]}}".replace("-", "−") for name in columns]
        for c in best_first(known).to_dict("records")
    ]
    return markdown_table(["data", "method", "other settings", *columns.values()], rows, num_left=3)


def spread_table(spread: pd.DataFrame) -> str:
    """Return how much Last spreads over seeds on two data sets."""
    rows = [
        [method_label(*row[:4]), row[4], f"{row[5]:.2f} ({row[6]})", f"{row[7]:.2f} ({row[8]})", f"{row[9]:.3f}"]
        for row in spread.itertuples(index=False)
    ]
    heads = ["method", "other settings", "ImageNet-R: spread of Last (seeds)", "CIFAR-100: spread of Last (seeds)", "p"]
    return markdown_table(heads, rows, num_left=2)


def contrast_table(contrasts: pd.DataFrame) -> str:
    """Return one row per contrast."""
    rows = []
    for c in contrasts.itertuples():
        tested = [signed(c.mean), _interval(c.low, c.high), _probability(c.p), _probability(c.p_holm)]
        rows.append([c.question, c.condition, METRICS[c.metric], c.seeds, *tested, c.answer])
    heads = ["question", "condition", "metric", "seeds", "Δ", "95 % interval", "p", "p, Holm", "answer"]
    return markdown_table(heads, rows, num_left=3)


def _probability(p: float) -> str:
    return UNKNOWN if p != p else f"{p:.3f}"


def comparison_table(comparisons: pd.DataFrame) -> str:
    """Return one row per comparison: mean difference, interval, and the verdict with the paper's difference (of a claim) or p."""
    comparisons = comparisons.rename(columns={"against": "compared with"})
    is_claim = bool(comparisons.claim.iloc[0])

    has_paper = is_claim and comparisons.metric.isin(list(METRICS)).all()

    def texts(test: Any) -> list[str]:
        more = [test.verdict, *([signed(test.paper)] if has_paper else [])] if is_claim else [_probability(test.p)]
        return [signed(test.mean), _interval(test.low, test.high), *more]

    more = ["answer", *(["paper's Δ {}"] if has_paper else [])] if is_claim else ["p"]
    return _by_metric(comparisons, ["compared with", "seeds"], ["Δ {}", "95 % interval", *more], texts)


def paper_table(cells: pd.DataFrame, number: int) -> str:
    """Return Table 1, 2, 3 or 4 of the paper with our results; "" without a run. Only data sets and adapters with a run are shown."""
    published = cells[cells.paper_id != ""].query(PAPER_TABLES[number][1])
    run = published[(published.table == number) & (published.seeds > 0)]
    shown = published.merge(run[[*TASKS, "adapter"]].drop_duplicates())

    def texts(cell: Any) -> list[str]:
        difference = UNKNOWN if "model." in cell.other_settings else signed(cell.difference)  # of two models it means nothing
        return [f"{cell.paper:.2f}", _ours(cell), difference, signed(cell.paper_to_first), signed(cell.to_first)]

    heads = ["paper's {}", "our {}", "ours − paper's", "paper's Δ to first order", "our Δ to first order"]
    return _by_metric(shown, [], heads, texts) if len(shown) else ""


def memory_of(steps: pd.DataFrame, published_gb: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return Table 5, one row per adapter and setting: the paper's GB, and the most GiB that a step has reserved and allocated."""
    rows = [(adapter, setting, gb) for adapter, settings in published_gb.items() for setting, gb in settings.items()]
    paper = pd.DataFrame(rows, columns=["adapter", "setting", "paper_gb"])
    ours = steps.assign(setting=steps.branch.mask(steps.branch == "none", "fo"))
    ours = ours.reindex(columns=[*ours.columns.union(["peak_gib", "allocated_gib"])])
    by_setting = ours.groupby(["adapter", "setting", "other_settings"])
    peaks = by_setting.agg(peak_gib=("peak_gib", "max"), allocated_gib=("allocated_gib", "max"), runs=("run", "nunique"))
    peaks = peaks.dropna(subset="peak_gib").reset_index()
    return paper.merge(peaks, on=["adapter", "setting"], how="left").fillna({"other_settings": "", "runs": 0}).astype({"runs": int})


def memory_table(memory: pd.DataFrame) -> str:
    """Return Table 5 with one row per setting."""
    rows = []
    for row in memory.itertuples():
        setting = "first order" if row.setting == "fo" else f"{row.setting} all"
        ours = [row.allocated_gib, row.peak_gib, row.peak_gib / row.paper_gb]
        texts = [UNKNOWN if number != number else f"{number:.2f}" for number in ours]
        rows.append([row.adapter, setting, row.other_settings, f"{row.paper_gb:.2f}", *texts])
    heads = ["adapter", "setting", "other settings", "paper (GB)", "allocated (GiB)", "reserved (GiB)", "reserved / paper"]
    return markdown_table(heads, rows, num_left=3)

"""Tables as Markdown, accuracies in percent with two digits: the summary of a run, and the tables of a report."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlcl.report.records import CELL, TASKS, WITHOUT_ZEROTH, read_records

if TYPE_CHECKING:  # the summary of a run does not need it
    import pandas as pd

Row = Sequence[float | None]
UNKNOWN = "–"
METRICS = {"last": "Last", "avg": "Avg"}
DATASETS = {"cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "imagenet_r": "ImageNet-R"}
PAPER_TABLES = {  # number -> title, and which published cells it shows (Tables 3 and 4 repeat rows for comparison)
    1: ("Zeroth order in a whole branch", "layers in ('none', 'all') and variant in ('none', 'conservative')"),
    2: ("Zeroth order in half of the layers", "layers not in ('none', 'all') and variant == 'conservative'"),
    3: ("MoZO and the same plans without it", "branch == 'dual' and layers in ('hop_odd', 'hop_even')"),
    4: ("Naive, sign and conservative zeroth order in a whole branch", "adapter == 'moe' and layers == 'all'"),
}


def escape(text: Any) -> str:
    """Return text that Markdown shows as it is. Names of runs and tasks are the user's: they must not become links or pictures."""
    return re.sub(r"([\\`*<>|&]|(?<=\])\()", r"\\\1", " ".join(str(text).split()))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], num_left: int = 1) -> str:
    """Return a Markdown table. The first `num_left` columns are aligned left, the others right."""
    rule = [":---"] * num_left + ["---:"] * (len(columns) - num_left)
    lines = [list(map(escape, columns)), rule, *(list(map(escape, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent with two digits, or a dash if it is unknown."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.2f}"


def accuracy_table(matrix_rows: Sequence[Row], seen: Row, names: Sequence[str] | None = None) -> str:
    """Return a table with one row per finished task: the accuracy on each task, and A_t over all classes seen.

    `matrix_rows[i][j]` is the accuracy on task j after task i, and `seen[i]` is A_t after task i: fractions, or None. Rows may end at the
    newest task.
    """
    num_tasks = max([len(matrix_rows), *map(len, matrix_rows)])
    names = names or [f"task {task + 1}" for task in range(num_tasks)]
    rows = []
    for after, (row, mean) in enumerate(zip(matrix_rows, seen, strict=True)):
        cells = [row[task] if task < len(row) else None for task in range(num_tasks)]
        # A task that is still to come is blank; a task that was seen and not measured is unknown.
        texts = ["" if cell is None and task > after else percent(cell) for task, cell in enumerate(cells)]
        rows.append([names[after], *texts, percent(mean)])
    return markdown_table(["after", *names[:num_tasks], "A_t"], rows)


def summarize_run(folder: Path | str, names: Sequence[str] | None = None) -> str:
    """Return a Markdown page about a run folder: Last, Avg, forgetting, and the accuracy on every task after every task."""
    records = read_records(folder)
    newest = records.tasks[-1] if records.tasks else {}
    numbers = {"Last": newest.get("last"), "Avg": newest.get("avg")}
    more = {"forgetting": newest.get("forgetting"), "zero-shot": newest.get("zero_shot")}
    numbers |= {name: value for name, value in more.items() if value is not None}
    head = markdown_table(list(numbers), [[percent(value) for value in numbers.values()]])
    note = "Accuracy in %. A_t: over all classes seen after task t; Last: the final A_t; Avg: the mean of A_t over the tasks."
    table = accuracy_table(records.matrix, records.seen, names) if records.tasks else "No task is finished yet.\n"
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
    name = fixed.get(variant) or f"{branch} {layers}, {variant}"
    return name if adapter in ("moe", "") else f"{name} ({adapter})"


def label_of(row: Any) -> str:
    """Return the label of the method in a row of a data frame."""
    return method_label(row.adapter, row.branch, row.layers, row.variant)


def signed(value: float) -> str:
    """Return a difference with its sign, or a dash if it is NaN."""
    return UNKNOWN if value != value else f"{value:+.2f}".replace("-", "−")


def spread(values: "pd.Series") -> str:
    """Return mean ± standard deviation (number of values)."""
    deviation = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation} ({len(values)})" if len(values) else UNKNOWN


def _interval(test: Any) -> str:
    return UNKNOWN if test.low != test.low else f"[{signed(test.low)}, {signed(test.high)}]"


def common_settings(results: "pd.DataFrame") -> str | None:
    """Return the other settings that all trained runs share; None where they differ."""
    settings = results[results.variant != "zero_shot"].other_settings.unique()
    return settings[0] if len(settings) == results.model_settings.nunique() == 1 else None


def result_table(results: "pd.DataFrame", comparisons: "pd.DataFrame") -> str:
    """Return the results of one data set, the best Last first, each with its paired differences to its control.

    Settings that all results share are not in the table: the caller names them once.
    """
    control = comparisons[comparisons.claim == "differs_from_control"].set_index([*CELL, "other_settings", "metric"])
    results = results.drop_duplicates([*CELL, "other_settings", "seed"])
    rows = []
    for keys, seeds in results.groupby([*CELL, "other_settings"], sort=False):
        variant, settings = keys[-2:]
        tests = [control.loc[(*keys, metric)] for metric in METRICS if (*keys, metric) in control.index]
        name = "" if variant in WITHOUT_ZEROTH else "zero-shot" if keys[3:5] == ("dual", "all") else "frozen"
        differences = [text for test in tests for text in (signed(test["mean"]), _interval(test))] or [UNKNOWN if name else ""] * 4
        texts = [method_label(*keys[2:6]), spread(seeds["last"]), spread(seeds.avg), name, *differences, settings]
        rows.append((-seeds["last"].mean(), texts))
    heads = [head for name in METRICS.values() for head in (f"Δ {name}", "95 % interval")]
    columns = ["method", *METRICS.values(), "control", *heads, "other settings"]
    shown = len(columns) if common_settings(results) is None else -1
    return markdown_table(columns[:shown], [texts[:shown] for _, texts in sorted(rows, key=lambda row: row[0])])


def comparison_table(comparisons: "pd.DataFrame") -> str:
    """Return one row per comparison, Last and Avg side by side: mean difference, interval, and the verdict (of a claim) or p."""
    is_claim = bool(comparisons.claim.iloc[0])
    rows = []
    for keys, both in comparisons.groupby([*CELL, "other_settings", "against"], sort=False):
        texts = [tasks_label(*keys[:2]), method_label(*keys[2:6]), keys[-1], both.seeds.iloc[0]]
        for test in both.itertuples():
            p = UNKNOWN if test.p != test.p else "< 0.001" if test.p < 1e-3 else f"{test.p:.3f}"
            texts += [signed(test.mean), _interval(test), *([test.verdict, signed(test.paper)] if is_claim else [p])]
        rows.append([*texts, keys[-2]])
    more = ["verdict", "paper's Δ"] if is_claim else ["p"]
    heads = [head for name in METRICS.values() for head in (f"Δ {name}", "95 % interval", *more)]
    columns = ["data", "method", "compared with", "seeds", *heads, "other settings"]
    shown = len(columns) if comparisons.other_settings.any() else -1
    return markdown_table(columns[:shown], [row[:shown] for row in rows], num_left=3)


def paper_table(cells: "pd.DataFrame", number: int) -> str:
    """Return Table 1, 2, 3 or 4 of the paper with our runs below its numbers; "" without a run. Only data sets and adapters with a run are shown."""
    published = cells[cells.paper_id != ""].query(PAPER_TABLES[number][1])
    run = published[(published.table == number) & (published.seeds > 0)]
    shown = published.merge(run[[*TASKS, "adapter"]].drop_duplicates())
    if shown.empty:
        return ""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in shown.itertuples():
        texts = {("", "paper"): f"{cell.paper:.2f}", ("", "paper − its first order"): signed(cell.paper_to_first)}
        if cell.seeds:
            deviation = "" if cell.std != cell.std else f" ± {cell.std:.2f}"
            ours = {"ours": f"{cell.mean:.2f}{deviation} ({cell.seeds})"}
            # With another model only differences are comparable.
            ours["ours − paper"] = UNKNOWN if "model." in cell.other_settings else signed(cell.difference)
            ours |= {"ours − our first order": signed(cell.to_first), "ours − our control": signed(cell.gain)}
            texts |= {(cell.other_settings, line): text for line, text in ours.items()}
        for line, text in texts.items():
            if text != UNKNOWN:
                lines.setdefault((label_of(cell), *line), {})[f"{tasks_label(cell.dataset, cell.increment)} {METRICS[cell.metric]}"] = text
    columns = list(dict.fromkeys(column for texts in lines.values() for column in texts))
    methods = list(dict.fromkeys(method for method, *_ in lines))
    ordered = sorted(lines.items(), key=lambda item: methods.index(item[0][0]))
    rows = [[*names, *(texts.get(column, UNKNOWN) for column in columns)] for names, texts in ordered]
    return markdown_table(["method", "other settings", "", *columns], rows, num_left=3)


def memory_of(runs: "pd.DataFrame", steps: "pd.DataFrame", published_gb: Mapping[str, Mapping[str, float]]) -> "pd.DataFrame":
    """Return Table 5, one row per adapter and setting: the paper's GB, and the most GiB that a step of ours has held, by other settings."""
    import pandas as pd

    rows = [(adapter, setting, gb) for adapter, settings in published_gb.items() for setting, gb in settings.items()]
    paper = pd.DataFrame(rows, columns=["adapter", "setting", "paper_gb"])
    is_whole = (runs.layers == "all") & (runs.variant == "conservative")
    ours = runs.assign(setting=runs.branch.where(is_whole).mask(runs.variant == "none", "fo"))[["run", "setting"]].merge(steps, on="run")
    keys = ["adapter", "setting", "other_settings"]
    peaks = (
        ours.assign(peak_gib=ours.get("peak_gib"))
        .groupby(keys)
        .agg(peak_gib=("peak_gib", "max"), runs=("run", "nunique"))
        .dropna()
        .reset_index()
    )
    return paper.merge(peaks, on=["adapter", "setting"], how="left").fillna({"other_settings": "", "runs": 0}).astype({"runs": int})


def memory_table(memory: "pd.DataFrame") -> str:
    """Return Table 5 with one row per setting."""
    rows = []
    for row in memory.itertuples():
        setting = "first order" if row.setting == "fo" else f"{row.setting} all"
        ours = [f"{row.peak_gib:.2f}", f"{row.peak_gib / row.paper_gb:.2f}"] if row.runs else [UNKNOWN, UNKNOWN]
        rows.append([row.adapter, setting, row.other_settings, f"{row.paper_gb:.2f}", *ours])
    return markdown_table(["adapter", "setting", "other settings", "paper (GB)", "ours (GiB)", "ours / paper"], rows, num_left=3)

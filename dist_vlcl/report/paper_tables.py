"""Tables 1 to 5 of the paper, ours under theirs with the difference and the controls; and what is significant over seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_vlcl.report.cells import BRANCHES, PLANS, ZERO_SHOT, Method, Published, Section, Stream, first_order
from dist_vlcl.report.claims import Claim, claim_of
from dist_vlcl.report.tables import UNKNOWN, TextTable

if TYPE_CHECKING:
    import pandas as pd

METRICS = {"last": "Last", "avg": "Avg"}
CIFAR20, CIFAR10, TINY20, IMAGENET_R20 = (
    Stream("cifar100", 20),
    Stream("cifar100", 10),
    Stream("tiny_imagenet", 20),
    Stream("imagenet_r", 20),
)
Values = dict[int, float]  # seed -> accuracy in percent


@dataclass(frozen=True)
class Layout:
    """A table of the paper: its rows and columns, and which other methods are rows of it where they were run."""

    number: int | None
    title: str
    streams: tuple[Stream, ...]
    methods: tuple[Method, ...]
    takes: Callable[[Method], bool]

    @property
    def name(self) -> str:
        return f"Table {self.number}" if self.number else "Beyond the paper"


def _zeroth(layers: Iterable[str], variants: Iterable[str], branches: Iterable[str] = BRANCHES, adapter: str = "moe") -> tuple[Method, ...]:
    return tuple(Method(adapter, branch, plan, variant) for branch in branches for plan in layers for variant in variants)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        1,
        "zeroth order in a whole branch",
        (CIFAR20, CIFAR10, TINY20, IMAGENET_R20),
        tuple(method for a in ("moe", "lora") for method in (first_order(a), *_zeroth(["all"], ["conservative"], adapter=a))),
        lambda m: m.variant == "none" or (m.layers, m.variant) == ("all", "conservative"),
    ),
    Layout(
        2,
        "zeroth order in half of the layers",
        (CIFAR20, CIFAR10, TINY20, IMAGENET_R20),
        _zeroth(PLANS, ["conservative"]),
        lambda m: m.layers != "all" and m.variant == "conservative",
    ),
    Layout(
        3,
        "MoZO beside the same plan without it",
        (CIFAR10, TINY20, IMAGENET_R20),
        _zeroth(["hop_odd", "hop_even"], ["conservative", "mozo"], ["dual"]),
        lambda m: m.variant == "mozo",
    ),
    Layout(
        4,
        "naive, sign and conservative zeroth order in a whole branch",
        (CIFAR10,),
        _zeroth(["all"], ["naive", "sign", "conservative"]),
        lambda m: m.layers == "all" and m.variant in ("naive", "sign"),
    ),
    Layout(None, "methods that the paper has not", (), (), lambda m: m.is_zeroth and not any(table.takes(m) for table in LAYOUTS[:-1])),
)


def accuracies(section: Section, stream: Stream, method: Method, note: tuple[str, ...], metric: str) -> Values:
    """Seed -> accuracy in percent of the runs of a cell. Zero-shot CLIP is known from every run that evaluated before it trained."""
    values = {entry.run.seed: 100 * entry.run.accuracy[metric] for entry in section.find(stream, method, note)}
    if method == ZERO_SHOT:
        measured = {e.run.seed: e.run.zero_shot for e in section.entries if e.stream == stream and e.run.zero_shot}
        values |= {seed: 100 * (seen[-1] if metric == "last" else float(np.mean(seen))) for seed, seen in measured.items()}
    return values


def control_note(note: tuple[str, ...]) -> tuple[str, ...]:
    """The note that a run without zeroth order has where one with it has `note`."""
    return tuple(text for text in note if not text.startswith("zo."))


def layouts_of(section: Section) -> list[Layout]:
    """The tables that have a run in the section; for the paper's own section all of the paper's."""
    taken = [layout for layout in LAYOUTS if any(layout.takes(entry.method) for entry in section.entries)]
    return [layout for layout in LAYOUTS if layout in taken or (section.is_paper and layout.number)]


def cell_frame(section: Section, layout: Layout, published: Sequence[Published]) -> "pd.DataFrame":
    """One line a cell and metric: theirs, ours, the control. Accuracies in percent, standard deviations with n - 1.

    `seeds` is 0 where we have no run. `gain` is ours less the control's over the seeds that both have; `to_first` ours less first order's
    likewise, and `paper_to_first` the paper's less its first order's.
    """
    import pandas as pd

    known = {(cell.stream, cell.method): cell for cell in published}
    lines = []
    for method, note in _rows(section, layout):
        for stream in _columns(section, layout):
            for metric in METRICS:
                cell = known.get((stream, method))
                ours = accuracies(section, stream, method, note, metric)
                control = accuracies(section, stream, method.twin, control_note(note), metric) if method.is_zeroth else {}
                paper = getattr(cell, metric) if cell else np.nan
                lines.append(
                    {
                        **cell_columns(stream, method, note),
                        "metric": metric,
                        "paper_id": cell.id if cell else "",
                        "paper": paper,
                        **_summary("", ours),
                        "difference": _mean(ours.values()) - paper,
                        **_to_first_order(section, stream, method, note, metric, known),
                        **_summary("control_", control),
                        "gain": _mean(_differences(ours, control)),
                        "gain_seeds": len(ours.keys() & control.keys()),
                    }
                )
    return pd.DataFrame(lines)


def _to_first_order(
    section: Section, stream: Stream, method: Method, note: tuple[str, ...], metric: str, known: Mapping
) -> dict[str, float]:
    baseline = first_order(method.adapter)
    if not method.is_zeroth:
        return {"to_first": np.nan, "paper_to_first": np.nan}
    ours = accuracies(section, stream, method, note, metric)
    theirs = [getattr(known[stream, m], metric) for m in (method, baseline) if (stream, m) in known]
    return {
        "to_first": _mean(_differences(ours, accuracies(section, stream, baseline, control_note(note), metric))),
        "paper_to_first": theirs[0] - theirs[1] if len(theirs) == 2 else np.nan,
    }


def cell_columns(stream: Stream, method: Method, note: tuple[str, ...] = ()) -> dict[str, Any]:
    """A cell as columns of a tidy file."""
    return {
        "dataset": stream.dataset,
        "increment": stream.increment,
        "adapter": method.adapter,
        "branch": method.branch,
        "layers": method.layers,
        "variant": method.variant,
        "settings": "; ".join(note),
    }


def cell_table(frame: "pd.DataFrame", is_paper_model: bool) -> TextTable:
    """The paper's layout: a row a method, a column a data set and metric; ours, the difference and the control as lines below theirs.

    With another model than the paper's, it is the differences to first order that can be compared.
    """
    streams = {(row.dataset, row.increment): Stream(row.dataset, row.increment) for row in frame.itertuples()}
    columns = [f"{stream.label} {METRICS[metric]}" for stream in streams.values() for metric in METRICS]
    rows: list[list[str]] = []
    for (adapter, branch, layers, variant, note), cells in frame.groupby(
        ["adapter", "branch", "layers", "variant", "settings"], sort=False
    ):
        method = Method(adapter, branch, layers, variant)
        lines = _lines(method, note, list(cells.to_dict("records")), is_paper_model)
        rows += [[f"**{method.label}**" if index == 0 else "", *line] for index, line in enumerate(lines)]
    return TextTable(["method", "", *columns], rows, num_left=2)


def _lines(method: Method, note: str, cells: list[dict[str, Any]], is_paper_model: bool) -> list[list[str]]:
    ours = f"ours, {note}" if note else "ours"
    lines = {
        "paper": [_number(cell["paper"]) for cell in cells],
        ours: [spread(cell["mean"], cell["std"], cell["seeds"]) for cell in cells],
    }
    if is_paper_model:
        lines["ours − paper"] = [signed(cell["difference"]) for cell in cells]
    else:
        lines["paper − its first order"] = [signed(cell["paper_to_first"]) for cell in cells]
        lines["ours − our first order"] = [signed(cell["to_first"]) for cell in cells]
    if method.is_zeroth:
        control = "zero-shot" if method.twin == ZERO_SHOT else "frozen"
        lines[control] = [spread(cell["control_mean"], cell["control_std"], cell["control_seeds"]) for cell in cells]
        lines[f"ours − {control}"] = [signed(cell["gain"]) for cell in cells]
    # A line without any number is left out, but for ours beside theirs: that it is missing is what one should see.
    known = {name for name, texts in lines.items() if set(texts) != {UNKNOWN}}
    return [[name, *texts] for name, texts in lines.items() if name in known or (name == ours and "paper" in known)]


def _rows(section: Section, layout: Layout) -> list[tuple[Method, tuple[str, ...]]]:
    """The paper's methods, each followed by its variants; then those that were run besides; zero-shot CLIP above all."""
    run = sorted({e.method for e in section.entries if layout.takes(e.method)} - set(layout.methods), key=lambda m: m.order)
    adapters = {e.method.adapter for e in section.entries} | ({"moe", "lora"} if section.is_paper else set())
    methods = [m for m in layout.methods if m.adapter in adapters] + run
    zero_shot = [(ZERO_SHOT, ())] if any(accuracies(section, s, ZERO_SHOT, (), "last") for s in section.streams) else []
    return zero_shot + [(method, note) for method in methods for note in section.notes(method) or [()]]


def _columns(section: Section, layout: Layout) -> list[Stream]:
    """The paper's streams, of which a section that is not the paper's shows those it has; then those that were run besides."""
    run = {e.stream for e in section.entries if layout.takes(e.method)}
    return [s for s in layout.streams if section.is_paper or s in run] + sorted(run - set(layout.streams), key=lambda s: s.order)


def missing_cells(section: Section, published: Sequence[Published]) -> list[Published]:
    """The paper's cells without a run here; for a section that is not the paper's, of the data sets and adapters that it has."""
    run = {(e.stream, e.method) for e in section.entries}
    streams, adapters = {e.stream for e in section.entries}, {e.method.adapter for e in section.entries}
    asked = [cell for cell in published if section.is_paper or (cell.stream in streams and cell.method.adapter in adapters)]
    return [cell for cell in asked if (cell.stream, cell.method) not in run]


def missing_controls(section: Section) -> list[tuple[Stream, Method]]:
    """The controls of zeroth-order cells that were not run."""
    cells = dict.fromkeys((e.stream, e.method) for e in section.entries if e.method.is_zeroth)
    lacking = [(stream, method.twin) for stream, method in cells if not accuracies(section, stream, method.twin, (), "last")]
    return list(dict.fromkeys(lacking))


def memory_frame(section: Section, published_gb: Mapping[str, Mapping[str, float]]) -> "pd.DataFrame":
    """Table 5, one line an adapter and setting: the paper's GB and the most GiB that a step of ours has held."""
    import pandas as pd

    lines = []
    for adapter, row in published_gb.items():
        for setting, paper in row.items():
            method = first_order(adapter) if setting == "fo" else Method(adapter, setting, "all", "conservative")
            runs = [e.run for e in (*section.entries, *section.probes) if e.method == method and e.run.peak_gib is not None]
            peak = max((run.peak_gib for run in runs if run.peak_gib is not None), default=np.nan)
            devices = sorted({device for run in runs for device in run.accelerators})
            lines.append(
                {
                    "adapter": adapter,
                    "setting": setting,
                    "paper_gb": paper,
                    "peak_gib": peak,
                    "runs": len(runs),
                    "accelerators": "; ".join(devices),
                }
            )
    return pd.DataFrame(lines)


def memory_table(frame: "pd.DataFrame") -> TextTable:
    """Table 5 in the paper's layout."""
    rows = []
    for adapter, cells in frame.groupby("adapter", sort=False):
        rows.append([f"**{adapter}**", "paper (GB)", *map(_number, cells.paper_gb)])
        rows.append(["", "ours (GiB)", *map(_number, cells.peak_gib)])
        rows += [["", "ours / paper", *map(_number, cells.peak_gib / cells.paper_gb)]] if cells.peak_gib.notna().any() else []
    names = {"fo": "first order"}
    return TextTable(["adapter", "", *(names.get(setting, f"{setting} all") for setting in frame.setting.unique())], rows, num_left=2)


def comparison_frame(section: Section, published: Sequence[Published] = ()) -> "pd.DataFrame":
    """What the paper's claims rest on: differences of two methods over the seeds that both have, with a paired t-test.

    `low` and `high` bound the 95 % confidence interval; they and `p` are missing with fewer than two seeds. `claim` and `verdict`: which
    claim of the paper the difference bears on, if any, and what it says. `paper`: the same difference of the published numbers.
    """
    import pandas as pd

    known = {(cell.stream, cell.method): cell for cell in published}
    lines = []
    for stream in section.streams:
        for (method, note), (other, other_note) in _pairs(section, stream):
            claim = claim_of(method, other)
            theirs = [known[stream, m] for m in (method, other) if (stream, m) in known]
            for metric in METRICS:
                values = [accuracies(section, stream, *cell, metric) for cell in ((method, note), (other, other_note))]
                if values[0].keys() & values[1].keys():
                    test = paired_test(_differences(*values))
                    lines.append(
                        {
                            **cell_columns(stream, method, note),
                            **{"against": other.label, "metric": metric, **test},
                            "paper": getattr(theirs[0], metric) - getattr(theirs[1], metric) if len(theirs) == 2 else np.nan,
                            "claim": claim.name if claim else "",
                            "verdict": claim.verdict(test["low"], test["high"]) if claim else "",
                        }
                    )
    return pd.DataFrame(lines)


def _pairs(section: Section, stream: Stream) -> list[tuple[tuple[Method, tuple[str, ...]], tuple[Method, tuple[str, ...]]]]:
    pairs = []
    for method in sorted(
        {e.method for e in section.entries if e.stream == stream and (e.method.is_zeroth or e.method.variant == "frozen")},
        key=lambda m: m.order,
    ):
        others = [*([method.twin] if method.is_zeroth else []), first_order(method.adapter)]
        if method.variant == "mozo":
            others.append(Method(method.adapter, method.branch, method.layers, "conservative"))
        if (method.branch, method.layers) == ("language", "all"):
            others.append(Method(method.adapter, "vision", "all", method.variant))
        for note in section.notes(method):
            for other in others:
                # Of the other method the run with the same settings; one that reads no zeroth-order settings has none of these.
                same = note if other.is_zeroth else control_note(note)
                if same in section.notes(other) or other == ZERO_SHOT:
                    pairs.append(((method, note), (other, same)))
    return pairs


def paired_test(differences: Sequence[float]) -> dict[str, float]:
    """seeds, mean, low, high, p of paired differences."""
    from scipy import stats

    known = {"seeds": len(differences), "mean": _mean(differences)}
    if len(differences) < 2 or np.allclose(differences, differences[0], rtol=0, atol=1e-9):
        return {**known, "low": np.nan, "high": np.nan, "p": np.nan}
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return {**known, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def comparison_table(frame: "pd.DataFrame", claim: Claim | None = None) -> TextTable:
    """One row a comparison: for Last and Avg the mean difference, its interval and p; for a claim the verdict and the paper's, not p."""
    rows = []
    keys = ["dataset", "increment", "adapter", "branch", "layers", "variant", "settings", "against"]
    for (dataset, increment, *cell, note, against), both in frame.groupby(keys, sort=False):
        by_metric = {row["metric"]: row for row in both.to_dict("records")}
        texts = [text for metric in METRICS for text in _test_texts(by_metric[metric], claim)]
        label = Method(*cell).label + (f" ({note})" if note else "")
        rows.append([Stream(dataset, increment).label, label, against, str(by_metric["last"]["seeds"]), *texts])
    heads = [head for name in METRICS.values() for head in _test_heads(name, claim)]
    return TextTable(["data", "method", "compared with", "seeds", *heads], rows, num_left=3)


def _test_heads(name: str, claim: Claim | None) -> list[str]:
    return [f"Δ {name}", "95 % interval", *(["verdict", "paper's Δ"] if claim else ["p"])]


def _test_texts(test: Mapping[str, Any], claim: Claim | None) -> list[str]:
    if claim:
        return [signed(test["mean"]), interval(test), test["verdict"], signed(test["paper"])]
    p = UNKNOWN if np.isnan(test["p"]) else "< 0.001" if test["p"] < 1e-3 else f"{test['p']:.3f}"
    return [signed(test["mean"]), interval(test), p]


def interval(test: Mapping[str, Any]) -> str:
    """The bounds of an interval; a dash where there is none."""
    return UNKNOWN if np.isnan(test["low"]) else f"[{signed(test['low'])}, {signed(test['high'])}]"


def result_table(section: Section, stream: Stream) -> TextTable:
    """One row a method: Last and Avg over the seeds, and the paired differences to its control."""
    cells = [
        (method, note)
        for method in sorted({e.method for e in section.entries if e.stream == stream}, key=lambda m: m.order)
        for note in section.notes(method)
        if section.find(stream, method, note)
    ]
    cells = [cell for cell in cells if cell[0] != ZERO_SHOT]
    if accuracies(section, stream, ZERO_SHOT, (), "last"):
        cells.insert(0, (ZERO_SHOT, ()))
    rows = []
    for method, note in cells:
        label = method.label + (f" ({'; '.join(note)})" if note else "")
        values = {metric: accuracies(section, stream, method, note, metric) for metric in METRICS}
        summaries = [_summary("", values[metric]) for metric in METRICS]
        spreads = [spread(summary["mean"], summary["std"], len(values[metric])) for summary, metric in zip(summaries, METRICS, strict=True)]
        gains = []
        for metric in METRICS:
            control = accuracies(section, stream, method.twin, control_note(note), metric) if method.is_zeroth else {}
            test = paired_test(_differences(values[metric], control))
            gains += [signed(test["mean"]), interval(test)]
        rows.append([label, *spreads, ("zero-shot" if method.twin == ZERO_SHOT else "frozen") if method.is_zeroth else "", *gains])
    heads = [head for name in METRICS.values() for head in (f"Δ {name}", "95 % interval")]
    return TextTable(["method", *METRICS.values(), "control", *heads], rows)


def _summary(prefix: str, values: Values) -> dict[str, Any]:
    std = float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else np.nan
    return {f"{prefix}mean": _mean(values.values()), f"{prefix}std": std, f"{prefix}seeds": len(values)}


def _differences(ours: Values, theirs: Values) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else np.nan


def _number(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference with its sign; a dash for what is not known."""
    return UNKNOWN if np.isnan(value) else f"{value:+.2f}".replace("-", "−")


def spread(mean: float, std: float, seeds: int) -> str:
    """Mean ± standard deviation (number of seeds)."""
    if not seeds:
        return UNKNOWN
    return f"{mean:.2f} ({seeds})" if np.isnan(std) else f"{mean:.2f} ± {std:.2f} ({seeds})"

"""Accuracy tables, in percent with two digits, as the papers of the field print them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vlcl.report.records import read_records

Row = Sequence[float | None]
UNKNOWN = "–"


@dataclass(frozen=True)
class TextTable:
    """Cells as they are printed; `markdown()` is the table as Markdown."""

    columns: list[str]
    rows: list[list[str]]
    num_left: int = 1

    def markdown(self) -> str:
        """The table as Markdown, the first `num_left` columns to the left and the others to the right."""
        rule = [":---"] * self.num_left + ["---:"] * (len(self.columns) - self.num_left)
        lines = [self.columns, rule, *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def percent(fraction: float | None) -> str:
    """A fraction in percent with two digits; a dash for what is not known."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.2f}"


def accuracy_table(matrix_rows: Sequence[Row], names: Sequence[str] | None = None, seen: Row | None = None) -> TextTable:
    """One row after every task: the accuracy on each task, and A_t over all classes seen.

    `matrix_rows[i][j]` is the accuracy on task j after task i, a fraction or None; rows may be as short as what was seen.
    Without `seen`, A_t is the plain mean of a row up to its task, which is right where tasks are equally large.
    """
    num_tasks = max([len(matrix_rows), *map(len, matrix_rows)])
    names = names or [f"task {task + 1}" for task in range(num_tasks)]
    means = [_mean(row[: task + 1]) for task, row in enumerate(matrix_rows)] if seen is None else seen
    rows = []
    for after, (row, mean) in enumerate(zip(matrix_rows, means, strict=True)):
        cells = [row[task] if task < len(row) else None for task in range(num_tasks)]
        # A task that is still to come is blank; one that was seen and not measured is unknown.
        texts = ["" if cell is None and task > after else percent(cell) for task, cell in enumerate(cells)]
        rows.append([names[after], *texts, percent(mean)])
    return TextTable(["after", *names[:num_tasks], "A_t"], rows)


def summary_markdown(
    title: str,
    matrix_rows: Sequence[Row],
    names: Sequence[str] | None = None,
    seen: Row | None = None,
    last: float | None = None,
    avg: float | None = None,
    forgetting: float | None = None,
    zero_shot: float | None = None,
) -> str:
    """A page about one run: Last, Avg, forgetting, and the accuracy on every task after every task."""
    figures = {"Last": last, "Avg": avg, "forgetting": forgetting, "zero-shot": zero_shot}
    known = {name: value for name, value in figures.items() if value is not None or name in ("Last", "Avg")}
    head = TextTable(list(known), [[percent(value) for value in known.values()]])
    note = "Accuracy in %. A_t: over all classes seen after task t; Last: the final A_t; Avg: the mean of A_t over the tasks."
    table = accuracy_table(matrix_rows, names, seen).markdown() if matrix_rows else "No task is finished yet.\n"
    return f"# {title}\n\n{head.markdown()}\n{table}\n{note}\n"


def summarize_run(folder: Path | str, names: Sequence[str] | None = None) -> str:
    """The summary of a run folder, from its metrics.jsonl."""
    records = read_records(folder)
    newest = records.tasks[-1] if records.tasks else {}
    figures = {key: newest.get(key) for key in ("last", "avg", "forgetting", "zero_shot")}
    return summary_markdown(Path(folder).resolve().name, records.matrix, names, records.seen, **figures) + _waits(records.steps)


def _waits(steps: Sequence[dict[str, Any]]) -> str:
    """A line on the time that steps waited for their images; nothing where no step says."""
    waited = sum(record.get("data_seconds", 0.0) for record in steps)
    whole = waited + sum(record.get("seconds", 0.0) for record in steps)
    if not waited:
        return ""
    advice = " More `data.num_workers`, or shards built with `data.encoding=pixels`, would help." if waited > 0.05 * whole else ""
    return f"\nWaiting for images took {percent(waited / whole)} % of the time of the steps.{advice}\n"


def _mean(row: Row) -> float | None:
    known = [cell for cell in row if cell is not None]
    return sum(known) / len(known) if known else None

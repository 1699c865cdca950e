"""The page of a report as Markdown and as one HTML file: runs, claims, figures, the paper's tables, and missing runs."""

import base64
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from dist_vlcl.report import tables
from dist_vlcl.report.paper_figures import Picture, pictures_of, pictures_of_runs
from dist_vlcl.report.records import CONTROLS
from dist_vlcl.report.statistics import AGAINST, CLAIMS, QUESTIONS, RULE, cells_of, compare, complete_of, results_of
from dist_vlcl.report.tables import CONTRIBUTION_TERMS, METRICS, PAPER_TABLES, TERMS, UNKNOWN, escape


class Report:
    """Everything a report shows, computed from one data frame of runs.

    `published`: one row per published cell with the fields of paper.Cell. `memory_gb`: the numbers of Table 5. `left_out`: folders that
    are not in the report, each with the reason. `against`: the name of a method that the others are compared with.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        published: pd.DataFrame,
        memory_gb: Mapping[str, Any],
        left_out: Mapping[str, str],
        against: str | None = None,
    ) -> None:
        complete = complete_of(runs)
        self.num_shown = len(complete)
        results = results_of(complete)
        comparisons = compare(results, published, against)
        if against is not None and AGAINST not in set(comparisons.claim):
            raise ValueError(f"--against {against!r}: no other method has a seed and the settings of training in common with it")
        cells = cells_of(results, comparisons, published)
        memory = tables.memory_of(runs, memory_gb)
        shown = complete.drop(columns=["path", "shared_settings", "method_settings", "model_settings"])
        figures, of_runs = pictures_of(complete, results), list(pictures_of_runs(complete))
        self.pictures = [*of_runs, *figures]
        self.data = {"runs": shown, "cells": cells, "comparisons": comparisons, "memory": memory}
        self.data |= {picture.name: picture.data for picture in self.pictures}
        repeated = runs[runs.is_complete & ~runs.is_probe & ~runs.path.isin(complete.path)].run
        self.left_out = {**left_out, **dict.fromkeys(repeated, "repeats the settings and the seed of another run")}
        self.left_out |= dict.fromkeys(runs[runs.is_complete & runs.is_probe].run, "ended by train.max_steps: only its memory is shown")
        self.left_out |= {row.run: f"not complete, tasks done: {row.tasks_done}" for row in runs[~runs.is_complete].itertuples()}
        blocks = [*_results(cells[cells.seeds > 0]), *_figures("Each run", of_runs), *_claims(comparisons), *_figures("Figures", figures)]
        blocks += [*_tables(cells, memory), *_missing(comparisons, self.left_out)]
        titles = [block.removeprefix("## ") for block in blocks if block.startswith("## ")]
        contents = "".join(f"- [{title}](#{_anchor(title)})\n" for title in titles)
        self.page = "\n\n".join(block.rstrip() for block in ("# Report", contents, TERMS, *blocks)) + "\n"

    def write(self, out: Path) -> None:
        """Write the page, its pictures and its data into a folder."""
        for folder in ("images", "data"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        written = {}
        for picture in self.pictures:
            path = out / "images" / f"{picture.name}.png"
            picture.figure.savefig(path)
            written[f"images/{path.name}"] = path.read_bytes()
        for name, frame in self.data.items():
            frame.to_csv(out / "data" / f"{name}.csv", index=False)
        (out / "report.md").write_text(self.page, encoding="utf-8")
        (out / "report.html").write_text(to_html(self.page, written), encoding="utf-8")


def _results(ours: pd.DataFrame) -> Iterator[str]:
    yield "## What was run"
    contribution = tables.contribution_table(ours)
    by_kind = ours.groupby(ours.variant == "zero_shot").other_settings  # the untrained model has no settings of training
    if by_kind.nunique().max() == 1 and ours.other_settings.any():
        yield f"Other settings than the paper's, in all runs: {escape(max(by_kind.first(), key=len))}."
        ours = ours.assign(other_settings="")
    yield tables.result_table(ours)
    if contribution:
        yield "## What did zeroth order contribute?"
        yield CONTRIBUTION_TERMS
        yield contribution


def _claims(comparisons: pd.DataFrame) -> Iterator[str]:
    if comparisons.empty:
        return
    yield "## Questions"
    yield RULE
    for name, claim in QUESTIONS.items():
        found = comparisons[comparisons.claim == name]
        if found.empty:
            continue
        counted = found[~found.variant.isin(CONTROLS) | (name == AGAINST)]  # controls are in the table, and no evidence for a claim
        verdicts = counted.assign(verdict=counted.verdict.replace(UNKNOWN, "no interval"), metric=counted.metric.map(METRICS).fillna(""))
        counts = verdicts.groupby("metric", sort=False).verdict.value_counts().sort_index(ascending=False)
        texts = [f"{metric} {verdict}: {count}".strip() for (metric, verdict), count in counts.items()]
        yield f"**{claim.statement}** ({claim.condition}) {'; '.join(texts) or 'Only controls were run'}."
        yield tables.comparison_table(found)


def _figures(title: str, pictures: list[Picture]) -> Iterator[str]:
    if pictures:
        yield f"## {title}"
    for picture in pictures:
        yield f"![{escape(picture.title)}](images/{picture.name}.png)"
        yield f"**{escape(picture.title)}.** {escape(picture.caption)} Data: `data/{picture.name}.csv`."


def _tables(cells: pd.DataFrame, memory: pd.DataFrame) -> Iterator[str]:
    found = {f"### Table {number}. {title}": tables.paper_table(cells, number) for number, (title, _) in PAPER_TABLES.items()}
    if memory.runs.any():
        found["### Table 5. Peak memory of a step"] = tables.memory_table(memory)
    if any(found.values()):
        yield "## The paper's tables"
        yield "The paper's numbers are single runs. With another model than the paper's, compare differences and not accuracies."
    for title, table in found.items():
        if table:
            yield title
            yield table


def _missing(comparisons: pd.DataFrame, left_out: Mapping[str, str]) -> Iterator[str]:
    """Yield the questions that no run answers, and the folders that were not used."""
    yield "## What is missing"
    unasked = [claim.statement for name, claim in CLAIMS.items() if name not in set(comparisons.claim)]
    yield f"Questions without runs: {' '.join(unasked) or 'none'}"
    if left_out:
        yield f"Folders that were left out: {'; '.join(f'{escape(name)} ({escape(reason)})' for name, reason in sorted(left_out.items()))}."


def _anchor(title: str) -> str:
    """Return the address of a heading within its page, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def to_html(page: str, pictures: Mapping[str, bytes]) -> str:
    """Return a Markdown page as one HTML file that needs no other.

    `pictures` maps the address of each picture that the report has written to its PNG. Any other picture that the page names stays text.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("autolink")
    tokens = markdown.parse(page)
    for token, text in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _anchor(text.content))
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        if png := pictures.get(str(image.attrs["src"])):
            image.attrs["src"] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        else:
            image.type = "text"
    body = markdown.renderer.render(tokens, markdown.options, {})
    style = (Path(__file__).parent / "page.css").read_text()
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>dist_vlcl report</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}\n<style>\n{style}</style></head>\n<body>\n{body}</body></html>\n'

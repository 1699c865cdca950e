"""Put our runs beside the paper's numbers:  python -m dist_vlcl.report.build runs/* [--out report]

Writes OUT/report.md, OUT/report.html (one file, its pictures inside), OUT/images/*.png, and every number as tidy CSV in OUT/data/.
With --into PAGE.md, results, claims and every figure that has data also go into that page, between its lines <!-- report --> and
<!-- /report -->.
"""

import argparse
import base64
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track

from dist_vlcl.config import CONFIG_FOLDER, from_hydra
from dist_vlcl.report import paper_tables as tables
from dist_vlcl.report.cells import ZERO_SHOT, Entry, Method, Published, Section, Stream, classify, published_cells, sections_of
from dist_vlcl.report.claims import CLAIMS, RULE, tally
from dist_vlcl.report.figures import STYLE, write_picture
from dist_vlcl.report.paper_figures import FIGURES, Picture, claims_pictures, draw_memory, pictures_of
from dist_vlcl.report.records import NoRun, Run, read_run
from dist_vlcl.report.tables import TextTable
from dist_vlcl.run.files import replace_file

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
MARKS = ("<!-- report -->", "<!-- /report -->")
INTRODUCTION = """# Report

Accuracy in % over all classes seen, task-agnostic. Last: after the final task; Avg: the mean over tasks. *paper*: the published number, of
a single run. *ours*: mean ± standard deviation over seeds, with their number. *frozen*: the control in which the zeroth-order units are not
trained; where no other unit learns, that is *zero-shot* CLIP. Differences of ours are over the seeds that both have. –: not known, or not
run.

Runs stand in one table only where they have the same model and the same settings; each part says in what it departs from the paper.
"""


@dataclass
class Report:
    """What a report holds, before it is written: its page, its pictures and its tidy tables, by name."""

    page: str = INTRODUCTION
    digest: str = ""  # results, claims and figures alone, for another page
    shown_there: list[str] = field(default_factory=list)  # its pictures
    pictures: dict[str, Picture] = field(default_factory=dict)
    data: dict[str, "pd.DataFrame"] = field(default_factory=dict)

    def add(self, *blocks: str) -> None:
        """Append paragraphs, headings or tables to the page."""
        self.page += "".join(f"\n{block.rstrip()}\n" for block in blocks if block)

    def add_data(self, name: str, section: Section, frame: "pd.DataFrame") -> None:
        """Append a section's lines to a tidy table."""
        import pandas as pd

        if len(frame):
            frame = frame.copy()
            frame.insert(0, "section", section.title)
            self.data[name] = pd.concat([self.data[name], frame], ignore_index=True) if name in self.data else frame


def build(runs: Sequence[Run], passed_over: Mapping[str, str] | None = None) -> Report:
    """The report of some runs. passed_over: other folders, each with what is wrong with it."""
    paper = published_paper()
    published = published_cells(paper["runs"])
    complete = [run for run in runs if run.is_complete]
    sections = sections_of([classify(run, reference) for run in _shown(complete, "runs", len(complete))])
    report = Report()
    if not any(section.is_paper for section in sections):
        report.add(f"**None of the {len(published)} published cells has a run of the paper's model with the paper's settings here.**")
    report.add(_overview(sections, published).markdown())
    for section, slug in zip(sections, _slugs(sections), strict=True):
        _add_section(report, section, slug, published, paper["table5_memory_gb"])
    used = {entry.run.path for section in sections for entry in (*section.entries, *section.probes)}
    unused = {run.name: f"not complete: {run.num_tasks_done} tasks done" for run in runs if not run.is_complete}
    unused |= {run.name: "repeats a run of the same cell and seed" for run in complete if run.path not in used}
    unused |= passed_over or {}
    if unused:
        report.add("## Not in this report", "\n".join(f"- `{name}`: {why}" for name, why in sorted(unused.items())))
    return report


def _overview(sections: Sequence[Section], published: Sequence[Published]) -> TextTable:
    cells = {(cell.stream, cell.method) for cell in published}
    rows = []
    for section in sections:
        covered = len({(e.stream, e.method) for e in section.entries} & cells)
        other = "; ".join(f"{d.key} {d.ours}" for d in section.departures if not d.key.startswith("model."))
        counts = [str(len(section.entries)), f"{covered} of {len(published)}"]
        rows.append([section.title, ", ".join(stream.label for stream in section.streams), other, *counts])
    return TextTable(["part", "data", "other settings than the paper's", "runs", "cells of the paper"], rows, num_left=3)


def _slugs(sections: Sequence[Section]) -> list[str]:
    """A name for the files of each section."""
    models = [re.sub(r"[^a-z0-9]+", "-", section.model.lower()).strip("-") for section in sections]
    earlier = [models[:index].count(model) for index, model in enumerate(models)]
    return [model + (f"-{count + 1}" if count else "") for model, count in zip(models, earlier, strict=True)]


def _add_section(report: Report, section: Section, slug: str, published: Sequence[Published], memory_gb: Mapping) -> None:
    report.add(f"## {section.title}")
    report.add(_departures(section))
    report.add_data("runs", section, _runs_frame(section))
    for stream in section.streams:
        what = "Δ: mean paired difference to the control, with its 95 % interval."
        report.add(f"### {stream.label}, every method", f"{section.title}. {what}", tables.result_table(section, stream).markdown())
    comparisons = tables.comparison_frame(section, published)
    _add_claims(report, section, comparisons, slug)
    _add_accuracies(report, section, published)
    memory = tables.memory_frame(section, memory_gb)
    if section.is_paper or memory.runs.any():
        _add_memory(report, section, memory)
    pictures = list(_shown(pictures_of(section), f"figures of part {section.number}", len(FIGURES) * len(section.streams)))
    if memory.runs.any():
        pictures.append(Picture("memory", "Table 5 as a picture", f"{section.title}.", draw_memory(memory), memory))
    _add_figures(report, pictures, slug)
    report.add("### Missing", _missing(section, published))
    _add_digest(report, section, comparisons, slug)


def _add_accuracies(report: Report, section: Section, published: Sequence[Published]) -> None:
    caveat = "" if section.is_paper else " The paper's numbers are of its own model and settings: compare differences, not accuracies."
    for layout in tables.layouts_of(section):
        frame = tables.cell_frame(section, layout, published)
        frame.insert(0, "table", layout.name)
        report.add_data("cells", section, frame)
        heading = f"### {layout.name}. {layout.title[0].upper()}{layout.title[1:]}"
        report.add(heading, f"{section.title}.{caveat}", tables.cell_table(frame, section.is_paper_model).markdown())


def _add_memory(report: Report, section: Section, memory: "pd.DataFrame") -> None:
    report.add_data("memory", section, memory)
    devices = "; ".join(dict.fromkeys(filter(None, memory.accelerators))) or "of an unknown device"
    devices = devices if memory.runs.any() else "no run has recorded it"
    what = f"{section.title}. Peak memory of a step: the paper's GB as printed; ours the most GiB that PyTorch has held ({devices})."
    report.add("### Table 5. Memory", what, tables.memory_table(memory).markdown())


def _add_claims(report: Report, section: Section, comparisons: "pd.DataFrame", slug: str) -> None:
    if comparisons.empty:
        return
    report.add_data("comparisons", section, comparisons)
    report.add("### The paper's claims, on these runs", f"{section.title}. {RULE}", *_claim_blocks(comparisons))
    _add_pictures(report, list(claims_pictures(section, comparisons)), slug)
    others = comparisons[comparisons.claim == ""]
    if len(others):
        what = "Mean difference in points over the seeds that both have; 95 % interval and p of a paired t-test, not corrected."
        report.add("### Other differences", f"{section.title}. {what}", tables.comparison_table(others).markdown())


def _claim_blocks(comparisons: "pd.DataFrame") -> Iterator[str]:
    """Each claim's question with what the runs say, and its table."""
    for claim in CLAIMS:
        found = comparisons[comparisons.claim == claim.name]
        yield f"**{claim.question}** (Δ {claim.condition}) {tally(found) if len(found) else 'Not run.'}"
        if len(found):
            yield tables.comparison_table(found, claim).markdown()


def _add_digest(report: Report, section: Section, comparisons: "pd.DataFrame", slug: str) -> None:
    """Put together, from what the report has, what another page shows of a section."""
    blocks = [f"### {section.title}", _departures(section)]
    for stream in section.streams:
        blocks += [f"#### {stream.label}", tables.result_table(section, stream).markdown()]
    if len(comparisons):
        blocks += ["#### The paper's claims", RULE, *_claim_blocks(comparisons)]
    for name, picture in report.pictures.items():
        if name.startswith((f"{slug}-claims-", f"{slug}-figure")):
            report.shown_there.append(name)
            blocks += [f"![{picture.title}](images/{name}.png)", f"**{picture.title}.** {picture.caption}"]
    report.digest += "".join(f"\n{block.rstrip()}\n" for block in blocks if block)


def _departures(section: Section) -> str:
    told = "; ".join(map(str, section.departures))
    return f"Other than in the paper, in every run that it concerns: {told}." if told else ""


def _add_figures(report: Report, pictures: Sequence[Picture], slug: str) -> None:
    report.add("### Figures")
    _add_pictures(report, pictures, slug)
    absent = [f"- {picture.title}: {picture.caption}" for picture in pictures if picture.figure is None]
    if absent:
        report.add("Not drawn:", "\n".join(absent))


def _add_pictures(report: Report, pictures: Sequence[Picture], slug: str) -> None:
    for picture in pictures:
        if picture.figure is not None:
            name = f"{slug}-{picture.name}"
            report.pictures[name] = picture
            text = f"**{picture.title}.** {picture.caption} Data: `data/{name}.csv`."
            report.add(f"![{picture.title}](images/{name}.png)", text)


def _missing(section: Section, published: Sequence[Published]) -> str:
    cells, controls = tables.missing_cells(section, published), tables.missing_controls(section)
    lines = []
    for stream in sorted({cell.stream for cell in cells} | {of for of, _ in controls}, key=lambda stream: stream.order):
        ids = [f"`{cell.id}`" for cell in cells if cell.stream == stream]
        twins = [method.label for of, method in controls if of == stream]
        lines += [f"- {stream.label}, {len(ids)} of the paper's cells: {', '.join(ids)}"] if ids else []
        lines += [f"- {stream.label}, controls: {'; '.join(twins)}"] if twins else []
    return "\n".join(lines) or "Nothing."


def _runs_frame(section: Section) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame([_run_line(entry) for entry in section.entries])


def _run_line(entry: Entry) -> dict[str, Any]:
    accuracy = entry.run.accuracy
    return {
        "run": entry.run.name,
        **tables.cell_columns(entry.stream, entry.method, entry.note),
        "seed": entry.run.seed,
        **{f"{metric}_percent": 100 * accuracy[metric] for metric in ("last", "avg", "forgetting")},
        **{key: accuracy.get(key) for key in ("steps", "seconds")},
        "departures": "; ".join(map(str, entry.departures)),
    }


def published_paper() -> dict[str, Any]:
    """The paper's runs and numbers."""
    return yaml.safe_load((CONFIG_FOLDER / "paper_runs.yaml").read_text())


def reference(run: Run, stream: Stream, method: Method) -> Mapping[str, Any]:
    """The configuration that a cell means: the paper's, and for a data set that the paper has not, our defaults with the paper's model."""

    def known(group: str, name: str) -> bool:
        return (CONFIG_FOLDER / group / f"{name}.yaml").exists()

    overrides = [f"data={stream.dataset}"] if known("data", stream.dataset) else ["data=folder", f"data.name={stream.dataset}"]
    overrides += [f"tasks.increment={stream.increment}", "model=vit_b16"]
    overrides += [f"adapter={method.adapter if known('adapter', method.adapter) else 'moe'}"]
    if method.branch == "none":
        return _composed((*overrides, "orders=zero_shot" if method == ZERO_SHOT else "orders=first"))
    plan = f"{method.branch}_{method.layers}"
    overrides += [f"orders={plan if known('orders', plan) else f'{method.branch}_all'}"]
    return _composed((*overrides, f"zo={method.variant if known('zo', method.variant) else 'naive'}"))


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        return from_hydra(compose("config", list(overrides))).as_dict()


def _shown(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Show on a terminal how far an iteration is."""
    console = Console(stderr=True)
    yield from track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def write(report: Report, out: Path) -> None:
    """Write a report's files."""
    for folder in ("images", "data"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, picture in report.pictures.items():
        assert picture.figure is not None and picture.data is not None
        write_picture(picture.figure, out / "images" / f"{name}.png")
        picture.data.to_csv(out / "data" / f"{name}.csv", index=False)
    for name, frame in report.data.items():
        frame.to_csv(out / "data" / f"{name}.csv", index=False)
    (out / "report.md").write_text(report.page)
    (out / "report.html").write_text(to_html(report.page, out))


def write_into(report: Report, page: Path, out: Path) -> None:
    """Put a report's digest between the marks of another page, and its pictures, from `out`, into the images folder beside that page."""
    before, after = _around_marks(page)
    replace_file(page, f"{before}{MARKS[0]}\n{report.digest}\n{MARKS[1]}{after}")
    (page.parent / "images").mkdir(exist_ok=True)
    for name in report.shown_there:
        shutil.copy(out / "images" / f"{name}.png", page.parent / "images")


def _around_marks(page: Path) -> tuple[str, str]:
    """Return what stands before and after the marks of a page; raise ValueError where it has them not."""
    text = page.read_text() if page.exists() else ""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"--into {page}: give a page that has the lines {MARKS[0]} and {MARKS[1]}")
    return before, after


def to_html(page: str, folder: Path) -> str:
    """A Markdown page as one HTML file that needs no other: the pictures, relative to `folder`, are inside."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(page)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        picture = base64.b64encode((folder / str(image.attrs["src"])).read_bytes()).decode()
        image.attrs["src"] = f"data:image/png;base64,{picture}"
    body = markdown.renderer.render(tokens, markdown.options, {})
    style = (Path(__file__).parent / "page.css").read_text()
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>dist_vlcl report</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}\n<style>\n{style}</style></head>\n<body>\n{body}</body></html>\n'


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """The runs among some folders, and for each other folder what is wrong with it."""
    runs, passed_over = [], {}
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder))
        except NoRun as error:
            passed_over[folder.name] = str(error)
    return runs, passed_over


def main() -> None:
    """Run the command line."""
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, such as runs/*; others are passed over and named"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="where to write (default: report)")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="also put results, claims and figures into this page, between its marks"
    )
    arguments = parser.parse_args()
    absent = [str(folder) for folder in arguments.runs if not folder.exists()]
    if absent:
        parser.error(f"no such folder: {', '.join(absent)}")
    try:
        _ = arguments.into and _around_marks(arguments.into)
    except ValueError as error:
        parser.error(str(error))
    runs, passed_over = read_runs(arguments.runs)
    if not runs:
        parser.error("none of these is the folder of a run (config.yaml is missing): give runs/*, or runs/NAME")
    with matplotlib.rc_context(STYLE):
        report = build(runs, passed_over)
        write(report, arguments.out)
        if arguments.into:
            write_into(report, arguments.into, arguments.out)
    complete = sum(run.is_complete for run in runs)
    print(f"{complete} complete runs of {len(runs)}, {len(report.pictures)} pictures: open {arguments.out}/report.html")


if __name__ == "__main__":
    main()

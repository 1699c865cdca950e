"""The data behind docs/reproduction.md, and the page's tables and figures from these data alone.

    python tools/evidence.py collect runs/* --out docs/results/cifar100.csv     one row per complete run
    python tools/evidence.py tables docs/results                                write the page's part between its two marker lines

The page then shows exactly what the CSV files hold; a test compares them.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import pandas as pd
import yaml

from dist_vlcl.commands.report import realise
from dist_vlcl.paper import CONFIG_FOLDER, paper_runs
from dist_vlcl.report import tables
from dist_vlcl.report.figures import STYLE, write_picture
from dist_vlcl.report.page import WORTH_TERMS
from dist_vlcl.report.paper_figures import draw_claims, draw_seeds
from dist_vlcl.report.records import CONTROLS, run_frame
from dist_vlcl.report.statistics import CLAIMS, GROUP, RECOVERED, RULE, cells_of, compare, complete_of, contrasts_of, results_of
from dist_vlcl.run.files import replace_file

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
BEGIN, END = "<!-- results: begin (tools/evidence.py writes this part) -->", "<!-- results: end -->"
TEXTS = ["adapter", "other_settings", "method_settings", "shared_settings", "model_settings"]  # "" in a CSV is a text, and no gap
HIDDEN = ("path", "is_probe", "is_complete", "tasks_done")


def collect(runs: list[Path]) -> pd.DataFrame:
    """Return one row per complete run: what was run, Last, Avg, R, and what its zeroth-order steps measured."""
    found, unreadable = run_frame(runs, realise)
    for name, reason in unreadable.items():
        print(f"left out: {name} ({reason})")
    if found.empty:
        raise SystemExit("none of these is a run folder")
    complete = complete_of(found)
    results = results_of(complete)
    by_run = results[results.variant != "zero_shot"].set_index(
        "run"
    )  # the untrained model's rows have the name of the run that measured it
    ratios = by_run.reindex(columns=[RECOVERED.format(metric) for metric in tables.METRICS])
    numbers = complete.drop(columns=list(HIDDEN)).join(ratios, on="run")
    return numbers.round(4)


def read(folder: Path) -> pd.DataFrame:
    """Return the runs of every CSV file of a folder; an empty frame without one."""
    parts = [pd.read_csv(path, keep_default_na=False, na_values={}) for path in sorted(folder.glob("*.csv"))]
    if not parts:
        return pd.DataFrame()
    runs = pd.concat(parts, ignore_index=True).drop_duplicates("run")
    known = {"run", "dataset", "branch", "layers", "variant", *TEXTS}
    for column in runs.columns.difference(list(known)):
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    return runs.assign(is_complete=True, is_probe=False)


def section(runs: pd.DataFrame, pictures: Path | None = None) -> str:
    """Return the page's part about these runs; its figures are written into the folder `pictures`."""
    results = results_of(complete_of(runs.drop(columns=[RECOVERED.format(metric) for metric in tables.METRICS])))
    shared = set.intersection(*(set(text.split("; ")) for text in results.other_settings[results.variant != "zero_shot"])) - {""}
    results["other_settings"] = ["; ".join(t for t in text.split("; ") if t not in shared) for text in results.other_settings]
    published = pd.DataFrame(map(asdict, paper_runs().values()))
    comparisons = compare(results, published)
    cells = cells_of(results, comparisons, published)
    ours = cells[cells.seeds > 0]
    contrasts = contrasts_of(results, yaml.safe_load((CONFIG_FOLDER / "contrasts.yaml").read_text()))
    blocks = ["### The primary contrasts", "\n".join(map(sentence, contrasts.itertuples())), tables.contrast_table(contrasts)]
    blocks += ["### Results", f"Other settings than the paper's, in all runs: {'; '.join(sorted(shared)) or 'none'}."]
    blocks.append(tables.result_table(ours))
    if worth := tables.worth_table(ours):
        blocks += ["### What zeroth order was worth", WORTH_TERMS, worth]
    counted = comparisons[~comparisons.variant.isin(CONTROLS)]
    asked = {name: counted[counted.claim == name] for name in CLAIMS}
    blocks += ["### Questions", RULE]
    for name, found in asked.items():
        if len(found):
            blocks += [f"**{CLAIMS[name].statement}** ({CLAIMS[name].condition})", tables.comparison_table(found)]
    blocks.append(f"Questions without runs: {' '.join(CLAIMS[name].statement for name, found in asked.items() if found.empty) or 'none'}")
    with matplotlib.rc_context(STYLE):
        drawn = [
            (f"results-{dataset}-inc{increment}-{number}", draw_seeds(part))
            for number, ((dataset, increment, _), part) in enumerate(results.groupby(GROUP, sort=False), 1)
        ]
        of_accuracy = comparisons[(comparisons.claim != "") & comparisons.metric.isin(list(tables.METRICS))]
        drawn += [
            (f"results-claims-{dataset}-{number}", draw_claims(part))
            for number, ((dataset, _), part) in enumerate(of_accuracy.groupby(["dataset", "shared_settings"], sort=False), 1)
        ]
        for name, picture in drawn:
            if picture:
                blocks.append(f"![{picture[2].split('.')[0]}](images/{name}.png)")
                if pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    write_picture(picture[0], pictures / f"{name}.png")
    return "\n\n".join(block.rstrip() for block in blocks)


def sentence(contrast) -> str:
    """Return the answer to a contrast in one sentence, from its numbers."""
    if not contrast.seeds:
        return f"- {contrast.question} Not run."
    numbers = f"Δ {tables.METRICS[contrast.metric]} {tables.signed(contrast.mean)} points, {contrast.seeds} seeds"
    if contrast.low == contrast.low:
        numbers += f", 95 % interval {tables.signed(contrast.low)} to {tables.signed(contrast.high)}"
    return f"- {contrast.question} {contrast.answer.capitalize()} ({numbers})."


def with_section(page: str, text: str) -> str:
    """Return a page with the part between its marker lines replaced. Raises ValueError for a page without them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs these two lines once, in this order: {BEGIN} and {END}")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{text}\n\n{page[page.index(END) :]}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write a CSV file from run folders")
    collecting.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    collecting.add_argument("--out", type=Path, required=True, metavar="FILE")
    writing = commands.add_parser("tables", help="write the page's tables and figures from the CSV files of a folder")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.command == "collect":
        rows = collect(arguments.runs)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(arguments.out, index=False)
        print(f"{len(rows)} runs in {arguments.out}")
        return
    runs = read(arguments.folder)
    if runs.empty:
        parser.error(f"no *.csv in {arguments.folder}; write them with: python tools/evidence.py collect runs/* --out FILE")
    page = with_section(arguments.page.read_text(), section(runs, arguments.page.parent / "images"))
    replace_file(arguments.page, page)
    print(json.dumps({"runs": len(runs), "page": str(arguments.page), "lines": page.count("\n")}))


if __name__ == "__main__":
    main()

"""Report on runs: python -m dist_vlcl.commands.report runs/* [--out report]

Writes OUT/report.html (one file with its pictures inside), OUT/report.md, OUT/images/*.png, and every number as tidy CSV in OUT/data/.
The report shows all complete runs, the differences between them, what these say about the paper's claims, and the paper's numbers.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from dist_vlcl.config import compose_config
from dist_vlcl.masking import masked
from dist_vlcl.paper import Cell, cell_of, paper_runs, published
from dist_vlcl.report.figures import STYLE
from dist_vlcl.report.page import Report
from dist_vlcl.report.records import run_frame


def realise(config: dict[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the cell that a resolved configuration realises, and the configuration of that cell."""
    cell = cell_of(config)
    return asdict(cell), configuration_of(cell)


@cache
def configuration_of(cell: Cell) -> dict[str, Any]:
    """Return the resolved configuration of a cell: the paper's, and for data that the paper does not use our defaults."""
    return compose_config(cell.overrides()).as_dict()


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="dist-vlcl report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, such as runs/*; others are skipped and named")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where to write (default: report)")
    arguments = parser.parse_args()
    if absent := [str(folder) for folder in arguments.runs if not folder.exists()]:
        parser.error(masked(f"no such folder: {', '.join(absent)}; give run folders, such as runs/*"))
    runs, unreadable = run_frame(arguments.runs, realise)
    if runs.empty:
        parser.error(masked(f"none of these is a run folder: {'; '.join(f'{name}: {why}' for name, why in unreadable.items())}"))
    with matplotlib.rc_context(fname=STYLE):
        report = Report(runs, pd.DataFrame(map(asdict, paper_runs().values())), published()["table5_memory_gb"], unreadable)
        report.write(arguments.out)
    print(f"{int(runs.is_complete.sum())} complete runs of {len(runs)}, pictures: {len(report.pictures)}; open {arguments.out}/report.html")
    for name, reason in sorted(report.left_out.items()):
        print(f"left out: {name} ({reason})")


if __name__ == "__main__":
    main()

"""Report on runs: dist-vlcl report runs/* [--out report]

Writes OUT/report.html (one file with its pictures inside), OUT/report.md, OUT/images/*.png, and every number as tidy CSV in OUT/data/.
The report shows all complete runs, the differences between them, what these say about the paper's claims, and the paper's numbers.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

import matplotlib
import pandas as pd

from dist_vlcl.config import errors_refused
from dist_vlcl.masking import masked
from dist_vlcl.paper import paper_runs, published
from dist_vlcl.report.figures import STYLE
from dist_vlcl.report.page import Report
from dist_vlcl.report.records import run_frame


@errors_refused()
def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="dist-vlcl report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, such as runs/*; others are skipped and named")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where to write (default: report)")
    example = '"dual hop_odd, naive", or with its settings "dual hop_odd, naive; zo.lr_scale=3.0"'
    against = f"compare the others with this one, such as {example} (by seed, where the settings of training are equal)"
    parser.add_argument("--against", metavar="METHOD", help=against)
    arguments = parser.parse_args()
    if absent := [str(folder) for folder in arguments.runs if not folder.exists()]:
        parser.error(masked(f"no such folder: {', '.join(absent)}; give run folders, such as runs/*"))
    runs, unreadable = run_frame(arguments.runs)
    if runs.empty:
        parser.error(masked(f"none of these is a run folder: {'; '.join(f'{name}: {why}' for name, why in unreadable.items())}"))
    with matplotlib.rc_context(fname=STYLE):
        cells, memory_gb = pd.DataFrame(map(asdict, paper_runs().values())), published()["table5_memory_gb"]
        report = Report(runs, cells, memory_gb, unreadable, arguments.against)
        report.write(arguments.out)
    print(f"{report.num_shown} of {len(runs)} runs compared, pictures: {len(report.pictures)}; open {arguments.out}/report.html")
    for name, reason in sorted(report.left_out.items()):
        print(f"left out: {name} ({reason})")

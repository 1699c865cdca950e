"""What a search over options has found, as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from dist_vlcl.report.figures import BLUE, GREEN, GREY, ORANGE, STYLE, put_legend, write_picture
from dist_vlcl.report.tables import UNKNOWN, markdown_table

LINES = (("-.", ORANGE), ("--", GREEN))


def ranked(trials: pd.DataFrame) -> pd.DataFrame:
    """Return one row per choice of options, the best first: accuracy (mean over seeds), lowest, highest, seeds, loss.

    `trials` has one row per choice and seed: the options as text, `accuracy` on held-out images in percent (NaN for a failed run) and
    `loss`. Choices with equal accuracy are ordered by loss, because few held-out images often give equal accuracies. Failed ones come last.
    """
    options = [column for column in trials if column not in ("accuracy", "loss")]
    by_choice = trials.groupby(options, sort=False)
    found = by_choice.accuracy.agg(accuracy="mean", lowest="min", highest="max", seeds="count").assign(loss=by_choice.loss.mean())
    return found.sort_values(["accuracy", "loss"], ascending=[False, True], kind="stable").reset_index()


def trial_table(choices: pd.DataFrame, references: Mapping[str, float]) -> str:
    """Return a Markdown table of ranked choices, followed by the accuracies in percent that they are compared with."""
    options = list(choices.columns[:-5])
    rows = []
    for row in choices.to_dict("records"):
        spread = f"{row['lowest']:.2f} – {row['highest']:.2f}" if row["seeds"] > 1 else ""
        numbers = [f"{row['accuracy']:.2f}", spread, row["seeds"], f"{row['loss']:.4f}"] if row["seeds"] else [UNKNOWN, "", 0, UNKNOWN]
        rows.append([*(row[option] for option in options), *numbers])
    rows += [[name, *[""] * (len(options) - 1), f"{value:.2f}", "", "", ""] for name, value in references.items()]
    return markdown_table([*options, "held-out accuracy", "lowest – highest", "seeds", "loss"], rows)


def plot_trials(path: Path, trials: pd.DataFrame, choices: pd.DataFrame, references: Mapping[str, float]) -> None:
    """Draw the held-out accuracy of every choice, the best on top: one point per seed; references as vertical lines."""
    options: Sequence[str] = list(choices.columns[:-5])
    shown = choices[choices.seeds > 0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 1.4 + 0.26 * max(len(shown), 4)))
        axes = figure.subplots()
        rows = shown[options].to_dict("records")
        for place, choice in enumerate(rows):
            points = trials.merge(pd.DataFrame([choice])).accuracy
            axes.plot(points, [place] * len(points), "o", color=GREY if place else BLUE, markersize=4, alpha=0.7)
        for (line, color), (name, value) in zip(LINES, references.items(), strict=False):
            axes.axvline(value, color=color, linestyle=line, linewidth=1.2, zorder=1, label=name)
        labels = [", ".join(f"{key.removeprefix('zo.')} {value}" for key, value in row.items()) for row in rows]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.set(xlabel="accuracy on held-out training images of the first task (%)", ylim=(len(shown) - 0.5, -0.5))
        if references:
            put_legend(figure, axes)
        write_picture(figure, path)

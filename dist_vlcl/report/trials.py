"""What a search over options has found: a table and a picture."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from dist_vlcl.report.figures import BLUE, GREEN, GREY, ORANGE, STYLE
from dist_vlcl.report.tables import TextTable, percent

LINES = (("-.", ORANGE), ("--", GREEN))


@dataclass(frozen=True)
class Trial:
    """One choice of options: the held-out accuracy of each seed that came to its end, a fraction, and their mean training loss."""

    options: Mapping[str, str]
    accuracies: Sequence[float]
    loss: float | None

    @property
    def accuracy(self) -> float | None:
        return mean(self.accuracies) if self.accuracies else None

    @property
    def label(self) -> str:
        return ", ".join(f"{key.removeprefix('zo.')} {value}" for key, value in self.options.items())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The best first: by accuracy, then, where held-out samples are too few to tell, by loss; failed ones last."""
    return sorted(trials, key=lambda t: (t.accuracy is None, -(t.accuracy or 0), t.loss if t.loss is not None else float("inf")))


def trial_table(trials: Sequence[Trial], references: Mapping[str, float]) -> TextTable:
    """One row a choice, in the order given, then what they are compared with."""
    keys = list(trials[0].options)
    rows = [
        [*t.options.values(), percent(t.accuracy), spread(t.accuracies), str(len(t.accuracies)), "–" if t.loss is None else f"{t.loss:.4f}"]
        for t in trials
    ]
    rows += [[name, *[""] * (len(keys) - 1), percent(value), "", "", ""] for name, value in references.items()]
    return TextTable([*keys, "held-out accuracy", "from – to", "seeds", "loss"], rows)


def spread(accuracies: Sequence[float]) -> str:
    return f"{percent(min(accuracies))} – {percent(max(accuracies))}" if len(accuracies) > 1 else ""


def write_csv(path: Path, trials: Sequence[Trial]) -> None:
    """Write one line a choice and seed; a choice that failed has one line, without an accuracy."""
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*trials[0].options, "held_out_accuracy", "mean_loss"])
        lines.writerows([*t.options.values(), *end] for t in trials for end in _ends(t))


def _ends(trial: Trial) -> list[tuple]:
    return [(accuracy, trial.loss) for accuracy in trial.accuracies] or [("", "")]


def plot_trials(path: Path, trials: Sequence[Trial], references: Mapping[str, float]) -> None:
    """Draw every choice's held-out accuracy, the best on top: a point a seed, a bar through their mean; references as vertical lines."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [t for t in trials if t.accuracies]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 1.4 + 0.26 * max(len(shown), 4)))
        axes = figure.subplots()
        for place, trial in enumerate(shown):
            color = BLUE if place == 0 else GREY
            axes.plot([100 * a for a in trial.accuracies], [place] * len(trial.accuracies), "o", color=color, markersize=4, alpha=0.7)
            axes.plot([100 * (trial.accuracy or 0)], [place], "|", color=color, markersize=12, markeredgewidth=2)
        for (line, color), (name, value) in zip(LINES, references.items(), strict=False):
            axes.axvline(100 * value, color=color, linestyle=line, linewidth=1.2, zorder=1, label=name)
        axes.set_yticks(range(len(shown)), [t.label for t in shown], fontsize=8)
        axes.set(xlabel="accuracy on held-out training images of the first task (%)", ylim=(len(shown) - 0.5, -0.5))
        if references:
            figure.legend(loc="outside upper right", ncols=len(references), fontsize=9)
        figure.savefig(path)

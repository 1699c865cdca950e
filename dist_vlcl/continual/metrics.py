"""Metrics of continual learning, computed from counts of correct answers (concepts.md 1.8)."""

# T tasks, C classes in the order of the stream

from collections.abc import Sequence
from dataclasses import dataclass, field

Counts = list[tuple[int, int]]  # per class: correct, total


@dataclass
class AccuracyMatrix:
    """Correct and total per class. Row t: the classes seen after training on task t, and perhaps more, which are ignored.

    task_sizes: the number of classes of each task, in order. acc[t][j] below is the accuracy on the classes of task j in row t.
    """

    task_sizes: Sequence[int]
    rows: list[Counts] = field(default_factory=list)

    def append(self, counts: Sequence[Sequence[int]]) -> None:
        """Add the row of the next task."""
        assert len(counts) >= sum(self.task_sizes[: len(self.rows) + 1]), "a row has all classes seen so far"
        self.rows.append([(int(correct), int(total)) for correct, total in counts])

    def task_accuracy(self, after: int, task: int) -> float | None:
        """Return acc[after][task], or None if it was not measured."""
        start = sum(self.task_sizes[:task])
        return _accuracy(self.rows[after][start : start + self.task_sizes[task]])

    def seen(self, after: int) -> float:
        """Return A_t: the accuracy over the test images of all classes seen after task t."""
        return _accuracy(self.rows[after][: sum(self.task_sizes[: after + 1])]) or 0.0

    @property
    def last(self) -> float:
        """Return Last: A_T of the newest row."""
        return self.seen(len(self.rows) - 1)

    @property
    def average(self) -> float:
        """Return Avg, the average incremental accuracy: the mean of A_t over the rows."""
        return _mean([self.seen(t) for t in range(len(self.rows))])

    @property
    def forgetting(self) -> float:
        """Return the mean over earlier tasks of (best accuracy in a row since it was learned - accuracy in the newest row); 0 after one.

        The forgetting that MoE-Adapters4CL logs is not comparable: continuum leaves out the newest earlier task (see backward_transfer).
        """
        newest = len(self.rows) - 1
        best = [max(self._own(t, j) for t in range(j, newest)) for j in range(newest)]
        return _mean([b - self._own(newest, j) for j, b in enumerate(best)])

    @property
    def backward_transfer(self) -> float:
        """Return the mean of acc[t][j] - acc[j][j] over all rows t and all earlier tasks j < t; 0 after one task.

        MoE-Adapters4CL logs continuum's number, which leaves out the newest earlier task j = t - 1. It is not comparable: on one matrix
        continuum gives -19.31 and this -19.84 (forgetting: 26.70 and 27.11).
        """
        return _mean([self._own(t, j) - self._own(j, j) for t in range(1, len(self.rows)) for j in range(t)])

    def summary(self) -> dict:
        """Return the metrics after the newest task, as fractions, and the counts of its row."""
        after = len(self.rows) - 1
        correct, total = zip(*self.rows[after][: sum(self.task_sizes[: after + 1])], strict=True)
        by_task = {"per_task": [self.task_accuracy(after, j) for j in range(after + 1)], "seen": self.seen(after)}
        means = {"last": self.last, "avg": self.average, "forgetting": self.forgetting, "backward_transfer": self.backward_transfer}
        return {**by_task, **means, "correct": list(correct), "total": list(total)}

    def _own(self, after: int, task: int) -> float:
        return self.task_accuracy(after, task) or 0.0


class SetsMatrix(AccuracyMatrix):
    """The accuracy on several data sets, one per task. Every row has all sets, also those not trained yet, and all sets count the same.

    Last, Avg and Transfer are those of the MTIL benchmark (Zheng et al. 2023, arXiv:2303.06628), which MoE-Adapters4CL reports.
    """

    def seen(self, after: int) -> float:
        """Return A_t: the mean accuracy over all sets after task t. The mean over t is the benchmark's Avg."""
        return _mean([self._own(after, j) for j in range(len(self.task_sizes))])

    @property
    def transfer(self) -> float:
        """Return the mean over sets j > 0 of the mean of acc[t][j] over the rows t < j, before set j is trained."""
        return _mean([_mean([self._own(t, j) for t in range(min(j, len(self.rows)))]) for j in range(1, len(self.task_sizes))])

    def summary(self) -> dict:
        """Return the metrics after the newest task, with the accuracy on every set."""
        per_task = [self.task_accuracy(-1, j) for j in range(len(self.task_sizes))]
        return {**super().summary(), "per_task": per_task, "transfer": self.transfer}


def _accuracy(counts: Counts) -> float | None:
    total = sum(n for _, n in counts)
    return sum(c for c, _ in counts) / total if total else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

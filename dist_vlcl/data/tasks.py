"""A sequence of tasks: disjoint sets of classes, learned one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True)
class Task:
    """Some classes of a data set; the label of a class is its place among them."""

    index: int
    classes: tuple[int, ...]  # the data set's class ids, in the stream's order
    names: tuple[str, ...]  # for prompts, in the same order

    @property
    def labels(self) -> dict[int, int]:
        """Class id -> label."""
        return {class_id: label for label, class_id in enumerate(self.classes)}


class TaskStream(Sequence[Task]):
    """Cut an order of classes into tasks of `base` (0: the same as the others) and then `increment` classes; the last may be smaller.

    `num_tasks` keeps only the first ones. Raises ValueError, naming the option, for values that do not fit the classes.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        increment: int,
        order: Sequence[int] | None = None,
        base: int = 0,
        num_tasks: int | None = None,
    ) -> None:
        num_classes = len(class_names)
        order = list(range(num_classes)) if order is None else list(order)
        _require_permutation(order, num_classes)
        _require_between("increment", increment, 1, num_classes, "the number of classes")
        _require_between("base", base, 0, num_classes, "the number of classes")
        starts = [0, *range(base or increment, num_classes, increment)]
        stops = [*starts[1:], num_classes]
        if num_tasks is not None:
            _require_between("num_tasks", num_tasks, 1, len(starts), "the number of tasks in the stream")
        self._tasks = [
            _task(index, order[start:stop], class_names) for index, (start, stop) in enumerate(zip(starts[:num_tasks], stops, strict=False))
        ]

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        return self._tasks[index]

    def seen(self, index: int) -> Task:
        """All classes up to and including task `index`, as one task."""
        tasks = self._tasks[: self._tasks[index].index + 1]
        classes = tuple(class_id for task in tasks for class_id in task.classes)
        names = tuple(name for task in tasks for name in task.names)
        return Task(tasks[-1].index, classes, names)


def _task(index: int, classes: Sequence[int], class_names: Sequence[str]) -> Task:
    return Task(index, tuple(classes), tuple(class_names[class_id] for class_id in classes))


def _require_between(option: str, value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"tasks.{option}={value}: choose from {low} to {high}, {what}")


def _require_permutation(order: Sequence[int], num_classes: int) -> None:
    if sorted(order) == list(range(num_classes)):
        return
    missing = sorted(set(range(num_classes)) - set(order))
    unknown = sorted(set(order) - set(range(num_classes)))
    repeated = sorted({class_id for class_id in order if order.count(class_id) > 1})
    raise ValueError(
        f"tasks.order: must hold each class id from 0 to {num_classes - 1} once; "
        f"missing {missing[:5]}, unknown {unknown[:5]}, repeated {repeated[:5]}"
    )

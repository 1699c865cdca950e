"""Where a run stands: everything that a resume needs except tensors."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dist_vlcl.reading import fits
from dist_vlcl.saved import COUNTS


@dataclass
class TrainState:
    """The position of a run in its tasks, epochs and batches, and its results so far. JSON can hold `asdict(state)`."""

    task: int = 0
    epoch: int = 0
    batch: int = 0  # the next batch of this epoch
    step: int = 0  # optimiser steps taken, over all tasks
    accuracy: list[Any] = field(default_factory=list)  # one row of (correct, total) per class for each finished task
    zero_shot: dict[int, float] = field(default_factory=dict)  # accuracy of the untrained model on the classes seen up to each task
    seconds: float = 0.0  # time spent in training steps, over all starts of the run
    world_size: int = 1  # of the start that saved this
    threads: int = 0  # CPU threads of a rank in the start that saved this; 0: unknown

    def advance(self) -> None:
        """Count one batch, which is one optimiser step."""
        self.batch += 1
        self.step += 1

    def next_epoch(self) -> None:
        """Go to the first batch of the task's next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def next_task(self) -> None:
        """Go to the first batch of the next task."""
        self.task += 1
        self.epoch = self.batch = 0

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """Return the state that `asdict` gave, also after JSON. Raises ValueError if a field is missing or of another type."""
        saved = {"threads": 0, **saved}  # checkpoints of before this field lack it
        wrong = [name for name, value in asdict(cls()).items() if not fits(saved.get(name), type(value))]
        if wrong or not fits(saved["accuracy"], COUNTS):
            raise ValueError(f"the saved state has no valid {', '.join(wrong) or 'accuracy'}: move the run folder away to start anew")
        state = cls(**{field.name: saved[field.name] for field in fields(cls)})
        state.zero_shot = {int(task): value for task, value in state.zero_shot.items()}  # JSON has made the keys texts
        return state

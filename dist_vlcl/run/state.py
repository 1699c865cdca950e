"""Where a run stands: all that a resume needs besides tensors."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = 1


@dataclass
class TrainState:
    """The position of a run in its tasks, epochs and batches, and what it has scored so far."""

    run_seed: int = 0
    task: int = 0
    epoch: int = 0
    batch: int = 0  # the next batch of this epoch
    step: int = 0  # optimiser steps taken, over all tasks
    accuracy: list[Any] = field(default_factory=list)  # one row of counts a finished task
    wandb_id: str | None = None
    seconds: float = 0.0  # time spent training, over all starts of the run

    def advance(self) -> None:
        """Count one batch, which is one optimiser step."""
        self.batch += 1
        self.step += 1

    def next_epoch(self) -> None:
        """Go to the first batch of the task's next epoch."""
        self.epoch += 1
        self.batch = 0

    def next_task(self) -> None:
        """Go to the first batch of the next task."""
        self.task += 1
        self.epoch = self.batch = 0

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON can hold it."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """The state that `to_dict` gave; keys of others beside it are left alone.

        Raises ValueError where the state is of another format or lacks a field.
        """
        if saved.get("format") != FORMAT:
            raise ValueError(f"the saved state has format {saved.get('format')!r}; this version reads format {FORMAT}")
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in saved]
        if missing:
            raise ValueError(f"the saved state lacks {', '.join(missing)}")
        return cls(**{name: saved[name] for name in names})

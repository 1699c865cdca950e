"""`python -m tests.helpers.paced` is dist_vlcl.train with a gate before every step: a test can strike between two steps at any speed.

The gate is a folder, $PACE:

gate        the step up to which ranks may go (written by the test)
at-R        "JOB.RESTART STEP": rank R stands before this step
signal-R    "JOB.RESTART NAME": rank R has got this signal
eager       there: a rank that has got a signal takes one more step without waiting (written by the test)
save_s      how long a checkpoint takes (written by the test)
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dist_vlcl import train
from dist_vlcl.experiment import Experiment
from dist_vlcl.run import checkpoint
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.signals import Preemption

batches, save = Experiment.batches, checkpoint.save


class Pace:
    """Both sides of the gate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def write(self, name: str, text: object) -> None:
        replace_file(self.folder / name, str(text))


def main() -> None:
    """Run the trainer's command line with the gate."""
    if "--check" in sys.argv:
        return train.main()
    pace, rank = Pace(Path(os.environ["PACE"])), os.environ["RANK"]
    start = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"

    def gated(self: Experiment, task: Any, state: Any, progress: Any) -> Iterator[Any]:
        for item in batches(self, task, state, progress):
            pace.write(f"at-{rank}", f"{start} {state.step + 1}")
            while state.step + 1 > int(pace.read("gate") or 0) and not (
                pace.read("eager") and pace.read(f"signal-{rank}").startswith(start)
            ):
                time.sleep(0.05)
            yield item

    class Noted(Preemption):
        def _note(self, number: int, frame: FrameType | None) -> None:
            super()._note(number, frame)
            # not replaced whole: a second signal may come in the midst of this
            (pace.folder / f"signal-{rank}").write_text(f"{start} {signal.Signals(number).name}")

    def slow_save(*arguments: Any, **options: Any) -> Any:
        time.sleep(float(pace.read("save_s") or 0))
        return save(*arguments, **options)

    Experiment.batches, train.Preemption, checkpoint.save = gated, Noted, slow_save  # type: ignore[misc, method-assign]
    train.main()


if __name__ == "__main__":
    main()

"""Messages between a run and its scheduler: signals come in, one status word goes out."""

import json
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_vlcl.data.shards import ShardError, ShardUnavailableError
from dist_vlcl.masking import masked
from dist_vlcl.run.environment import ELASTIC, is_restart
from dist_vlcl.run.folder import RunBusy


class Preemption:
    """Notes that the scheduler or the user asks the process to stop; restores the old handlers at the end.

    SIGTERM, SIGUSR1 and SIGHUP (unless it is ignored, as under nohup) only set `requested`. So does the first SIGINT; the second one has
    its usual effect, so that Ctrl-C twice ends a process that hangs. Python installs handlers in the main thread only; in another thread
    `requested` stays False. The caller makes the ranks agree on the request.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self._is_noted = False  # whether a signal has arrived
        self._parent = os.getppid()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process is to save and stop. A rank whose elastic agent has died stops, too: nobody would end it otherwise."""
        return self._is_noted or (ELASTIC in os.environ and os.getppid() != self._parent)

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._previous)

    def _note(self, number: int, _: object) -> None:
        self._is_noted = True
        if number == signal.SIGINT:
            self._restore(signal.SIGINT)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:  # None stands for a handler that C code had installed, which Python cannot put back
            if number in self._previous:
                signal.signal(number, self._previous.pop(number) or signal.SIG_DFL)


def report_status(word: str) -> None:
    """Write a word to the file that DIST_VLCL_STATUS names, for the batch script: launchers do not pass on their processes' exit codes.

    `training`: steps are being taken. If the job ends with this word, a process has died. A new start continues from the checkpoint.
    `requeue`: stopped by a signal and saved; start the run again. `complete`: every task is done. `failed`: a new start would fail, too.
    No word: the start itself has failed.
    """
    if path := os.environ.get("DIST_VLCL_STATUS"):
        with suppress(OSError):  # the folder may be missing on this node; the run's own error is more important
            Path(path).write_text(word + "\n")


def print_error(text: str, is_main: bool = True) -> None:
    """Print an error of the user on rank 0. Every rank passes it to torch's launcher, which shows it at the end of its own traceback."""
    if is_main:
        sys.stderr.write(masked(text) + "\n")  # at once, because ranks share the terminal
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": masked(text), "timestamp": int(time.time())}))


def line_of_user(error: BaseException) -> str:
    """Return the line of the user's own code, such as an estimator, in which an error arose: " (FILE:LINE)"; "" if there was none."""
    of_others = ("<", *(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], *map(sysconfig.get_path, ("stdlib", "purelib")))))
    own = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(of_others)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def report_failure(error: Exception, is_main: bool) -> None:
    """Write the status that an error of this rank means: `failed` if another start would end in the same way, otherwise nothing.

    A damaged shard is reported by the rank that met it, everything else by rank 0. If Slurm has restarted the job while ranks on a lost
    node still hold the folder, the job is queued once more.
    """
    is_damage = isinstance(error, ShardError) and not isinstance(error, ShardUnavailableError)
    is_final = is_damage or isinstance(error, FloatingPointError | ValueError)
    if is_damage or (is_main and is_final):
        report_status("requeue" if isinstance(error, RunBusy) and is_restart() else "failed")
    if is_final and not isinstance(error, RunBusy) and os.environ.get(ELASTIC) and os.getppid() > 1:  # 1: the agent is dead
        os.kill(os.getppid(), signal.SIGTERM)  # otherwise the agent would start this rank again and again

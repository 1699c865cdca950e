"""Signals become a flag that the training loop reads between steps."""

import signal
import threading
from types import FrameType
from typing import Any


class Preemption:
    """Notes that the scheduler or the user wants the process to stop; restores the old handlers on leaving.

    SIGTERM and SIGUSR1 only ever set the flag. So does the first SIGINT; the second does what it did before, so that
    Ctrl-C twice still ends a process that hangs. Only a main thread can install handlers; elsewhere the flag stays down.
    The ranks' agreement on the flag is the caller's.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._previous):
            self._restore(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            self._restore(signal.SIGINT)

    def _restore(self, number: signal.Signals) -> None:
        # None stands for a handler that C code had installed, which Python cannot put back.
        if number in self._previous:
            signal.signal(number, self._previous.pop(number) or signal.SIG_DFL)

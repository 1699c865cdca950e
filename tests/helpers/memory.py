"""How much memory some work takes at its peak."""

import ctypes
import multiprocessing
import resource
from collections.abc import Callable
from typing import Any


def peak_mib(work: Callable[[], Any]) -> float:
    """MiB that `work()` adds to the resident memory at its peak; it runs in a fork, since a process's own peak never falls again.
    The heap gives its free pages back before: `work()` could reuse 100 MiB of them, and the peak would say 0.

    Raises AssertionError if it fails there.
    """
    ctypes.CDLL(None).malloc_trim(0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(120), "still at work after two minutes"
        outcome = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert isinstance(outcome, float), outcome
    return outcome


def _measure(work: Callable[[], Any], sender: Any) -> None:
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")

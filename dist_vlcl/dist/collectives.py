"""Name the collective, the step and the silent rank when a collective fails. torch's messages contain none of these.

Nothing is sent while all goes well. A rank whose collective failed leaves a note in the process group's store. It waits a few seconds for
the notes of the others, then names the ranks without one. A rank that stops because of an error leaves a note with the reason.

We do not use torch's `monitored_barrier`. It names missing ranks on rank 0 only, so it says nothing if rank 0 died.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

NOTE, READ = "dist_vlcl/stopped", "dist_vlcl/read"
READING_S = 10.0  # longest wait until the others have read why this rank stopped
CLOSED_PEER = ("closed by peer", "reset by peer", "pair closure", "Broken pipe", "Connection refused")
NETWORK_ERRORS = (*CLOSED_PEER, "gloo", "NCCL", "Timed out waiting")


class CollectiveError(RuntimeError):
    """A collective failed. The message names it, the step, and the ranks that did not answer."""


class Collectives:
    """The collectives of one rank, by name: `with world.collectives("all-reduce of losses"): ...`. `where` is the step they belong to."""

    def __init__(self, rank: int, hosts: Sequence[str], timeout_s: float):
        self.rank, self.hosts, self.timeout_s = rank, list(hosts), timeout_s
        self.where = "the start"
        self._reason_store: Any = None  # the store that holds this rank's reason for stopping

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Wrap one collective: a network error inside becomes a CollectiveError. Other errors pass unchanged."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CollectiveError) or not is_network_error(error):
                raise
            raise CollectiveError(self._explained(f"{what} at {self.where}", str(error))) from error

    def named(self, rank: int) -> str:
        """Return a rank with its host, such as `rank 1 (node7)`."""
        return f"rank {rank} ({self.hosts[rank]})"

    def stopped(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one why it stops. A CollectiveError has left a note already."""

        def leave(store: Any) -> None:
            store.set(f"{NOTE}/{self.rank}", json.dumps({"why": f"{type(error).__name__}: {error}"[:500]}))
            store.set(f"{READ}/{self.rank}", "")
            self._reason_store = store

        if len(self.hosts) > 1 and not isinstance(error, CollectiveError):
            self._with_store(leave, 2)

    def wait_for_readers(self) -> None:
        """Wait until the others have read why this rank stopped, at most READING_S. Its process may hold the store.

        Call it after the process group is closed: the others wait in a collective until then.
        """

        def wait(store: Any) -> None:
            while not store.check([f"{READ}/{rank}" for rank in range(len(self.hosts))]):
                time.sleep(0.05)

        if self._reason_store:
            self._with_store(wait, READING_S)

    def _explained(self, place: str, error: str) -> str:
        is_closed = any(words in error for words in CLOSED_PEER)
        how = "has died or closed the connection" if is_closed else f"did not answer within {self.timeout_s:g} s"
        # Ranks enter a collective within moments of each other, so they also give up within moments.
        notes = self._exchange_notes(place, 2.0 if is_closed else min(5.0, self.timeout_s))
        return f"{place}: {self._blame(notes, place, how)} ({' '.join(error.split())[:160]})"

    def _blame(self, notes: Mapping[int, Mapping[str, str]] | None, place: str, how: str) -> str:
        """Return which ranks are at fault, from the notes by rank; None if the store did not answer."""
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        if notes is None:
            if self.rank == 0 or len(others) == 1:
                return f"{', '.join(map(self.named, others))} {how}"
            return f"a rank {how}. {self.named(0)} cannot be reached either: its host or this host's network is down"
        if stopped := [f"{self.named(rank)} had stopped: {notes[rank]['why']}" for rank in others if "why" in notes.get(rank, {})]:
            return "; ".join(stopped)
        missing = [self.named(rank) for rank in others if rank not in notes]
        elsewhere = [f"{self.named(rank)} was in {note['place']}" for rank, note in notes.items() if note["place"] != place]
        blame = ([f"{', '.join(missing)} {how}"] if missing else []) + elsewhere
        return "; ".join(blame) or "every rank was there, so the network between them stalled, or a rank came too late"

    def _exchange_notes(self, place: str, grace_s: float) -> dict[int, dict[str, str]] | None:
        """Leave a note, and return the ranks' notes by rank after waiting for them at most `grace_s`. None if the store does not answer."""

        def collect(store: Any) -> dict[int, dict[str, str]]:
            store.set(f"{NOTE}/{self.rank}", json.dumps({"place": place}))
            deadline = time.monotonic() + grace_s
            found: dict[int, dict[str, str]] = {}
            while len(found) < len(self.hosts) and time.monotonic() < deadline:
                for rank in range(len(self.hosts)):
                    if rank not in found and store.check([f"{NOTE}/{rank}"]):
                        found[rank] = json.loads(store.get(f"{NOTE}/{rank}"))
                time.sleep(0.05)
            store.set(f"{READ}/{self.rank}", "")
            return found

        return self._with_store(collect, grace_s + 3)

    def _with_store(self, work: Callable[[Any], Any], limit_s: float) -> Any:
        """Return `work(store)`, or None. A thread bounds the time: if the store's host is gone, calls block for minutes."""
        answers: list[Any] = []

        def call() -> None:
            with suppress(Exception):  # any error means that the store is gone
                # torch has no public way to reach the store of the default process group
                answers.append(work(self._reason_store or dist.distributed_c10d._get_default_store()))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(limit_s)
        return answers[0] if answers else None


def is_network_error(error: BaseException) -> bool:
    """Return whether a collective itself failed, and not a computation beside it."""
    is_bare = type(error) is RuntimeError  # our own errors may quote any file or server
    return isinstance(error, dist.DistError) or (is_bare and any(words in str(error) for words in NETWORK_ERRORS))

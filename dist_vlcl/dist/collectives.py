"""What is told when an exchange fails: which one it was, at which step, and which rank did not answer. gloo's own words name none of it.

Nothing is sent for this while all goes well. A rank whose exchange has failed, or that stops for a reason of its own, leaves a note in the
process group's store, waits a few seconds for the others' notes, and names the ranks that have left none.
"""

# W ranks

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

NOTE, READ = "dist_vlcl/stopped", "dist_vlcl/read"
LAST_WORD_S = 10.0  # at most, for the others to read why this rank has stopped
WORDS_OF_A_CLOSED_PEER = ("closed by peer", "reset by peer", "pair closure", "Broken pipe", "Connection refused")
WORDS_OF_A_NETWORK = (*WORDS_OF_A_CLOSED_PEER, "gloo", "NCCL", "Timed out waiting")


class CollectiveError(RuntimeError):
    """An exchange between ranks has failed; the message names it and the ranks that did not answer."""


class Collectives:
    """The exchanges of one rank, by name. `where` is the place in the run that they belong to, such as `step 12`."""

    def __init__(self, rank: int, hosts: Sequence[str], timeout_s: float, store: Any = None):
        self.rank, self.hosts, self.timeout_s, self._store = rank, list(hosts), timeout_s, store
        self.where = "the start"
        self.has_failed = False
        self._told: Any = None  # the store that has this rank's word of why it stops
        self._free_since = time.perf_counter()
        self._busy_s = 0.0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Around one exchange: its failure becomes an CollectiveError. What is not of the network passes as it is."""
        entered = time.perf_counter()
        self._busy_s += entered - self._free_since
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CollectiveError) or not is_of_the_network(error):
                raise
            self.has_failed = True
            raise CollectiveError(self._explained(what, time.perf_counter() - entered, str(error))) from error
        finally:
            self._free_since = time.perf_counter()

    def take_busy_s(self) -> float:
        """Return the seconds that this rank has spent outside of exchanges since the last call."""
        busy_s = self._busy_s + time.perf_counter() - self._free_since
        self._busy_s, self._free_since = 0.0, time.perf_counter()
        return busy_s

    def stopped(self, error: BaseException) -> None:
        """Leave word, for ranks that wait for this one, of why it stops; an CollectiveError has left its own."""

        def leave(store: Any) -> None:
            self._leave(store, {"why": f"{type(error).__name__}: {error}"[:500]})
            store.set(f"{READ}/{self.rank}", "")
            self._told = store

        if len(self.hosts) > 1 and not isinstance(error, CollectiveError):
            self._bounded(leave, 2)

    def let_them_read(self) -> None:
        """Wait a little, with the process group closed, until the others know why this rank has stopped: its process may hold the notes."""

        def wait(store: Any) -> None:
            while not store.check([f"{READ}/{rank}" for rank in range(len(self.hosts))]):
                time.sleep(0.05)

        if self._told:
            self._bounded(wait, LAST_WORD_S)

    def named(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})"

    def _explained(self, what: str, waited_s: float, said: str) -> str:
        place = f"{what} at {self.where}"
        is_closed = any(words in said for words in WORDS_OF_A_CLOSED_PEER)
        grace_s = 2.0 if is_closed else min(5.0, self.timeout_s)  # ranks enter an exchange within moments of each other, and so give up
        notes = self._notes({"place": place, "waited_s": waited_s}, grace_s)
        how = "has died or closed the connection" if is_closed else f"did not answer within {self.timeout_s:g} s"
        return f"{place}: {self._blame(notes, place, how)} ({' '.join(said.split())[:160]})"

    def _blame(self, notes: Mapping[int, Mapping[str, Any]] | None, place: str, how: str) -> str:
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        if notes is None:
            if self.rank == 0 or len(others) == 1:
                return f"{', '.join(map(self.named, others))} {how}"
            return f"a rank {how}, and {self.named(0)}, whose host holds the notes, is gone too: its host, or this one's own network"
        stopped = [f"{self.named(rank)} had stopped: {notes[rank]['why']}" for rank in others if "why" in notes.get(rank, {})]
        if stopped:
            return "; ".join(stopped)
        missing = [self.named(rank) for rank in others if rank not in notes]
        elsewhere = [
            f"{self.named(rank)} was in {notes[rank]['place']}" for rank in others if notes.get(rank, {}).get("place", place) != place
        ]
        if missing:
            return "; ".join([f"{', '.join(missing)} {how}", *elsewhere])
        longest = max(note["waited_s"] for note in notes.values())
        late = [self.named(rank) for rank in sorted(notes) if notes[rank]["waited_s"] < longest - self.timeout_s / 2]
        if late:
            return "; ".join([f"{', '.join(late)} came too late, when others had waited for {longest:.0f} s", *elsewhere])
        return "; ".join(elsewhere) or "every rank was there, so the network between them has stalled"

    def _notes(self, own: Mapping[str, Any], grace_s: float) -> dict[int, dict[str, Any]] | None:
        """Return the ranks' notes by rank, waiting for them at most so long; None where the store itself does not answer."""

        def collect(store: Any) -> dict[int, dict[str, Any]]:
            self._leave(store, own)
            deadline = time.monotonic() + grace_s
            found: dict[int, dict[str, Any]] = {}
            while len(found) < len(self.hosts):
                for rank in range(len(self.hosts)):
                    if rank not in found and store.check([f"{NOTE}/{rank}"]):
                        found[rank] = json.loads(store.get(f"{NOTE}/{rank}"))
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            store.set(f"{READ}/{self.rank}", "")
            return found

        return self._bounded(collect, grace_s + 3)

    def _leave(self, store: Any, note: Mapping[str, Any]) -> None:
        store.set(f"{NOTE}/{self.rank}", json.dumps(note))

    def _bounded(self, work: Callable[[Any], Any], limit_s: float) -> Any:
        """Return what `work(store)` returns, or None: a store whose host is gone keeps its callers for minutes, whatever its time-out."""
        answers: list[Any] = []

        def call() -> None:
            with suppress(Exception):  # the store is gone, which is an answer
                answers.append(work(self._told or self._store or dist.distributed_c10d._get_default_store()))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(limit_s)
        return answers[0] if answers else None


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error is that of an exchange, and not of a computation beside it."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in WORDS_OF_A_NETWORK)

"""Interrupt a small run again and again, at random moments and in every way, and see that it ends as if nothing had happened.

Two real processes train a tiny CLIP on handwritten digits, by turns with zeroth order alone and with first-order units too. Faults hit
them from their first instruction to their last: in the start, in steps, in saves, in evaluations, at the end. After each, the same command
is given again, as a scheduler would. A run that has ended is compared, bit for bit, with one that was never interrupted: adapters, metrics
(but for times) and journal. Then the next one starts. Exit status 1 where anything differs or hangs.

  python tools/soak.py --faults 200                              about half an hour on two quiet cores
  python tools/soak.py --faults 6 --torchrun-every 0             a short look
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tiny CLIP of the tests

from dist_vlcl.reading import read_lines
from dist_vlcl.run import checkpoint
from dist_vlcl.run.log import JOURNAL

AS_A_RANK = "as-a-rank"  # how torchrun is told
RANKS, GRACE_S, HANG_S, TIMES = 2, 10, 240, ("time", "seconds", "data_seconds", "images_per_second", "crc")
COMMON = ["tasks.num_tasks=2", "train.epochs=1", "train.batch_size=32", "train.warmup_steps=2", "eval.zero_shot=false", "run.trackers=[]"]
COMMON += [
    "run.record_every_steps=0",
    "run.progress=false",
    "run.plots=false",
    "model.pretrained=random",
    "cluster.timeout_s=60",
    f"cluster.num_processes={RANKS}",
]
PLANS = {
    "zeroth order alone": ["orders=dual_all", "run.save_every_steps=6"],
    "with first-order units": ["orders=dual_hop_odd", "run.save_every_steps=3"],
}

STOP = "SIGSTOP of rank 1"

# what happens, whom it hits (of launcher and ranks), how often
FAULTS: list[tuple[str, Callable[[int, list[int]], list[int]], signal.Signals, int]] = [
    ("kill -9 of rank 0", lambda launcher, ranks: ranks[:1], signal.SIGKILL, 10),
    ("kill -9 of rank 1", lambda launcher, ranks: ranks[1:], signal.SIGKILL, 10),
    ("kill -9 of every process", lambda launcher, ranks: [launcher, *ranks], signal.SIGKILL, 6),
    ("SIGTERM to rank 1", lambda launcher, ranks: ranks[1:], signal.SIGTERM, 4),
    ("SIGUSR1 to rank 0", lambda launcher, ranks: ranks[:1], signal.SIGUSR1, 4),
    ("SIGUSR1 to all ranks", lambda launcher, ranks: ranks, signal.SIGUSR1, 4),
    ("SIGTERM to the launcher", lambda launcher, ranks: [launcher], signal.SIGTERM, 6),
    ("SIGTERM to every process", lambda launcher, ranks: [launcher, *ranks], signal.SIGTERM, 4),
    (STOP, lambda launcher, ranks: ranks[1:], signal.SIGSTOP, 1),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(arguments: list[str], log: str) -> None:
    """Play torchrun, without the seconds that its ranks need to import torch: they are forks of a process that has."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in ranks])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as docs ask of a batch script
    ranks: list[int] = []
    environment = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # none gets lost before the ranks are known
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            os.setpgid(0, 0)
            os.environ.update({name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()})
            os._exit(_as_a_rank(arguments))
        ranks.append(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    codes: list[int] = []
    while len(codes) < RANKS:
        pid, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        ranks.remove(pid)
        if codes[-1] != 0 and ranks:
            _end(ranks)
    sys.exit(0 if not any(codes) else 1)


def _end(ranks: list[int]) -> None:
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in ranks):
        time.sleep(0.1)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def _as_a_rank(arguments: list[str]) -> int:
    from dist_vlcl.train import main
    from tests.helpers.tiny_clip import architecture

    sys.argv = ["train", *arguments, f"model.name={architecture(3, 3)}"]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass
class Start:
    """One start of a run: a launcher and its ranks."""

    arguments: list[str]
    log: Path
    by_torchrun: bool = False

    def __post_init__(self) -> None:
        self._from = self.log.stat().st_size if self.log.exists() else 0
        if self.by_torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", f"--master-port={free_port()}"]
            with open(self.log, "ab") as file:
                environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S)}
                command += [__file__, AS_A_RANK, *self.arguments]
                self._launcher = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        else:
            self._launcher = _context.Process(target=launch, args=(self.arguments, str(self.log)))
            self._launcher.start()
        self.seen: set[psutil.Process] = {psutil.Process(self._launcher.pid)}

    @property
    def pid(self) -> int:
        return self._launcher.pid

    def is_running(self) -> bool:
        return self._launcher.poll() is None if self.by_torchrun else self._launcher.is_alive()

    def ranks(self) -> list[int]:
        """Return the processes that train, in the order of their ranks; fewer while they are being started."""
        try:
            children = psutil.Process(self.pid).children()
            self.seen.update(children)
            return sorted(child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int | None:
        """Wait for the launcher and all that it has started; return its exit code, or None after ending what hangs."""
        self.ranks()
        if self.by_torchrun:
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(HANG_S)
        else:
            self._launcher.join(HANG_S)
        _, alive = psutil.wait_procs([p for p in self.seen if p.pid != self.pid], timeout=HANG_S)
        for process in alive:
            process.kill()
        if alive or self.is_running():
            self._launcher.kill()
            return None
        return self._launcher.returncode if self.by_torchrun else self._launcher.exitcode

    def said(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace")


@dataclass
class Tally:
    """What the soak has seen."""

    faults: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    by_torchrun: int = 0
    runs: Counter = field(default_factory=Counter)
    starts: int = 0
    finished_steps_lost: Counter = field(default_factory=Counter)  # in the journal when the fault hit, and taken again
    stopped_at_exit: int = 0  # after its last exchange, in a complete run: nobody waits for it but the launcher, and for ever
    problems: list[str] = field(default_factory=list)

    def markdown(self, seconds: float) -> str:
        rows = [f"| {name} | {count} |" for name, count in self.faults.most_common()]
        moments = ", ".join(f"{name} {count}" for name, count in self.moments.most_common())
        lost = "; ".join(f"{name}: {self.finished_steps_lost[name]}" for name in PLANS)
        runs = ", ".join(f"{count} {name}" for name, count in self.runs.items())
        return "\n".join(
            [
                f"{sum(self.faults.values())} faults in {sum(self.runs.values())} runs ({runs}), "
                f"{self.starts} starts, {self.by_torchrun} of the faults under torchrun; {seconds / 60:.0f} minutes.",
                "",
                "| fault | times |",
                "| --- | --- |",
                *rows,
                "",
                f"When: {moments}.",
                f"Finished steps that had to be taken again: {lost}.",
                f"Stopped on the way out of a complete run, and ended by hand: {self.stopped_at_exit}.",
                f"Runs that ended otherwise than the one never interrupted, or hung: {len(self.problems)}.",
                *[f"- {problem}" for problem in self.problems],
            ]
        )


def records(folder: Path, file: str) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES and k != "name"} for record in read_lines(folder / file, dict)]


def differing(run: Path, reference: Path) -> list[str]:
    """Return what of a complete run is not as in another."""
    if not ended(run):
        return ["it is not complete"]
    own, other = (checkpoint.load_newest(folder).tensors for folder in (run, reference))
    found = [
        name
        for name in sorted(own.keys() | other.keys())
        if name not in own or name not in other or not torch.equal(own[name], other[name])
    ]
    return found + [file for file in ("metrics.jsonl", JOURNAL) if records(run, file) != records(reference, file)]


def moment(folder: Path) -> str:
    """Return what the run is at, as far as its files tell."""
    if not (folder / JOURNAL).exists():
        return "first start"
    if list((folder / "checkpoints").glob("*.tmp")):
        return "save"
    if time.time() - (folder / JOURNAL).stat().st_mtime < 1:
        return "steps"
    return "a later start, an evaluation or the end"


def ended(folder: Path) -> bool:
    return (folder / "accuracy.json").exists() and json.loads((folder / "accuracy.json").read_text()).get("complete") is True


def journalled(folder: Path) -> int:
    return max((record["step"] for record in read_lines(folder / JOURNAL, dict)), default=0)


def strike(start: Start, draw: random.Random, after_s: float, folder: Path, tally: Tally) -> str | None:
    """Wait, then hit a run that is still there; return the fault's name."""
    deadline = time.monotonic() + after_s
    while start.is_running() and (time.monotonic() < deadline or len(start.ranks()) < RANKS):
        time.sleep(0.02)
    ranks = start.ranks()
    if len(ranks) < RANKS:
        return None  # it was faster
    name, whom, number, _ = draw.choices(FAULTS, [weight for *_, weight in FAULTS])[0]
    tally.moments[moment(folder)] += 1
    for pid in whom(start.pid, ranks):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return name


def soak(options: argparse.Namespace, folder: Path) -> Tally:
    draw, tally, begun = random.Random(options.seed), Tally(), time.monotonic()
    runs, typical_s, references = folder / "runs", {}, {}

    def arguments(name: str, plan: str) -> list[str]:
        return [*COMMON, *PLANS[plan], f"run.root={runs}", f"data.root={folder / 'data'}", f"run.name={name}"]

    def is_late() -> bool:
        return time.monotonic() - begun > 60 * options.minutes

    for number, plan in enumerate(PLANS):
        for attempt in ("warm", "reference"):  # the first one writes the shards
            start, started = Start(arguments(f"{attempt}-{number}", plan), folder / f"{attempt}-{number}.log"), time.monotonic()
            if start.wait() != 0:
                raise RuntimeError(f"the run without faults has failed:\n{start.said()[-3000:]}")
            typical_s[plan], references[plan] = time.monotonic() - started, runs / f"{attempt}-{number}"
        print(f"{plan}: {typical_s[plan]:.1f} s without a fault", flush=True)

    number = 0
    while sum(tally.faults.values()) < options.faults and not is_late():
        plan = list(PLANS)[number % len(PLANS)]
        name, log = f"run-{number}", folder / f"run-{number}.log"
        is_complete = False
        while not is_complete:
            by_torchrun = bool(options.torchrun_every) and (tally.starts + 1) % options.torchrun_every == 0
            before, was_complete = journalled(runs / name), ended(runs / name)
            start = Start(arguments(name, plan), log, by_torchrun)
            tally.starts += 1
            fault = None
            if sum(tally.faults.values()) < options.faults and not is_late():
                after_s = draw.uniform(0, typical_s[plan]) + (5 if by_torchrun else 0)
                fault = strike(start, draw, after_s, runs / name, tally)
            code = start.wait()
            if fault:
                tally.faults[fault] += 1
                tally.by_torchrun += by_torchrun
            found = re.search(r"continuing after step (\d+)", start.said())
            if not was_complete and (found or code == 0):  # a start that got as far as to know
                tally.finished_steps_lost[plan] += before - (int(found[1]) if found else 0)
            if code is None and fault == STOP and ended(runs / name):
                tally.stopped_at_exit += 1
            elif code is None:
                tally.problems.append(f"{name}: hung after {fault}")
            if code != 0 and not fault:
                tally.problems.append(f"{name}: failed without a fault: {start.said()[-300:]}")
            is_complete = code == 0 and ended(runs / name)
            if len(tally.problems) > 5:
                return tally
        tally.runs[plan] += 1
        if different := differing(runs / name, references[plan]):
            tally.problems.append(f"{name} differs: {', '.join(different[:4])}")
        print(f"{name}: {sum(tally.faults.values())} faults so far, {tally.starts} starts, {len(tally.problems)} problems", flush=True)
        number += 1
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="no more faults after so long, however few (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments (default: %(default)s)")
    parser.add_argument(
        "--torchrun-every", type=int, default=10, metavar="N", help="every Nth start by torchrun; 0: none (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where the runs and logs stay (default: a temporary one)")
    parser.add_argument("--report", type=Path, help="write the result here, too, as Markdown")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = soak(options, folder)
    report = tally.markdown(time.monotonic() - begun)
    print(report)
    if options.report:
        options.report.write_text(report + "\n")
    sys.exit(1 if tally.problems else 0)


_context = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    if sys.argv[1:2] == [AS_A_RANK]:
        sys.exit(_as_a_rank(sys.argv[2:]))
    _context.set_forkserver_preload(["dist_vlcl.train", "tests.helpers.warm"])
    main()

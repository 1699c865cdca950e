"""Interrupt small runs again and again, at random moments and in every way, and see that they end as if nothing had happened.

Real processes train a tiny CLIP on images of noise, by turns with zeroth order alone, with first-order units and under ZeRO-2. Faults hit
them from their first instruction to their last: in the start, in steps, in saves, in evaluations, at the end. After each the same command
is given again, as a scheduler would. A run that has ended is compared, bit for bit, with one that was never interrupted: tensors, metrics
(but for times) and journal. Where no equal bits are promised (other ranks with first-order units, other threads) parameters may differ by
1e-3. Then the next run starts. Exit status 1 where anything differs or hangs, or zeroth order alone loses a finished step.

  python tools/soak.py --faults 500 --folder F       a second call goes on counting in F/faults.jsonl
  python tools/soak.py --faults 6                    a short look
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tiny CLIP of the tests

from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import write_shards
from dist_vlcl.reading import read_lines
from dist_vlcl.run import checkpoint
from dist_vlcl.run.log import JOURNAL
from tests.helpers.shards import raw_set

ROOT = Path(__file__).parents[1]
GRACE_S, HANG_S, TIMEOUT_S = 10, 240, 40
NOT_COMPARED = ("time", "seconds", "data_seconds", "images_per_second", "crc", "name", "world_size")
COMMON = [
    "data=folder",
    "data.name=tiny",
    "tasks.num_tasks=2",
    "train.epochs=2",
    "train.batch_size=32",
    "cluster.exact_bits=true",
    "train.warmup_steps=2",
]
COMMON += ["eval.zero_shot=false", "run.trackers=[]", "run.record_every_steps=0", "run.progress=false", "run.plots=false"]
COMMON += ["model.pretrained=random", f"cluster.timeout_s={TIMEOUT_S}", "data.timeout_s=20"]
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch/deepspeed/zero2.json"),
    "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
}


@dataclass(frozen=True)
class Plan:
    """What learns how, and the environment of the ranks."""

    options: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    is_exact: bool = False  # on any number of ranks


ZEROTH = "zeroth order alone"
PLANS = {
    ZEROTH: Plan(["orders=dual_all", "run.save_every_steps=4"], is_exact=True),
    "with first-order units": Plan(["orders=dual_hop_odd", "run.save_every_steps=3"]),
    "with first-order units under ZeRO-2": Plan(["orders=dual_hop_odd", "run.save_every_steps=3"], ZERO2),
}


@dataclass
class Run:
    """A run under faults."""

    root: Path
    name: str
    plan: str
    ranks: int = 2
    threads: int = 1
    clock_s: int = 0  # how far the clock of its ranks jumps, a second after their start
    is_exact: bool = True  # until it meets what changes the last bits
    lost: int = 0  # finished steps that were taken again

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def arguments(self) -> list[str]:
        own = [f"run.root={self.root}", f"data.root={self.root.parent / 'data'}", f"run.name={self.name}"]
        return [*COMMON, *PLANS[self.plan].options, *own, f"cluster.num_processes={self.ranks}", f"cluster.threads={self.threads}"]

    def is_complete(self) -> bool:
        path = self.folder / "accuracy.json"
        return path.exists() and json.loads(path.read_text()).get("complete") is True

    def journalled(self) -> int:
        return max((record["step"] for record in read_lines(self.folder / JOURNAL, dict)), default=0)


# One start of a run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(run: Run, log: str) -> None:
    """Play torchrun, without the seconds that its ranks need to import torch: they are forks of a process that has."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ranks: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in ranks])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as docs ask of a batch script
    environment = {"WORLD_SIZE": run.ranks, "LOCAL_WORLD_SIZE": run.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # none gets lost before the ranks are known
    for rank in range(run.ranks):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            os.setpgid(0, 0)
            os.environ.update({name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()})
            os._exit(be_a_rank(run))
        ranks.append(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    codes: list[int] = []
    while len(codes) < run.ranks:
        pid, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        ranks.remove(pid)
        if codes[-1] != 0 and ranks:
            end(ranks)
    sys.exit(0 if not any(codes) else 1)


def end(ranks: list[int]) -> None:
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in ranks):
        time.sleep(0.1)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def be_a_rank(run: Run) -> int:
    from dist_vlcl.train import main
    from tests.helpers.tiny_clip import architecture

    os.environ.update(PLANS[run.plan].environment)
    real, jumps_at = time.time, time.monotonic() + 1
    time.time = lambda: real() + (run.clock_s if time.monotonic() > jumps_at else 0)
    sys.argv = ["train", *run.arguments(), f"model.name={architecture(2, 2)}"]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass
class Start:
    """One start of a run: a launcher and its ranks."""

    run: Run
    log: Path

    def __post_init__(self) -> None:
        self._from = self.log.stat().st_size if self.log.exists() else 0
        self._launcher = _context.Process(target=launch, args=(replace(self.run), str(self.log)))
        self._launcher.start()
        self.pid: int = self._launcher.pid or 0
        self.seen: set[psutil.Process] = {psutil.Process(self.pid)}

    def is_running(self) -> bool:
        return self._launcher.is_alive()

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
        self._launcher.join(HANG_S)
        _, alive = psutil.wait_procs([p for p in self.seen if p.pid != self.pid], timeout=HANG_S)
        for process in alive:
            process.kill()
        if alive or self.is_running():
            self._launcher.kill()
            return None
        return self._launcher.exitcode

    def said(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace")


# Faults: each hits a running start, and may return what is to be done once that has ended

Heal = Callable[[], object]
Hit = Callable[[Start, list[int]], Heal | None]


def signalled(number: signal.Signals, whom: Callable[[int, list[int]], list[int]]) -> Hit:
    def hit(start: Start, ranks: list[int]) -> None:
        for pid in whom(start.pid, ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    return hit


def moved(start: Start, _: list[int]) -> Heal | None:
    folder, aside = start.run.folder, start.run.folder.with_name("moved")
    if not folder.exists():
        return None
    folder.rename(aside)

    def back() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a start has made that was not so far
        aside.rename(folder)

    return back


def removed(start: Start, _: list[int]) -> None:
    """Remove the folder: the run begins anew."""
    if start.run.folder.exists():
        start.run.folder.rename(gone := start.run.folder.with_name("gone"))
        shutil.rmtree(gone)


def copied(start: Start, ranks: list[int]) -> None:
    """Copy the folder as it is in this moment, half-written files too; kill the run, and go on with the copy under its own name."""
    if start.run.folder.exists():
        copy = start.run.folder.with_name(f"{start.run.name}c")
        subprocess.run(["cp", "-r", str(start.run.folder), str(copy)], stderr=subprocess.DEVNULL, check=False)
        start.run.name = copy.name
    KILL_ALL(start, ranks)


def full(start: Start, ranks: list[int]) -> None:
    """Let no file of rank 0 grow beyond some bytes, as on a full disk; the limit ends with the process."""
    with suppress(ProcessLookupError):
        resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (draw_limit.choice((0, 3000, 20000)),) * 2)


draw_limit = random.Random(0)
KILL_ALL = signalled(signal.SIGKILL, lambda launcher, ranks: [launcher, *ranks])
STOP = "SIGSTOP of rank 1"
FAULTS: dict[str, tuple[Hit, int]] = {  # name -> what happens, how often
    "kill -9 of rank 0": (signalled(signal.SIGKILL, lambda launcher, ranks: ranks[:1]), 8),
    "kill -9 of the last rank": (signalled(signal.SIGKILL, lambda launcher, ranks: ranks[-1:]), 8),
    "kill -9 of every process": (KILL_ALL, 6),
    "SIGTERM to the last rank": (signalled(signal.SIGTERM, lambda launcher, ranks: ranks[-1:]), 4),
    "SIGUSR1 to rank 0": (signalled(signal.SIGUSR1, lambda launcher, ranks: ranks[:1]), 3),
    "SIGUSR1 to all ranks": (signalled(signal.SIGUSR1, lambda launcher, ranks: ranks), 3),
    "SIGTERM to the launcher": (signalled(signal.SIGTERM, lambda launcher, ranks: [launcher]), 4),
    "SIGTERM to every process": (signalled(signal.SIGTERM, lambda launcher, ranks: [launcher, *ranks]), 4),
    STOP: (signalled(signal.SIGSTOP, lambda launcher, ranks: ranks[1:]), 1),
    "folder moved while the run uses it": (moved, 5),
    "folder removed while the run uses it": (removed, 3),
    "folder copied while the run uses it": (copied, 5),
    "disk full": (full, 6),
}


def change(run: Run, draw: random.Random) -> str | None:
    """Change how the next start is made; return the change's name."""
    run.ranks, run.threads, run.clock_s = 2, 1, 0
    kind = draw.choices((None, "ranks", "threads", "clock"), (70, 15, 2, 13))[0]
    if kind == "ranks":
        run.ranks = draw.choice((1, 3))
        run.is_exact &= PLANS[run.plan].is_exact
        return f"start with {run.ranks} rank{'s' if run.ranks > 1 else ''} instead of 2"
    if kind == "threads":
        run.threads, run.is_exact = 2, False
        return "start with 2 threads instead of 1"
    if kind == "clock":
        run.clock_s = draw.choice((-(10**8), -3600, 86400, 10**9))
        return f"clock jumps {'back' if run.clock_s < 0 else 'forth'}"
    return None


def strike(start: Start, draw: random.Random, typical_s: float) -> tuple[str, Heal | None] | None:
    """Wait for a random time or step, then hit a run that is still there; return the fault's name and its healing."""
    step = start.run.journalled() + draw.randint(1, 6) if draw.random() < 0.5 else None
    deadline = time.monotonic() + (30 * typical_s if step else draw.uniform(0, typical_s))

    def is_time() -> bool:
        return time.monotonic() > deadline or (step is not None and start.run.journalled() >= step)

    while start.is_running() and (len(start.ranks()) < start.run.ranks or not is_time()):
        time.sleep(0.02)
    ranks = start.ranks()
    if len(ranks) < start.run.ranks:
        return None  # it was faster
    name = draw.choices(list(FAULTS), [weight for _, weight in FAULTS.values()])[0]
    return name, FAULTS[name][0](start, ranks)


# What a run has become


def records(folder: Path, file: str) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in NOT_COMPARED} for record in read_lines(folder / file, dict)]


def differing(run: Run, reference: Path) -> list[str]:
    """Return what of a complete run is not as in another."""
    own, other = (checkpoint.load_newest(folder).tensors for folder in (run.folder, reference))
    if own.keys() != other.keys():
        return ["the names of its tensors"]
    if not run.is_exact:
        return [name for name in own if not torch.allclose(own[name].double(), other[name].double(), rtol=0, atol=1e-3)]
    found = [name for name in own if not torch.equal(own[name], other[name])]
    return found + [file for file in ("metrics.jsonl", JOURNAL) if records(run.folder, file) != records(reference, file)]


def soak(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Return one record per fault, those of earlier calls first. Prints a line per run."""
    results, begun, runs = folder / "faults.jsonl", time.monotonic(), folder / "runs"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    seed = max((one["seed"] for one in found), default=options.seed - 1) + 1
    draw = random.Random(seed)
    if not (folder / "data").exists():
        write_shards(raw_set(4, 48, 6, 16), DataConfig("tiny", "folder", root=str(folder / "data"), encoding="original"))
    plans = [plan for plan in PLANS if options.zero or not PLANS[plan].environment]

    @functools.cache
    def without_faults(plan: str) -> tuple[Run, float]:
        """Train a run without faults; return it, and its seconds."""
        reference = Run(runs, f"reference-{plans.index(plan)}", plan)
        shutil.rmtree(reference.folder, ignore_errors=True)
        start, started = Start(reference, folder / "reference.log"), time.monotonic()
        if start.wait() != 0:
            raise RuntimeError(f"the run without faults has failed:\n{start.said()[-3000:]}")
        print(f"{plan}: {time.monotonic() - started:.1f} s without a fault", flush=True)
        return reference, time.monotonic() - started

    def left() -> int:
        return options.faults - sum(one["fault"] is not None for one in found)

    def keep(run: Run, record: dict) -> None:
        found.append({"seed": seed, "run": f"{seed}-{number}", "plan": run.plan, **record})
        with results.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")

    number = 0
    while left() > 0 and time.monotonic() - begun < 60 * options.minutes:
        run = Run(runs, f"run-{seed}-{number}", plans[number % len(plans)])
        reference, typical_s = without_faults(run.plan)
        for record in until_complete(run, folder / f"{run.name}.log", draw, typical_s, left):
            keep(run, record)
        different = differing(run, reference.folder)
        end = "equal bits" if run.is_exact else "within 1e-3"
        keep(run, {"fault": None, "problem": f"differs: {', '.join(different[:4])}" if different else None, "end": end})
        print(f"{run.name}, {end}: {options.faults - left()} faults so far", flush=True)
        number += 1
    return found


def until_complete(run: Run, log: Path, draw: random.Random, typical_s: float, left: Callable[[], int]) -> Iterator[dict]:
    """Yield a record for every fault until the run is complete."""
    while not run.is_complete():
        changed = change(run, draw) if left() > 0 else None
        before, name = run.journalled(), run.name
        start = Start(run, log)
        struck = strike(start, draw, typical_s) if left() > 0 else None
        code = start.wait()
        fault, heal = struck or (None, None)
        if heal:
            heal()
        problem = None
        if code is None and not (fault == STOP and run.is_complete()):
            problem = "hung"
        elif code not in (0, None) and not fault:
            problem = f"failed without a fault: {start.said()[-300:]}"
        resumed = re.search(r"continuing .*after step (\d+)", start.said())
        if run.plan == ZEROTH and resumed and name == run.name and int(resumed[1]) < before:
            problem = f"lost steps {int(resumed[1]) + 1} to {before}"
        if changed:
            yield {"fault": changed, "problem": None}
        if fault or problem:
            yield {"fault": fault, "problem": problem}


def report(found: list[dict]) -> str:
    counts = Counter(one["fault"] for one in found if one["fault"])
    ends = Counter(f"{one['plan']}, {one['end']}" for one in found if "end" in one)
    problems = [f"- run {one['run']}, {one['fault']}: {one['problem']}" for one in found if one["problem"]]
    runs = "; ".join(f"{count} {end}" for end, count in ends.items())
    rows = [f"| {name} | {count} |" for name, count in counts.most_common()]
    head = f"{counts.total()} faults in {ends.total()} runs ({runs}); problems: {len(problems)}"
    return "\n".join([head, "", "| fault | times |", "|---|---|", *rows, *problems])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500, help="with those of earlier calls (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="begin no run after so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call's faults and their moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs, the logs and faults.jsonl stay (default: a temporary one)")
    options = parser.parse_args()
    options.zero = importlib.util.find_spec("deepspeed") is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(options, folder)
    print(report(found), flush=True)
    sys.exit(1 if any(one["problem"] for one in found) else 0)


_context = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning"}
    _context.set_forkserver_preload(["tests.helpers.warm", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])])
    main()

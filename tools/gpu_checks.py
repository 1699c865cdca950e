"""Check and measure dist_vlcl on a machine with one GPU: two ranks on it, tests, step times, memory, noise.

    tools/gpu_checks.sh OUT                                    everything, eight minutes at most
    tools/gpu_checks.sh OUT --parts ranks,tests --minutes 4    some parts
    tools/gpu_checks.sh OUT --wheels wheels                    with packages from a folder of wheels; no network is needed
    tools/gpu_checks.sh OUT --device cpu                       tiny sizes, to see that the script works

OUT/gpu_checks.md and OUT/gpu_checks.json hold what was measured so far; both are written again after each part. A part is a process with
its own time limit. It writes OUT/parts/NAME.json after each row, so a part that runs out of time keeps its rows. OUT/parts/NAME.log is
its output. Exit status: 0 if nothing failed, 1 if a check or a part failed, 2 if the checks could not start. A part that ran out of time
has not failed.

On a machine with a network, `pip wheel --wheel-dir wheels .` makes the folder for --wheels. Packages that are installed stay as they are.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# torch is imported only by the parts: the first process must work whatever is missing.

ROOT = Path(__file__).resolve().parents[1]
START_S = 20.0  # a part is not started with less time left: torch's import and the GPU's start take most of it
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the checks, and the share of the whole time that it may take."""

    name: str
    share: float


PARTS = [Part("ranks", 0.25), Part("tests", 0.3), Part("steps", 0.4), Part("memory", 0.2), Part("noise", 0.25)]  # most valuable first


@dataclass
class Outcome:
    """The result of a part so far."""

    status: str = "not started"
    seconds: float = 0.0
    tables: list[Row] = field(default_factory=list)  # title, rows, note, markdown
    failures: list[str] = field(default_factory=list)
    machine: Row = field(default_factory=dict)


# the first process: time, packages, one result of all parts


def run_parts(
    parts: Sequence[Part],
    total_s: float,
    start: Callable[[Part, float], Outcome],
    save: Callable[[dict[str, Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """Run the parts one after another, and `save` after each. A part may take its share of the time, but not more than is left."""
    deadline = clock() + total_s
    outcomes = {part.name: Outcome() for part in parts}
    for part in parts:
        limit_s = min(part.share * total_s, deadline - clock())
        if limit_s >= min(START_S, part.share * total_s):
            outcomes[part.name] = start(part, limit_s)
        else:
            outcomes[part.name].status = "not started: no time was left"
        save(outcomes)
    return outcomes


def start_part(command: Sequence[str], environment: dict[str, str], file: Path, limit_s: float) -> Outcome:
    """Run a part's process, which writes `file`; end it and its children after `limit_s`."""
    file.unlink(missing_ok=True)
    started = time.monotonic()
    with open(file.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = outcome_of(file, status, f"out of time after {limit_s:.0f} s; the rows until then are kept")
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def outcome_of(file: Path, status: int | None, late: str = "") -> Outcome:
    """Return what a part has written. status: its exit status, or None if it was ended, which `late` explains."""
    outcome = Outcome(**json.loads(file.read_text())) if file.exists() else Outcome()
    outcome.status = "complete" if status == 0 else late if status is None else "failed"
    if status:
        lines = file.with_suffix(".log").read_text(errors="replace").strip().splitlines() or ["no output"]
        outcome.failures.append(f"exit status {status}: {lines[-1][:300]}")
    return outcome


def missing_packages() -> list[str]:
    """Return the packages of pyproject.toml, and pytest, that are not installed."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [name for requirement in [*wanted, "pytest"] if not is_installed(name := re.split(r"[<>=!~ \[;]", requirement)[0])]


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install_wheels(folder: Path, target: Path) -> None:
    """Install the wheels of packages that this machine lacks into a folder. Raises OSError if pip fails."""
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not is_installed(wheel.name.split("-")[0].replace("_", "-"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    if wheels and (done := subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)).returncode:
        raise OSError(f"--wheels {folder}: pip could not install them: {done.stderr.strip()[-300:]}")


def driver() -> str:
    """Return the GPU's name, driver version and memory, or an empty string if there is no NVIDIA driver."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else ""


def write_results(out: Path, facts: Row, outcomes: dict[str, Outcome]) -> None:
    """Write gpu_checks.json and gpu_checks.md."""
    machine = next((outcome.machine for outcome in outcomes.values() if outcome.machine), {})
    content = {"machine": machine | facts, "parts": {name: asdict(outcome) for name, outcome in outcomes.items()}}
    replace_file(out / "gpu_checks.json", json.dumps(content, indent=1) + "\n")
    lines = ["# GPU checks", ", ".join(f"{name} {value}" for name, value in (machine | facts).items() if value)]
    for name, outcome in outcomes.items():
        lines += [f"## {name}", f"{outcome.status} ({outcome.seconds:.0f} s)"]
        lines += ["\n".join(f"- **FAILED**: {text}" for text in outcome.failures)] if outcome.failures else []
        lines += [table["markdown"] for table in outcome.tables]
    replace_file(out / "gpu_checks.md", "\n\n".join(lines) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="the checks end after this time (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the script")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", default=",".join(names), help="with commas between (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder with wheels of packages that this machine lacks")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # this process is a part
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    if args.part:
        return run_part(args)
    if unknown := set(args.parts.split(",")) - set(names):
        parser.error(f"--parts {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    if not is_installed("torch"):
        parser.error(f"{sys.executable} has no torch; choose the interpreter with the variable PYTHON")
    facts = {"driver": driver(), "torch": importlib.metadata.version("torch"), "minutes": args.minutes}
    if args.device == "cuda" and not facts["driver"]:
        parser.error("this machine has no NVIDIA driver; use --device cpu to try the script")
    (args.out / "parts").mkdir(parents=True, exist_ok=True)
    packages = args.out / "packages"
    if args.wheels:
        try:
            install_wheels(args.wheels, packages)
        except OSError as error:
            parser.error(str(error))
        sys.path.insert(0, str(packages))
    if missing := missing_packages():
        facts["missing"] = " ".join(missing)
        print(f"missing packages: {' '.join(missing)}. Parts that need them will fail; --wheels DIR installs them", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "HF_HUB_OFFLINE": "1"}
    if args.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(part: Part, limit_s: float) -> Outcome:
        command = [sys.executable, str(Path(__file__).resolve()), str(args.out), "--device", args.device, "--part", part.name]
        outcome = start_part(command, environment, args.out / "parts" / f"{part.name}.json", limit_s)
        print(f"{part.name}: {outcome.status} ({outcome.seconds:.0f} s)", *outcome.failures, sep="\n  ", flush=True)
        return outcome

    chosen = [part for part in PARTS if part.name in args.parts.split(",")]
    outcomes = run_parts(chosen, 60 * args.minutes, start, lambda found: write_results(args.out, facts, found))
    print(args.out / "gpu_checks.md")
    return int(any(outcome.failures for outcome in outcomes.values()))


# what a part has: results, sizes, a model that is built once


class Results:
    """The tables and failures of a part. They are written after each change."""

    def __init__(self, file: Path, machine: Row):
        self.file, self.machine = file, machine
        self.tables: dict[str, Any] = {}
        self.failures: list[str] = []

    def add(self, title: str, rows: Iterable[Row], note: str = "") -> None:
        """Add rows to the table of this title. A row may have other columns than the rows before it."""
        from benchmarks.common import Table

        for row in rows:
            table = self.tables.setdefault(title, Table(title, [], note))
            columns = {column: "" for known in (*table.rows, row) for column in known}
            table.rows = [columns | known for known in (*table.rows, row)]
            self.save()

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.save()

    def save(self) -> None:
        tables = [vars(table) | {"markdown": table.markdown()} for table in self.tables.values()]
        content = Outcome(tables=tables, failures=self.failures, machine=self.machine)
        replace_file(self.file, json.dumps(asdict(content)))


@dataclass(frozen=True)
class Sizes:
    """How large the work is: as in docs/performance.md on a GPU, tiny on a CPU."""

    device: str
    model: tuple[str, ...]
    images: int
    classes: int
    repeats: int  # turns that are timed
    directions: int  # for rounding in slopes
    memory: tuple[int, int]  # images and classes of Table 5

    @classmethod
    def of(cls, device: str) -> "Sizes":
        if device == "cuda":
            return cls(device, ("model=vit_b16", "model.pretrained=random"), 128, 20, 4, 24, (64, 125))
        from tests.helpers.tiny_clip import architecture

        return cls(device, (f"model.name={architecture(2, 2)}", "model.pretrained=random"), 8, 4, 1, 2, (8, 4))

    def some(self, rows: list[Any], few: int) -> list[Any]:
        """Return all rows for a GPU, and the first few for a CPU."""
        return rows if self.device == "cuda" else rows[:few]

    def workload(self, *options: str, **sizes: int) -> Any:
        from benchmarks.common import Workload

        return Workload((*self.model, f"cluster.device={self.device}", *options), self.images, self.classes).changed(**sizes)

    def arguments(self, **values: Any) -> argparse.Namespace:
        """Return arguments for a function of a benchmark, as its command line would."""
        options = [*self.model, f"cluster.device={self.device}"]
        return argparse.Namespace(options=options, images=self.images, classes=self.classes, **values)


def run_part(args: argparse.Namespace) -> int:
    """Run one part in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.common import machine

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU")
    results = Results(args.out / "parts" / f"{args.part}.json", machine())
    parts = {"ranks": check_ranks, "tests": check_tests, "steps": time_steps, "memory": measure_memory, "noise": measure_noise}
    parts[args.part](Sizes.of(args.device), results)
    return 0


def free_memory() -> None:
    """Give the memory of the last row back, so that it does not count in the next one."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


# two ranks on one GPU


STEPS = 4  # of a run of the two ranks: the second and third record graphs, the fourth only replays them


def check_ranks(sizes: Sizes, results: Results) -> None:
    """Train two ranks on the same device over gloo, with graphs and without, and compare them with each other and with one rank.

    This process is rank 0. It starts rank 1 as the same part.
    """
    rank = os.environ.setdefault("RANK", "0")
    other = None
    if rank == "0":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command = [sys.executable, str(Path(__file__).resolve()), str(results.file.parents[1]), "--device", sizes.device, "--part", "ranks"]
        other = subprocess.Popen(command, env=os.environ | {"RANK": "1"})
    from dist_vlcl.dist.world import ClusterConfig, World

    world = World.from_environment(ClusterConfig(device=sizes.device, timeout_s=60), backend="gloo")
    try:
        # The small CLIP is recorded sooner than ViT-B/16, so more cases fit in.
        small = replace(sizes, model=("model=small",)) if sizes.device == "cuda" else sizes
        for precision in sizes.some(["fp32", "bf16"], 1):
            for orders in sizes.some(["dual_hop_odd", "dual_all", "first"], 2):
                for micro_batches in (1, 2):
                    compare_ranks(small, results, world, orders, precision, micro_batches)
        if sizes.device == "cuda":
            compare_ranks(sizes, results, world, "dual_hop_odd", "bf16", 2)
    finally:
        world.close()
        if other is not None and other.wait(30):
            results.fail(f"rank 1 ended with exit status {other.returncode}")


def compare_ranks(sizes: Sizes, results: Results, world: Any, orders: str, precision: str, micro_batches: int) -> None:
    """Add a row for graphs and one without, and the failures. Both ranks call this."""
    from dist_vlcl.dist.agree import digest
    from dist_vlcl.dist.world import World

    images = 72  # 18 in each micro-batch of a rank: fewer than 17 have other last bits with the tiny model on some CPUs
    options = (f"orders={orders}", f"model.precision={precision}", "zo=conservative")
    found = {}
    for graphs in (False, True):
        workload = sizes.workload(*options, f"model.graphs={str(graphs).lower()}", images=images)
        adapters, losses, recorded = train(workload, world, micro_batches)
        found[graphs] = (adapters, losses, recorded, world.gather_objects((digest(adapters), losses)))
    if not world.is_main:
        return
    alone, losses_alone, _ = train(workload, World.alone(str(world.device)), 1)
    for graphs, (adapters, losses, recorded, of_ranks) in found.items():
        is_same = of_ranks[0] == of_ranks[1]
        is_replayed = digest(adapters) == digest(found[False][0])
        is_alone = digest(adapters) == digest(alone)
        change = max(abs(a - b) / abs(b) for a, b in zip(losses, losses_alone, strict=True))
        row = {"model": workload.config.model.name, "orders": orders, "precision": precision, "micro-batches": micro_batches}
        row |= {"graphs": "on" if graphs else "off"}
        case = ", ".join(f"{name} {value}" for name, value in row.items())
        row |= {"recordings": recorded, "ranks have the same bits": yes(is_same), "bits as without graphs": yes(is_replayed)}
        row |= {"bits as on one rank": yes(is_alone), "largest relative difference of a loss to one rank": change}
        results.add(f"Two ranks on one device, gloo, {images} images, {STEPS} steps", [row])
        checks = [
            (is_same, "the two ranks differ"),
            (is_replayed, "the adapters differ from those without graphs"),
            (is_alone or (orders, precision) != ("dual_all", "fp32"), "zeroth order alone differs from one rank"),
            (change < (1e-4 if precision == "fp32" else 1e-2), f"a loss differs by {change:.1e} from one rank"),
            (bool(recorded) == (graphs and sizes.device == "cuda"), f"{recorded} graphs were recorded"),
        ]
        for holds, message in checks:
            if not holds:
                results.fail(f"{case}: {message}")


def train(workload: Any, world: Any, micro_batches: int) -> tuple[dict[str, Any], list[float], int]:
    """Return the adapters after a few steps, the losses, and the number of recorded graphs. All ranks call this."""
    from dist_vlcl.experiment import PlannedStep
    from dist_vlcl.zo.noise import Key

    step = workload.step(workload.towers(str(world.device)), world)
    batch = workload.batch(step.towers, world.rank, world.size)
    losses = []
    for number in range(STEPS):
        planned = PlannedStep(batch, Key(5, number), 1e-3)
        losses.append(step(planned.micro_batches(micro_batches), planned.key, planned.lr).loss)
    towers = (step.towers.vision, step.towers.language)
    recorded = sum(len(graphs) for tower in towers if tower.graphs for graphs in tower.graphs.graphs.values())
    adapters = step.adapters()
    step.first.end()  # accelerate would keep the model
    return adapters, losses, recorded


def yes(holds: bool) -> str:
    return "yes" if holds else "NO"


# tests/test_gpu.py

OUTCOME = re.compile(r"^(tests/test_gpu\.py::.*) (PASSED|FAILED|ERROR|SKIPPED)\b")


def check_tests(sizes: Sizes, results: Results) -> None:
    """Run tests/test_gpu.py, and count its tests as they end."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        count_tests(process.stdout, results)
    if process.returncode not in (0, 1):
        results.fail(f"pytest ended with exit status {process.returncode}")


def count_tests(lines: Iterable[str], results: Results) -> None:
    """Keep a table with one row of counts, and a failure for each test that failed. Print the lines."""
    row = {outcome: 0 for outcome in ("passed", "failed", "error", "skipped")}
    results.add("tests/test_gpu.py", [row])
    for line in lines:
        print(line, end="", flush=True)
        if ended := OUTCOME.match(line):
            name, outcome = ended[1], ended[2].lower()
            results.tables["tests/test_gpu.py"].rows[0][outcome] += 1
            if outcome in ("failed", "error"):
                results.fail(name)
            results.save()


# times

SETTINGS = [  # of docs/performance.md, the table of GPU times first
    ("language_all", "conservative"),
    ("dual_hop_odd", "mozo"),
    ("first", "conservative"),
    ("dual_all", "conservative"),
    ("vision_all", "conservative"),
    ("vision_suffix", "conservative"),
    ("dual_hop_odd", "conservative"),
    ("language_all", "mozo"),
]
VARIANTS = {f"{precision}{', graphs' * graphs}": (precision, graphs) for precision in ("fp32", "bf16") for graphs in (False, True)}


def time_steps(sizes: Sizes, results: Results) -> None:
    """Time the naive step and ours in turn, in milliseconds: fp32 and bf16, single kernels and CUDA graphs."""
    for orders, strategy in sizes.some(SETTINGS, 2):
        row = {"orders": orders, "strategy": strategy} | attempted(partial(times_of, sizes, orders, strategy), results)
        results.add(
            f"Time of a step in ms, {sizes.images} images, {sizes.classes} classes",
            [row],
            "Medians of turns in which all variants ran one after another; ratios are over the same turns. The naive step is in fp32 "
            "without TF32. GPU busy: time of all kernels of a step with graphs.",
        )


def times_of(sizes: Sizes, orders: str, strategy: str) -> Row:
    """Return the columns of one setting."""
    from benchmarks.common import interleaved, ratio
    from benchmarks.naive import naive_step
    from dist_vlcl.dist.world import World
    from dist_vlcl.zo.noise import Key

    free_memory()
    key, device = Key(0, 1), sizes.device
    plain = sizes.workload(f"orders={orders}", f"zo={strategy}")
    naive = naive_step(plain, device)
    batch = plain.batch(naive.towers)
    variants: dict[str, Callable[[], Any]] = {"naive": lambda: naive(batch, key, 1e-3)}
    for name, (precision, graphs) in VARIANTS.items():
        workload = plain.changed(f"model.precision={precision}", f"model.graphs={str(graphs).lower()}")
        step = workload.step(workload.towers(device), World.alone(device))
        variants[name] = lambda step=step: step([batch], key, 1e-3)
    seconds = interleaved(variants, sizes.repeats, device)
    row: Row = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    for precision in ("fp32", "bf16"):
        times = seconds[f"{precision}, graphs"]
        row[f"{precision} images/s"] = sizes.images / statistics.median(times)
        row[f"{precision} times faster"] = ratio(seconds["naive"], times)
        if device == "cuda":
            row[f"{precision} GPU busy"] = busy_ms(variants[f"{precision}, graphs"])
    return row


def busy_ms(work: Callable[[], Any]) -> float:
    """Return the milliseconds of all kernels and copies that `work` runs on the GPU."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1000


def attempted(measure: Callable[[], Row], results: Results) -> Row:
    """Return the columns of a row. An error, such as too little memory, becomes a failure, and the next row follows."""
    try:
        return measure()
    except RuntimeError as error:
        results.fail(message := " ".join(f"{type(error).__name__}: {error}".split())[:300])
        return {"error": message[:80]}


# memory and noise


def measure_memory(sizes: Sizes, results: Results) -> None:
    """Measure what a step allocates and reserves, beside Table 5 of the paper. On a CPU the bytes are counted."""
    from benchmarks.memory import measured, peak_bytes
    from dist_vlcl.paper import published

    bytes_of = measured if sizes.device == "cuda" else lambda workload: {"counted GB": peak_bytes(workload) / 1e9}
    images, classes = sizes.memory
    papers = {"first": "fo", "language_all": "language", "vision_all": "vision", "dual_all": "dual"}
    modes = [("fp32", False, False), ("bf16", False, False), ("fp32", False, True), ("bf16", False, True), ("bf16", True, False)]
    for adapter in sizes.some(["moe", "lora"], 1):
        for precision, checkpoint, graphs in sizes.some(modes, 1):
            for orders, paper in papers.items():
                flags = [f"model.{name}={str(value).lower()}" for name, value in (("checkpoint", checkpoint), ("graphs", graphs))]
                options = (f"adapter={adapter}", f"orders={orders}", f"model.precision={precision}", *flags)
                workload = sizes.workload(*options, images=images, classes=classes)
                row = {"adapter": adapter, "orders": orders, "precision": precision}
                row |= {"checkpoints": "on" if checkpoint else "off", "graphs": "on" if graphs else "off"}
                free_memory()
                row |= attempted(partial(bytes_of, workload), results)
                row["paper GB"] = published()["table5_memory_gb"][adapter][paper]
                results.add(f"Peak memory of a step, weights included: {images} images, {classes} classes", [row])


def measure_noise(sizes: Sizes, results: Results) -> None:
    """Measure how fast directions are drawn, and how much of a slope is rounding in each precision."""
    from benchmarks.noise import measure_draws, measure_slopes

    table = measure_draws(sizes.arguments(orders="dual_all", repeats=2 * sizes.repeats))
    results.add(table.title, table.rows)
    for orders in ("language_all", "vision_all"):
        free_memory()
        args = sizes.arguments(orders=orders, repeats=sizes.directions)
        args.images = min(32, args.images)
        table = measure_slopes(args)
        results.add(table.title, table.rows, table.note)


if __name__ == "__main__":
    sys.exit(main())

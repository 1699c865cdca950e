"""Damage the files that the program reads, run the command that reads them, and sort the outcomes: `python tools/fuzz.py --inputs 2000`.

    clear error       the command ends with a message that names what is wrong
    recovered         the command says what it left out, and goes on
    no effect         the result is that of the undamaged file
    traceback         an error that the program did not expect
    hang              no end within --seconds
    silently wrong    another result, and not a word

Every input is a function of its seed: `--first 17 --inputs 1 --keep DIR` repeats number 17 and leaves its files. Exit status 1 if one
of the last three occurs. Each input runs in a fork of this process, which has imported everything.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tiny CLIP of the tests

import safetensors
import torch

from dist_vlcl import train
from dist_vlcl.commands import evaluate, replay, report, verify
from dist_vlcl.config import Config, compose_config
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import make_shards
from dist_vlcl.step import HybridStep
from tests.helpers import warm  # noqa: F401
from tests.helpers.tiny_clip import architecture

OPTIONS = [
    f"model.name={architecture(2, 2)}",
    "model.pretrained=random",
    "tasks.num_tasks=2",
    "train.batch_size=72",
    "train.warmup_steps=1",
]
OPTIONS += ["orders=dual_all", "run.trackers=[]", "run.progress=false", "run.plots=false", "run.save_every_steps=2", "eval.zero_shot=false"]
BAD = ("traceback", "hang", "silently wrong")
KINDS = [None, True, -1, 10**9, 1e300, "", "x", "![x](/etc/passwd)", "\x1b[2J", "${oc.env:HOME}", "../../x", [], [[]], {}, {"a": None}]
TIMES = ("time", "seconds", "data_seconds", "images_per_second", "crc", "name")


# Commands: each runs in a folder that holds runs/done, runs/stopped, runs/other, data/ and source/


def resume(cfg: Config) -> None:
    train.run_and_report(cfg)


def by_words(main: Callable[[], None], *words: str) -> Callable[[Config], None]:
    def run(_: Config) -> None:
        sys.argv = list(words)
        main()

    return run


def build(_: Config) -> None:
    for name, source in (("pictures", "source/pictures"), ("archive", "source/pictures.tar")):
        options = {"class_names": "source/names.json"} if name == "pictures" else {}
        index = make_shards(DataConfig(name=name, reader="folder", source=source, root="built", test_fraction=0.5, **options))
        print(
            name, index.class_names, index.sizes("train", range(len(index.class_names))), index.sizes("test", range(len(index.class_names)))
        )


COMMANDS: dict[str, Callable[[Config], None]] = {
    "resume": resume,
    "evaluate": by_words(evaluate.main, "evaluate", "runs/done"),
    "replay": by_words(replay.main, "replay", "runs/done"),
    "report": by_words(report.main, "report", "runs/done", "runs/other"),
    "verify": lambda cfg: verify.run(cfg),
    "build": build,
}
TARGETS: dict[str, list[str]] = {  # file -> the commands that read it
    "runs/stopped/config.yaml": ["resume"],
    "runs/stopped/env.json": ["resume"],
    "runs/stopped/metrics.jsonl": ["resume"],
    "runs/stopped/journal.jsonl": ["resume"],
    "runs/stopped/accuracy.json": ["resume"],
    "runs/stopped/trackers.json": ["resume"],
    "runs/stopped/units/*": ["resume"],
    "runs/stopped/checkpoints/*": ["resume"],
    "runs/done/config.yaml": ["report", "evaluate", "replay"],
    "runs/done/accuracy.json": ["report"],
    "runs/done/metrics.jsonl": ["report"],
    "runs/done/journal.jsonl": ["replay"],
    "runs/done/units/*": ["report"],
    "runs/done/checkpoints/*": ["evaluate", "replay"],
    "data/digits/index.json": ["evaluate", "verify"],
    "data/digits/test/0001-*": ["evaluate", "verify"],
    "source/pictures/*/*.png": ["build"],
    "source/pictures.tar": ["build"],
    "source/names.json": ["build"],
}
DATA = ("data", "source")  # --only run leaves these targets out


# Damage


def flip(data: bytearray, draw: random.Random) -> bytes:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(data: bytearray, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def drop(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 7, 512, 4096))]
    return data


def insert(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    data[start:start] = draw.choice((draw.randbytes(8), b"\0" * 512, data[start : start + 200]))
    return data


def digit(data: bytearray, draw: random.Random) -> bytes:
    if places := [k for k, byte in enumerate(data) if chr(byte).isdigit()]:
        data[draw.choice(places)] = ord(draw.choice("0123456789"))
    return data


def lines(data: bytearray, draw: random.Random) -> bytes:
    parts = bytes(data).splitlines(keepends=True)
    one, other = draw.randrange(len(parts)), draw.randrange(len(parts))
    how = draw.randrange(3)
    if how == 0:
        del parts[one]
    elif how == 1:
        parts.insert(other, parts[one])
    else:
        parts[one], parts[other] = parts[other], parts[one]
    return b"".join(parts)


def kind(data: bytearray, draw: random.Random) -> bytes:
    """Replace one value of a JSON text or YAML file by one of another kind."""
    number, parts = 0, bytes(data).splitlines() or [b""]
    is_lines = len(parts) > 1 and parts[0].startswith(b"{") and parts[0].endswith(b"}")
    number = draw.randrange(len(parts)) if is_lines else 0
    try:
        content = json.loads(parts[number] if is_lines else bytes(data))
    except ValueError:
        place = draw.randrange(len(parts))
        key = parts[place].partition(b":")[0]
        parts[place] = key + b": " + json.dumps(draw.choice(KINDS)).encode()
        return b"\n".join(parts) + b"\n"
    places: list[tuple] = []

    def walk(node: object) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(value)

    walk(content)
    if places:
        node, key = draw.choice(places)
        node[key] = draw.choice(KINDS)
    text = json.dumps(content if places else draw.choice(KINDS)).encode()
    return b"\n".join([*parts[:number], text, *parts[number + 1 :]]) + b"\n" if is_lines else text


def garbage(_: bytearray, draw: random.Random) -> bytes:
    return draw.choice((b"", draw.randbytes(300), b"[" * 5000, b"null", b"[]", b"{}", b"9" * 9000, b"\x1b]0;x\x07"))


BYTES: list[tuple[Callable[[bytearray, random.Random], bytes], int]] = [
    *((flip, 6), (cut, 2), (drop, 3), (insert, 3), (digit, 4), (lines, 3), (kind, 5), (garbage, 1))
]


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in place; return how."""
    whole = path.read_bytes()
    if draw.random() < 0.04:  # another kind of file
        how = draw.choice(("missing", "folder", "pipe", "link"))
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to("/etc/passwd")
        return how
    how = draw.choices([act for act, _ in BYTES], [weight for _, weight in BYTES])[0]
    path.write_bytes(how(bytearray(whole), draw) if whole else draw.randbytes(5))
    return how.__name__


# What a command has done


def result_of(command: str, folder: Path) -> object:
    """Return what a user takes from a command: its numbers, without times."""
    if command == "resume":
        run, newest = folder / "runs/stopped", ""
        for path in sorted((run / "checkpoints").glob("step-*.safetensors"))[-1:]:
            with safetensors.safe_open(path, framework="pt") as file:
                newest = hashlib.sha256(b"".join(file.get_tensor(k).numpy().tobytes() for k in sorted(file.keys()))).hexdigest()
        texts = [(run / name).read_text().splitlines() for name in ("metrics.jsonl", "journal.jsonl")]
        logs = [[{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text] for text in texts]
        return newest, json.loads((run / "accuracy.json").read_text())["rows"], logs
    if command == "report":
        return {path.name: path.read_text() for path in sorted((folder / "report").rglob("*.*")) if path.suffix in (".csv", ".md")}
    return (folder / "stdout").read_text()


def warned(command: str, folder: Path) -> bool:
    said = (folder / "stderr").read_text(errors="replace") + (folder / "stdout").read_text(errors="replace")
    if command == "report":
        said += (
            (folder / "report/report.md")
            .read_text()
            .replace("could not read", "warning: could not read")
            .replace("not complete", "warning")
        )
    return "warning" in said.lower()


def run(command: str, cfg: Config, folder: Path) -> int:
    """Start a command in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        COMMANDS[command](cfg)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except (OSError, ValueError, RuntimeError) as error:
        if command == "build":  # its command line turns these into one line
            print(f"error: {error}", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def judge(command: str, folder: Path, code: int | None, reference: object) -> str:
    if code is None:
        return "hang"
    said = (folder / "stderr").read_text(errors="replace")
    if "Traceback" in said or code < 0 or (code and "rror" not in said and "DIFFERENT" not in said):
        return "traceback"
    if code:
        return "clear error"
    try:
        if result_of(command, folder) == reference:
            return "no effect"
    except Exception as error:
        return f"silently wrong ({type(error).__name__})"[:14] if not warned(command, folder) else "recovered"
    return "recovered" if warned(command, folder) else "silently wrong"


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a process, or None after killing one that does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


# The undamaged files


def write_base(cfg: Config) -> None:
    """Write runs/done, runs/other, runs/stopped with steps after its checkpoint, the shards and raw images; in the working directory."""
    import dataclasses
    import tarfile

    from tests.helpers.shards import png

    def named(name: str, seed: int = 0) -> Config:
        return dataclasses.replace(cfg, seed=seed, run=dataclasses.replace(cfg.run, name=name))

    for class_id in range(3):
        for number in range(4):
            path = Path(f"source/pictures/class{class_id}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(8, class_id, number))
    names = [{"folder": f"class{class_id}", "name": f"name {class_id}"} for class_id in range(3)]
    Path("source/names.json").write_text(json.dumps(names))
    with tarfile.open("source/pictures.tar", "w") as tar:
        tar.add("source/pictures", "pictures")
    for name, seed in (("done", 0), ("other", 1)):
        train.run_and_report(named(name, seed))
    whole, calls = HybridStep.__call__, []

    def stopped(self: HybridStep, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 8:  # in the second task, one step after a checkpoint and two after the one before
            os._exit(0)
        return whole(self, *arguments, **options)

    HybridStep.__call__ = stopped  # type: ignore[method-assign]
    train.run_and_report(named("stopped"))


def prepare(cfg: Config, base: Path, commands: list[str], seconds: float) -> dict[str, object]:
    """Write the base and return the result of every command on it."""
    COMMANDS["base"] = write_base
    base.mkdir()
    code = wait(run("base", cfg, base), 10 * seconds)
    if code != 0:
        raise RuntimeError(f"the undamaged runs have failed: {(base / 'stderr').read_text()[-2000:]}")
    (base / "runs/stopped/trackers.json").write_text("{}")
    references = {}
    for command in commands:
        folder = base.with_name(f"reference-{command}")
        shutil.copytree(base, folder)
        if code := wait(run(command, cfg, folder), 10 * seconds):
            raise RuntimeError(f"{command} has failed on undamaged files: {(folder / 'stderr').read_text()[-2000:]}")
        references[command] = result_of(command, folder)
    return references


def case(number: int, only: str | None) -> tuple[random.Random, str, str]:
    """Return the generator, the file pattern and the command of an input."""
    draw = random.Random(number)
    places = [target for target in TARGETS if only is None or (target.split("/")[0] in DATA) == (only == "data")]
    target = draw.choice(places)
    return draw, target, draw.choice(TARGETS[target])


def fuzz(first: int, inputs: int, seconds: float, only: str | None = None, keep: Path | None = None, minutes: float = 1e9) -> Counter:
    """Return how often each outcome occurred, by (file, outcome). Prints each bad one."""
    torch.set_num_threads(1)
    outcomes: Counter = Counter()
    begun = time.monotonic()
    cfg = compose_config([*OPTIONS, "run.name=stopped"])
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        commands = sorted({case(number, only)[2] for number in range(first, first + inputs)})
        references = prepare(cfg, base, commands, seconds)
        for number in range(first, first + inputs):
            if time.monotonic() - begun > 60 * minutes:
                break
            draw, target, command = case(number, only)
            folder = (keep or Path(temporary)) / f"input-{number}"
            shutil.copytree(base, folder)
            path = draw.choice(sorted(folder.glob(target)) or [folder / target])
            path.parent.mkdir(exist_ok=True)
            path.exists() or path.write_text("{}")
            how = damage(path, draw)
            outcome = judge(command, folder, wait(run(command, cfg, folder), seconds), references[command])
            outcomes[target, outcome] += 1
            if outcome in BAD:
                said = (folder / "stderr").read_text(errors="replace").strip().splitlines()[-1:]
                print(f"input {number}: {how} of {path.relative_to(folder)}, {command}: {outcome} {said}", flush=True)
            if not keep:
                shutil.rmtree(folder)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/fuzz.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first input (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="a command that takes longer hangs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="no more inputs after so long, however few (default: %(default)s)")
    parser.add_argument("--only", choices=("run", "data"), help="only files of run folders, or only data")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the files of every input there")
    options = parser.parse_args()
    begun = time.monotonic()
    outcomes = fuzz(options.first, options.inputs, options.seconds, options.only, options.keep, options.minutes)
    total: Counter = Counter()
    for (target, outcome), count in sorted(outcomes.items()):
        total[outcome] += count
        print(f"{target:30} {outcome:15} {count}")
    print(
        f"{total.total()} inputs in {(time.monotonic() - begun) / 60:.1f} minutes: {', '.join(f'{n} {o}' for o, n in total.most_common())}"
    )
    sys.exit(1 if any(total[outcome] for outcome in BAD) else 0)


if __name__ == "__main__":
    main()

"""Damage the files that the program reads, run the command that reads them, and sort the outcomes: `python tools/fuzz.py --inputs 2000`.

    unchanged         the result is that of the undamaged file
    clear error       the command ends with a message that names what is wrong
    unclear error     the message does not name the damaged file
    recovered         the command names the file that it left out, and goes on; a resume then ends with the same parameters and counts
    other content     the file is valid and says something else: its checksum was mended, or its format has none (JPEG, a list of names)
    traceback         an error that the program did not expect, or a crash
    hang              no end within --seconds, of the clock or of the CPU
    memory            more than 1 GiB above the start
    leak              a secret, a foreign file or an escape code in what was printed, or a command that ran
    silently wrong    another result, and not a word

Every input is a function of its number and of the undamaged files, which stay in --folder. A second call there goes on where the first one
stopped. `--first 17 --inputs 1 --keep --folder F` repeats number 17 and leaves its files in F/input-17. Exit status 1 if one of the
bad ones occurs. Each input runs in a fork of this process, which has imported everything.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tiny CLIP of the tests

import numpy as np
import safetensors
import torch
from PIL import Image

from dist_vlcl import train
from dist_vlcl.commands import evaluate, export, predict, replay, report, verify
from dist_vlcl.config import Config, compose_config
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, decode, make_shards, read_shard, write_shards
from dist_vlcl.report.records import read_units
from dist_vlcl.step import HybridStep
from tests.helpers import mutate, warm  # noqa: F401
from tests.helpers.shards import png, raw_set
from tests.helpers.tiny_clip import architecture

OPTIONS = ["data=folder", "data.name=tiny", f"model.name={architecture(2, 2)}", "model.pretrained=random", "orders=dual_all"]
OPTIONS += ["tasks.num_tasks=2", "train.epochs=1", "train.batch_size=6", "train.warmup_steps=1", "eval.zero_shot=false"]
OPTIONS += ["run.trackers=[]", "run.progress=false", "run.plots=false", "run.save_every_steps=2"]
STOP_AT = 8  # the step in which runs/stopped ends: in the second task, one step after a checkpoint
BAD = ("unclear error", "traceback", "hang", "memory", "leak", "silently wrong")
TIMES = ("time", "seconds", "data_seconds", "images_per_second", "crc", "name")
CANARY = "canary-5f1e9c"  # the value of an environment variable that hostile files ask for
LEAKS = (CANARY.encode(), b"root:x:", b"\x1b[", b"\x1b]")
MEMORY, ADDRESSES = 1 << 30, 6 << 30  # bytes above the start: allowed; refused by the system
NAMES = {  # files that a command line names, and what a message may name in their place
    "split.txt": ("split_file",),
    "names.json": ("class_names",),
}
Parts = dict[str, Any]  # of a result, each comparable

# Commands: each runs in a folder that holds runs/done, runs/stopped, runs/other, export/, data/ and source/, and returns its result


def by_words(main: Callable[[], None], *words: str) -> None:
    sys.argv = list(words)
    main()


def printed(_: Config) -> Parts:
    sys.stdout.flush()
    return {"printed": Path("stdout").read_text()}


def resume(cfg: Config) -> Parts:
    train.run_and_report(cfg)
    run = Path("runs/stopped")
    newest = max((run / "checkpoints").glob("step-*.safetensors"))
    with safetensors.safe_open(newest, framework="pt") as file:
        tensors = b"".join(file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys()))
    accuracy = json.loads((run / "accuracy.json").read_text())
    logs = {name: (run / name).read_text().splitlines() for name in ("metrics.jsonl", "journal.jsonl")}
    kept = {name: [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines] for name, lines in logs.items()}
    try:
        units = str(read_units(run).to_pydict())
    except ValueError as error:  # a resume leaves older records unread; whoever reads them is told
        units = print(error, file=sys.stderr)
    counts = {key: accuracy.get(key) for key in ("rows", "last", "avg", "forgetting", "steps", "complete")}
    return {"tensors": [newest.name, digest(tensors)], "accuracy": counts, "units": units, **kept}


def evaluate_run(cfg: Config) -> Parts:
    by_words(evaluate.main, "evaluate", "runs/done", "--json")
    return printed(cfg)


def evaluate_elsewhere(cfg: Config) -> Parts:
    by_words(evaluate.main, "evaluate", "runs/done", "--data", "data/tiny", "--json")
    return printed(cfg)


def replay_run(cfg: Config) -> Parts:
    by_words(replay.main, "replay", "runs/done", "--output", "replayed")
    return {**printed(cfg), "tensors": digest(Path("replayed").read_bytes())}


def report_runs(_: Config) -> Parts:
    by_words(report.main, "report", "runs/done", "runs/other")
    parts: Parts = {path.name: path.read_text() for path in sorted(Path("report").rglob("*.*")) if path.suffix in (".csv", ".md")}
    return {**parts, "other": [line for line in parts["runs.csv"].splitlines() if line.startswith("other,")]}


def export_run(_: Config) -> Parts:
    by_words(export.main, "export", "runs/done", "--out", "exported")
    return {path.name: digest(path.read_bytes()) for path in sorted(Path("exported").iterdir())}


def predict_image(cfg: Config) -> Parts:
    by_words(predict.main, "predict", "export", "image.png", "--json")
    return printed(cfg)


def verify_shards(cfg: Config) -> Parts:
    verify.run(cfg)
    return content_of(Index.load("data/tiny"))


def build(*options: str) -> Callable[[Config], Parts]:
    def run(_: Config) -> Parts:
        words = ["data=folder", "data.name=built", "data.test_fraction=0.5", "data.encoding=pixels", "data.root=.", *options]
        return content_of(make_shards(compose_config(words).data))

    return run


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def content_of(index: Index) -> Parts:
    """Return the names of the classes, and the pixels of every image under its label and key."""
    parts: Parts = {"names": index.class_names}
    for split, classes in index.shards.items():
        for class_id, shards in enumerate(classes):
            for shard in shards:
                for key, image in read_shard(index, shard):
                    parts[f"{split} {class_id} {key}"] = digest(decode(image, key).tobytes())
    return parts


COMMANDS: dict[str, Callable[[Config], Parts]] = {
    "resume": resume,
    "evaluate": evaluate_run,
    "evaluate --data": evaluate_elsewhere,
    "replay": replay_run,
    "report": report_runs,
    "export": export_run,
    "predict": predict_image,
    "verify": verify_shards,
    "build a folder": build("data.source=source/pictures"),
    "build with names": build("data.source=source/pictures", "data.class_names=source/names.json"),
    "build with a split": build("data.source=source/pictures", "data.split_file=source/split.txt"),
    "build and skip": build("data.source=source/pictures", "data.on_error=skip"),
    "build a tar": build("data.source=source/pictures.tar"),
    "build a zip": build("data.source=source/pictures.zip"),
}
STRICT = {"resume": ("tensors", "accuracy"), "report": ("other",)}  # what no damage of one file may change, warned or not


# Damage


@dataclass(frozen=True)
class Target:
    """Files that commands read, and how they are damaged."""

    files: str
    commands: tuple[str, ...]
    mutators: tuple[mutate.Mutator, ...]
    free: Callable[[Path, str], bool] = lambda path, part: False  # whether no checksum protects a part of the result


def shard_and_index(content: bytes, draw: random.Random) -> bytes:
    """Mutate a shard. `damage` mends the index."""
    return draw.choice((mutate.tar_header_mutated, mutate.mutated))(content, draw)


def index_without_digest(content: bytes, draw: random.Random) -> bytes:
    return mutate.json_text_mutated(json.dumps({k: v for k, v in json.loads(content).items() if k != "digest"}).encode(), draw)


def png_header_mutated(content: bytes, draw: random.Random) -> bytes:
    """Change size, depth or colour type of a PNG and mend the checksum: a decompression bomb, for example."""
    import zlib

    header = bytearray(content[12:29])
    place = draw.randrange(4, 17)
    header[place] = draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 0x7F, 0xFF))
    return content[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, "big") + content[33:]


MENDED = (mutate.tar_header_mutated, mutate.resealed, shard_and_index, index_without_digest, png_header_mutated)
BYTES, TEXT = (mutate.mutated,), (mutate.text_mutated, mutate.mutated)
YAML = (mutate.yaml_mutated, mutate.yaml_mutated, *TEXT)
SEALED = (mutate.json_text_mutated, mutate.json_text_mutated, mutate.resealed, *TEXT)
LINES = (mutate.json_line_mutated, mutate.line_moved, mutate.resealed, *TEXT)


def anything(_: Path, __: str) -> bool:
    return True


def names_only(_: Path, part: str) -> bool:
    return part == "names"


def own_pixels(path: Path, part: str) -> bool:
    """A JPEG or WebP has no checksum: its pixels may change, and nothing else."""
    return path.suffix != ".png" and part.endswith(f" {path.parent.name}/{path.stem}")


TARGETS = (
    Target("runs/stopped/config.yaml", ("resume",), YAML),
    Target("runs/stopped/env.json", ("resume",), SEALED),
    Target("runs/stopped/metrics.jsonl", ("resume",), LINES),
    Target("runs/stopped/journal.jsonl", ("resume",), LINES),
    Target("runs/stopped/accuracy.json", ("resume",), SEALED),
    Target("runs/stopped/trackers.json", ("resume",), SEALED),
    Target("runs/stopped/classes.json", ("resume",), SEALED),
    Target("runs/stopped/units/*", ("resume",), BYTES),
    Target("runs/stopped/checkpoints/*", ("resume",), BYTES),
    Target("runs/done/config.yaml", ("report", "evaluate", "replay", "export"), YAML),
    Target("runs/done/accuracy.json", ("report", "export"), SEALED),
    Target("runs/done/metrics.jsonl", ("report",), LINES),
    Target("runs/done/journal.jsonl", ("report", "replay"), LINES),
    Target("runs/done/units/*", ("report",), BYTES),
    Target("runs/done/checkpoints/*", ("evaluate", "replay", "export"), BYTES),
    Target("runs/done/classes.json", ("evaluate", "export"), SEALED, anything),
    Target("export/config.yaml", ("predict",), YAML, anything),
    Target("export/classes.json", ("predict",), SEALED, anything),
    Target("export/adapters.safetensors", ("predict",), BYTES),
    Target("image.png", ("predict",), (*BYTES, png_header_mutated)),
    Target("data/tiny/index.json", ("evaluate", "evaluate --data", "verify", "resume"), (mutate.json_text_mutated, *TEXT)),
    Target("data/tiny/index.json", ("evaluate", "evaluate --data", "verify"), (index_without_digest,)),
    Target("data/tiny/*/0001-*", ("evaluate", "evaluate --data", "verify", "resume"), (*BYTES, mutate.tar_header_mutated)),
    Target("data/tiny/*/0001-*", ("evaluate", "evaluate --data", "verify"), (shard_and_index,)),
    Target("source/pictures/*/*", ("build a folder", "build and skip"), BYTES, own_pixels),
    Target("source/pictures/*/*.png", ("build a folder", "build and skip"), (png_header_mutated,)),
    Target("source/pictures.tar", ("build a tar",), (*BYTES, mutate.tar_header_mutated)),
    Target("source/pictures.zip", ("build a zip",), BYTES),
    Target("source/names.json", ("build with names",), (mutate.json_text_mutated, *TEXT), names_only),
    Target("source/split.txt", ("build with a split",), TEXT, anything),
)


def damage(path: Path, mutators: tuple[mutate.Mutator, ...], draw: random.Random) -> str:
    """Damage a file in place; return how."""
    if draw.random() < 0.03 and path.name not in NAMES:  # another kind of file; a user may name a link or a pipe
        how = draw.choice(("missing", "folder", "pipe", "link"))
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to("/etc/passwd")
        return how
    how = draw.choice(mutators)
    content = how(path.read_bytes(), draw)
    path.write_bytes(content)
    if how is shard_and_index:
        mend_index(path, content)
    return how.__name__


def mend_index(path: Path, content: bytes) -> None:
    """Write size and digest of a shard into its index."""
    folder = path.parents[1]
    index = json.loads((folder / "index.json").read_text())
    del index["digest"]
    for entry in (entry for split in index["shards"].values() for of_class in split for entry in of_class):
        if folder / entry["path"] == path:
            entry |= {"bytes": len(content), "sha256": digest(content)}
    (folder / "index.json").write_text(json.dumps(index))


def case(number: int) -> tuple[random.Random, Target, str]:
    """Return the generator, the target and the command of an input."""
    draw = random.Random(number)
    target = draw.choice(TARGETS)
    return draw, target, draw.choice(target.commands)


# What a command has done


def start(command: str, cfg: Config, folder: Path, seconds: float) -> int:
    """Start a command in a fork; return its process id. The fork writes result.json after a success."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ["CANARY"] = CANARY
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        result = COMMANDS[command](cfg)
        Path("result.json").write_text(json.dumps(result, default=str))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except (OSError, ValueError, RuntimeError) as error:
        if command.startswith("build"):  # their command line turns these into one line
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


def wait(pid: int, seconds: float) -> tuple[int | None, int]:
    """Return the exit code of a process, None if it had to be killed, and the most memory that it had, in bytes."""
    deadline, killed = time.monotonic() + seconds, False
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if killed or code == -signal.SIGXCPU else code, used.ru_maxrss * 1024
        if time.monotonic() > deadline and not killed:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.005)


def said_by(folder: Path) -> list[str]:
    texts = [folder / name for name in ("stdout", "stderr", "report/report.md")]
    return [line for path in texts if path.exists() for line in path.read_text(errors="replace").splitlines()]


def leaks(folder: Path) -> bool:
    texts = [folder / name for name in ("stdout", "stderr", "report/report.md", "report/report.html")]
    return (folder / "hacked").exists() or any(leak in path.read_bytes() for path in texts if path.exists() for leak in LEAKS)


def judge(command: str, folder: Path, code: int | None, reference: Parts, path: Path, is_free: Callable[[str], bool]) -> str:
    """Return the outcome of a command that read a damaged file. `is_free`: whether a part of the result may differ in silence."""
    if code is None:
        return "hang"
    said = said_by(folder)
    if leaks(folder):
        return "leak"
    if any("Traceback" in line for line in said) or code < 0:
        return "traceback"
    group = {"runs": path.parts[1:2], "data": ("other data",)}.get(path.parts[0], ())
    names = {path.name, *NAMES.get(path.name, ()), *group}
    is_named = any(name in line for line in said if line not in reference["said"] for name in names)
    if code:
        return "clear error" if is_named else "unclear error"
    result = json.loads((folder / "result.json").read_text())
    different = [part for part in (reference.keys() | result.keys()) - {"said"} if result.get(part) != reference.get(part)]
    if not different:
        return "unchanged"
    if is_named and not set(different) & set(STRICT.get(command, ())):
        return "recovered"
    return "other content" if all(map(is_free, different)) else "silently wrong"


# The undamaged files


def write_sources() -> None:
    """Write the same images as a folder with every format, a tar of PNGs and a zip, with a list of names and a split."""
    for class_id in range(3):
        for number in range(4):
            image = Image.open(io.BytesIO(png(8, class_id, number)))
            path = Path(f"source/pictures/class{class_id}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            if number == 1:
                image.save(path.with_suffix(".jpg"), exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")  # turned
            elif number == 2:
                image.save(path.with_suffix(".webp"))
            elif number == 3:
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
            else:
                image.save(path)
    names = [{"folder": f"class{class_id}", "name": f"name {class_id}"} for class_id in range(3)]
    Path("source/names.json").write_text(json.dumps(names))
    images = sorted(path.relative_to("source/pictures").as_posix() for path in Path("source/pictures").rglob("*.*"))
    split = {"train": images[::2], "test": images[1::2]}
    Path("source/split.txt").write_text("".join(f"{line}\n" for name, lines in split.items() for line in (name, *lines)))
    with tarfile.open("source/pictures.tar", "w") as tar, zipfile.ZipFile("source/pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in images:
            archive.write(f"source/pictures/{name}", name)
            if name.endswith(".png"):
                tar.add(f"source/pictures/{name}", name)


def write_base(cfg: Config) -> Parts:
    """Write all undamaged files into the working directory. runs/stopped has one step after its newest checkpoint."""

    def named(name: str, seed: int = 0) -> Config:
        return dataclasses.replace(cfg, seed=seed, run=dataclasses.replace(cfg.run, name=name))

    write_sources()
    Path("image.png").write_bytes(png(16, "image"))
    write_shards(raw_set(4, 12, 4, 16), DataConfig("tiny", "folder", samples_per_shard=6, encoding="original"))
    for name, seed in (("done", 0), ("other", 1)):
        train.run_and_report(named(name, seed))
    by_words(export.main, "export", "runs/done", "--out", "export")
    whole, calls = HybridStep.__call__, []

    def stopped(self: HybridStep, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == STOP_AT:
            Path("runs/stopped/trackers.json").write_text("{}")
            os._exit(0)
        return whole(self, *arguments, **options)

    HybridStep.__call__ = stopped  # type: ignore[method-assign]
    train.run_and_report(named("stopped"))
    raise AssertionError("the run did not come to its step")


def result_of(command: str, cfg: Config, base: Path, seconds: float) -> Parts:
    """Return the result of a command on the undamaged files."""
    folder = base.with_name("reference")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    if wait(start(command, cfg, folder, 10 * seconds), 10 * seconds)[0]:
        raise RuntimeError(f"{command} has failed on undamaged files: {(folder / 'stderr').read_text()[-2000:]}")
    return {**json.loads((folder / "result.json").read_text()), "said": said_by(folder)}


def prepare(cfg: Config, base: Path, seconds: float) -> None:
    """Write the undamaged files, unless an earlier call has."""
    if base.exists():
        return
    aside = base.with_name("base.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    COMMANDS["base"] = write_base
    if wait(start("base", cfg, aside, 10 * seconds), 10 * seconds)[0]:
        raise RuntimeError(f"the undamaged runs have failed: {(aside / 'stderr').read_text()[-2000:]}")
    aside.rename(base)


def try_input(number: int, cfg: Config, base: Path, references: dict[str, Parts], seconds: float) -> dict[str, Any]:
    """Run one input in base/../input-NUMBER; return what happened."""
    draw, target, command = case(number)
    if command not in references:
        references[command] = result_of(command, cfg, base, seconds)
    folder = base.with_name(f"input-{number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    path = draw.choice(sorted(folder.glob(target.files)))
    how, begun = damage(path, target.mutators, draw), time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    code, used = wait(start(command, cfg, folder, seconds), seconds)
    inside = path.relative_to(folder)
    # A run may lack results, and records of the steps that a resume has taken from the journal: a missing file of these is no damage.
    is_optional = inside.name == "accuracy.json" or inside.parent.name == "units"
    is_free = how in {mutator.__name__ for mutator in MENDED} or (how == "missing" and is_optional)
    outcome = judge(command, folder, code, references[command], inside, lambda part: is_free or target.free(inside, part))
    outcome = "memory" if used > memory + MEMORY else outcome
    said = [line for line in said_by(folder) if line not in references[command]["said"]]
    return {"input": number, "file": str(inside), "target": target.files, "how": how, "command": command, "outcome": outcome} | {
        "seconds": round(time.monotonic() - begun, 2),
        "said": " | ".join(said)[-300:],
    }


def fuzz(folder: Path, first: int, inputs: int, seconds: float, keep: bool = False, minutes: float = 1e9) -> list[dict[str, Any]]:
    """Return what happened with each input, also of earlier calls. Prints each bad one."""
    torch.set_num_threads(1)
    begun, base, references = time.monotonic(), folder / "base", {}
    cfg = compose_config([*OPTIONS, "run.name=stopped"])
    prepare(cfg, base, seconds)
    report.run_frame([base / "runs/done"]), report.paper_runs()  # what they read is cached, and forks have it then
    results = folder / "results.jsonl"
    known = {one["input"]: one for one in map(json.loads, results.read_text().splitlines())} if results.exists() and not keep else {}
    found, shown = [], begun
    for number in range(first, first + inputs):
        if time.monotonic() - begun > 60 * minutes:
            break
        if number not in known:
            known[number] = try_input(number, cfg, base, references, seconds)
            if not keep:
                shutil.rmtree(folder / f"input-{number}")
                with results.open("a") as file:
                    file.write(json.dumps(known[number]) + "\n")
        found.append(known[number])
        if keep or known[number]["outcome"] in BAD:
            print("input {input}: {how} of {file}, {command}: {outcome} ({said})".format(**known[number]), flush=True)
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"{len(found)} of {inputs} inputs, {sum(one['outcome'] in BAD for one in found)} bad", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/fuzz.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first input (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="a command that takes longer hangs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="no more inputs after so long, however few (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where files and results stay (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="run all inputs again, and leave their files")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        found = fuzz(folder, options.first, options.inputs, options.seconds, options.keep, options.minutes)
    for (target, outcome), count in sorted(Counter((one["target"], one["outcome"]) for one in found).items()):
        print(f"{target:30} {outcome:15} {count}")
    total = Counter(one["outcome"] for one in found).most_common()
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(found)} inputs in {minutes:.1f} minutes: {', '.join(f'{count} {outcome}' for outcome, count in total)}")
    sys.exit(1 if any(outcome in BAD for outcome, _ in total) else 0)


if __name__ == "__main__":
    main()

"""Benchmarks and counted costs:  python -m benchmarks COMMAND [OPTIONS]   (--help lists them)"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import eval as evaluation
from benchmarks import growth, memory, noise, probes, scale, slope, step, stream, switch, wire
from benchmarks.pictures import PICTURES, png, write_picture
from benchmarks.result import Result, machine_line

COMMANDS: dict[str, ModuleType] = {
    "step": step,
    "memory": memory,
    "wire": wire,
    "noise": noise,
    "slope": slope,
    "stream": stream,
    "scale": scale,
    "growth": growth,
    "eval": evaluation,
    "switch": switch,
    "probes": probes,
}
EXAMPLES = """examples:
  python -m benchmarks step --images 4 --classes 4          naive and fast, turn by turn
  python -m benchmarks step --orders all --count            FLOPs of every setting, on any machine
  python -m benchmarks docs docs/PERFORMANCE.md             run every benchmark named in a file again, rewrite tables, pictures
Each writes its result to bench/COMMAND.json (--json FILE) and prints its tables."""
MARKED = re.compile(r"<!-- bench: (?P<command>[^\n]+) -->\n.*?<!-- /bench -->", re.DOTALL)


def main(arguments: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "docs":
            rewrite(Path(args.file), args.only)
            return
        result = COMMANDS[args.command].run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    result.write(Path(args.json or f"bench/{args.command}.json"), shlex.join(arguments))
    draw_if_asked(args, result)
    print(described(result))


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first_line = str(module.__doc__).split(":")[0].strip().rstrip(".").replace("\n", " ")
        command = commands.add_parser(name, help=first_line, description=module.__doc__, epilog=module.EXAMPLES, formatter_class=raw)
        module.add_arguments(command)
        command.add_argument("--json", help=f"where to write the result (default: bench/{name}.json)")
        if name in PICTURES:
            command.add_argument("--picture", type=png, metavar="FILE.png", help="draw the table, too (default: no picture)")
    docs = commands.add_parser(
        "docs", help="run every benchmark that a Markdown file names again, and rewrite its tables and pictures in place"
    )
    docs.add_argument("file", nargs="?", default="docs/PERFORMANCE.md", help="(default: %(default)s)")
    docs.add_argument("--only", default="", help="the tables whose command begins so, such as 'step --count'")
    return parser


def draw_if_asked(args: argparse.Namespace, result: Result) -> None:
    if getattr(args, "picture", None):
        write_picture(args.picture, PICTURES[args.command](result))


def described(result: Result) -> str:
    return f"{result.markdown()}\n\n*{machine_line()}*"


def rewrite(file: Path, only: str = "") -> None:
    """Replace what stands between `<!-- bench: COMMAND OPTIONS -->` and `<!-- /bench -->` by the result of that command.

    A command that names no device runs on the CPU. What this machine cannot run (no GPU, or one for two ranks) is left as it stands. Every
    table is written as soon as it is there.
    """
    text = file.read_text()
    commands = [match["command"] for match in MARKED.finditer(text)]
    if not commands:
        raise ValueError(f"{file}: names no benchmark; write <!-- bench: step --count --> and <!-- /bench --> on lines of their own")
    for number, command in enumerate(commands, 1):
        if not command.startswith(only):
            continue
        print(f"{number}/{len(commands)}  python -m benchmarks {command}", flush=True)
        args = build_parser().parse_args(shlex.split(command))
        if args.device == "auto":
            args.device = "cpu"
        try:
            result = COMMANDS[args.command].run(args)
        except ValueError as error:
            print(f"  left as it stands: {error}", flush=True)
            continue
        block = f"<!-- bench: {command} -->\n\n{described(result)}\n\n<!-- /bench -->"
        text = file.read_text()  # a person may have written in it meanwhile
        old = next(m[0] for m in MARKED.finditer(text) if m["command"] == command)
        file.write_text(text.replace(old, block))
        draw_if_asked(args, result)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The command `dist-vlcl NAME ...`, which is also `python -m dist_vlcl NAME ...`."""

import importlib
import sys
from typing import Any

COMMANDS = {
    "train": ("train", "train on a sequence of tasks"),
    "data": ("commands.build_data", "write the shards of a data set"),
    "verify": ("commands.verify", "verify the checksums of shards"),
    "evaluate": ("commands.evaluate", "evaluate a run again, or on other data"),
    "predict": ("commands.predict", "classify image files"),
    "export": ("commands.export", "export a run for the Hugging Face Hub, or (LoRA) for open_clip"),
    "report": ("commands.report", "compare runs in one page"),
    "sweep": ("commands.sweep", "train many runs: of the paper, or combinations of options"),
    "tune": ("commands.tune", "choose zeroth-order options"),
    "replay": ("commands.replay", "rebuild zeroth-order units from the journal"),
    "launch-files": ("commands.launch_files", "copy the scripts for several machines and Slurm"),
}


def main() -> Any:
    """Run a command. Exit status 2 if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"dist-vlcl {name}"]
        sys.path.append("")  # code of the user in the working directory, as with python -m
        try:
            command = importlib.import_module(f"dist_vlcl.{COMMANDS[name][0]}")
        except ModuleNotFoundError as error:
            print(f"error: dist-vlcl {name}: {error.name} is not installed: pip install 'dist-vlcl[report]'", file=sys.stderr)
            sys.exit(2)
        try:
            return command.main()
        except KeyboardInterrupt:
            sys.exit("stopped")
    if name not in ("--help", "-h"):
        print(f"error: {name}: no such command; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    print("usage: dist-vlcl COMMAND ...; dist-vlcl COMMAND --help explains a command\n")
    print("\n".join(f"  {command:14}{meaning}" for command, (_, meaning) in COMMANDS.items()))


if __name__ == "__main__":
    main()

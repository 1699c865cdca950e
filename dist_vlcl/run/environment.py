"""Which code ran where, so that every number can be traced to the code that produced it."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dist_vlcl import __version__
from dist_vlcl.masking import masked_command

ELASTIC = "DIST_VLCL_ELASTIC"  # the environment variable that launch/elastic.sh sets


def describe_environment() -> dict[str, Any]:
    """Return versions, host, code and command line of this process; no environment variables, since they may hold secrets."""
    code = {"command": masked_command(sys.argv), "code": code_version(Path(__file__).parent), "packages": installed_packages()}
    machine = {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine, "cuda": torch.version.cuda, "accelerators": gpus, **code}


@cache
def installed_packages() -> dict[str, str]:
    """Return the version of every installed package. Reading them takes a second."""
    found = (item.metadata for item in importlib.metadata.distributions())
    return dict(sorted((item["Name"], item["Version"]) for item in found if item["Name"]))


def code_digest() -> str:
    """Return the versions of this package and of torch, and a digest of this package's source. Equal code gives equal text."""
    package = Path(__file__).parents[1]
    h = hashlib.blake2b(digest_size=6)
    for file in sorted(package.rglob("*.py")):
        h.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return f"dist_vlcl {__version__} {h.hexdigest()}, torch {torch.__version__}"


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide about pixels, tokens and sums. torch's version is in the code's digest."""
    names = ("accelerate", "deepspeed", "numpy", "open_clip_torch", "pillow", "safetensors", "torchvision")
    return {name: version for name, version in installed_packages().items() if name.lower() in names}


def code_version(folder: Path) -> str | None:
    """Return the git commit of the code in a folder, with -dirty if files have changed; None if git does not track the code."""
    # An installed package may lie inside another project's repository, which then tracks none of its files.
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if _git(folder, "ls-files", ".") else None


def is_restart() -> bool:
    """Whether a scheduler or launcher has started this job again with the first command line.

    Under launch/elastic.sh every start may be one: torch does not count the restarts after a change of machines.
    """
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", ELASTIC))


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip() or None
    return None

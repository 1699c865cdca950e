"""Checkpoints: one safetensors file per checkpoint, which is complete or absent.

`checkpoints/step-00000123.safetensors` holds tensors by name. Its metadata hold the state and the identity of the run as JSON, and a
SHA-256 of everything.

A file is written under another name, read back, and renamed. `load_newest` checks the SHA-256: safetensors loads a flipped bit silently.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from dist_vlcl.masking import explained
from dist_vlcl.reading import parse_json, warn
from dist_vlcl.run.files import make_folder, replace_file

NAME = re.compile(r"step-(\d{8,})\.safetensors")
DAMAGE = (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # as damaged bytes decide


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step, verified."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    identity: dict[str, str] = field(default_factory=dict)  # digests: "run", "config", "data"; {} before version 0.2


class BrokenCheckpoint(RuntimeError):
    """A checkpoint differs from what was written."""


def save(folder: Path | str, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int, identity: Mapping[str, str]) -> Path:
    """Write the checkpoint of `step` into a run folder, then delete all but the `keep` newest. Rank 0 calls this.

    Raises OSError (a full disk, for example); every earlier checkpoint is then still there. A checkpoint of a later step is deleted, too:
    it was broken, or the run went on from an earlier step.
    """
    path = _path(folder, step)
    make_folder(path.parent)
    # Cloned, since safetensors refuses strided and overlapping tensors, and units may be views of one buffer.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "state": json.dumps(state), "identity": json.dumps(dict(identity))}
    replace_file(path, sealed_tensors(own, metadata), lambda aside: _read(aside, step))
    steps = saved_steps(folder)
    kept = [other for other in steps if other <= step][-keep:]
    for other in set(steps) - set(kept):
        _path(folder, other).unlink()
    for leftover in path.parent.glob("*.tmp"):
        leftover.unlink()
    return path


def load_newest(folder: Path | str, identity: Mapping[str, str] | None = None, before: float = inf) -> Checkpoint | None:
    """Return the newest checkpoint of a run folder that is intact, or None. Warns of each newer one and says what is wrong with it.

    `identity`: what the checkpoint must belong to, as in `load`. One of another run is left out like a damaged one.
    `before`: only checkpoints of earlier steps count.
    """
    skipped, found = [], None
    for step in (step for step in reversed(saved_steps(folder)) if step < before):
        try:
            found = load(folder, step, identity)
            break
        except (BrokenCheckpoint, FileNotFoundError) as error:  # gone: a run that goes on deletes its older ones
            skipped.append(str(error))
    if skipped:
        outcome = f"using {found.path.name} instead" if found else "no intact checkpoint is left"
        warn(f"skipped: {'; '.join(skipped)}; {outcome}")
    return found


def load(folder: Path | str, step: int, identity: Mapping[str, str] | None = None) -> Checkpoint:
    """Return the checkpoint of one step. Raises FileNotFoundError, or BrokenCheckpoint if it is damaged or belongs to another run.

    Raises ValueError if it was saved with another configuration or other data than those of `identity`.
    """
    if step not in saved_steps(folder):
        raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; choose from {saved_steps(folder) or 'none'}")
    found = _read(_path(folder, step), step)
    differing = [key for key, now in (identity or {}).items() if None not in (now, found.identity.get(key)) and now != found.identity[key]]
    if "run" in differing:
        raise BrokenCheckpoint(f"{found.path} belongs to another run")
    if differing:
        other = "another configuration: restore config.yaml" if "config" in differing else "other data: restore the data"
        raise ValueError(f"{found.path} was saved with {other} of this run, or move the run folder away to start anew")
    return found


def saved_steps(folder: Path | str) -> list[int]:
    """Return the steps of the checkpoints in a run folder, intact or not, in ascending order."""
    names = (path.name for path in (Path(folder) / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in map(NAME.fullmatch, names) if match)


def _path(folder: Path | str, step: int) -> Path:
    return Path(folder) / "checkpoints" / f"step-{step:08d}.safetensors"


def sealed_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file with a SHA-256 of tensors and metadata."""
    return tensors_to_bytes(tensors, {**metadata, "sha256": _digest(metadata, tensors)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a sealed file. Raises BrokenCheckpoint, also for a link, a pipe or a device."""
    if path.is_symlink() or not path.is_file():
        raise BrokenCheckpoint(f"{path} is not a regular file")
    open(path, "rb").close()  # raises the reason; safetensors calls every file that it cannot open missing
    with explained(f"{path} cannot be read", kinds=DAMAGE, to=BrokenCheckpoint), safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        is_intact = metadata.pop("sha256", None) == _digest(metadata, tensors)
    if not is_intact:
        raise BrokenCheckpoint(f"{path}: its content differs from its SHA-256")
    return tensors, metadata


def adapters_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters among the tensors of a checkpoint, or all tensors of an export, under the names of Units.state_dict."""
    own = {name.removeprefix("adapters/"): t for name, t in tensors.items() if name.startswith("adapters/")}
    return own or tensors


def _read(path: Path, step: int) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    with explained(f"{path} cannot be read", to=BrokenCheckpoint):
        state, identity = (parse_json(metadata.get(key, "{}"), dict) for key in ("state", "identity"))
    if metadata.get("step") != str(step):
        raise BrokenCheckpoint(f"{path} is the checkpoint of step {metadata.get('step')}")
    return Checkpoint(step, tensors, state, path, identity)


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    h = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        h.update(tensor.flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()

"""Checkpoints that are whole or absent: written aside, digested, renamed, verified, and only then pruned.

checkpoints/latest                              the name of the newest one, for people and scripts
checkpoints/step-00000123/tensors.safetensors   tensors, under flat names
checkpoints/step-00000123/state.json            everything else
checkpoints/step-00000123/manifest.json         size and SHA-256 of the two: safetensors loads a flipped bit silently
checkpoints/step-00000123.old/                  what a second save of the same step is replacing
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from dist_vlcl.run.files import make_folder, replace_file, sync_folder, write_durably

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step, verified."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class BrokenCheckpoint(RuntimeError):
    """A checkpoint that is not what was written."""


def save(folder: Path | str, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of `step` below a run folder, then keep only the `keep` newest; rank 0 calls this.

    Raises OSError (a full disk, say) with every earlier checkpoint intact. A checkpoint of a later step is removed once
    this one is verified: it was passed over as broken, or belongs to a future that the run has left.
    """
    checkpoints = Path(folder) / "checkpoints"
    make_folder(checkpoints)
    _remove_leftovers(checkpoints)
    final = checkpoints / f"step-{step:08d}"
    aside = final.with_name(final.name + ".tmp")
    try:
        _write(aside, step, tensors, state)
        _move_into_place(aside, final)
        replace_file(checkpoints / "latest", final.name + "\n")
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # gives a full disk its space back
        raise
    _verified_files(final)
    _prune(checkpoints, step, keep)
    return final


def load_newest(folder: Path | str) -> Checkpoint | None:
    """The newest checkpoint below a run folder that is whole; warns of each newer one, saying what is wrong with it."""
    skipped = []
    found = None
    for path in _newest_first(Path(folder) / "checkpoints"):
        try:
            found = _read(path)
            break
        except (BrokenCheckpoint, OSError) as error:
            skipped.append(f"{path.name}: {error}")
    if skipped:
        outcome = f"using {found.path.name} instead" if found else "no checkpoint is left to use"
        warnings.warn(f"skipped in {folder}: {'; '.join(skipped)}; {outcome}", RuntimeWarning, stacklevel=2)
    return found


def saved_steps(folder: Path | str) -> list[int]:
    """The steps of the checkpoints below a run folder, whole or not, in order."""
    return sorted({_step_of(path) for path in _newest_first(Path(folder) / "checkpoints")})


def load(folder: Path | str, step: int) -> Checkpoint:
    """The checkpoint of one step; raises FileNotFoundError or BrokenCheckpoint."""
    path = Path(folder) / "checkpoints" / f"step-{step:08d}"
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; there are {saved_steps(folder) or 'none'}")
    return _read(path)


def _write(aside: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    # Cloned, since safetensors refuses overlapping and strided views, and units may be views of a flat buffer.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    files = {TENSORS: tensors_to_bytes(own), STATE: json.dumps(state, indent=1).encode()}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    aside.mkdir()
    for name, data in files.items():
        write_durably(aside / name, data)
    write_durably(aside / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1).encode())
    sync_folder(aside)


def _move_into_place(aside: Path, final: Path) -> None:
    if final.exists():  # a folder is not renamed onto another; until then the old one is loadable as .old
        os.replace(final, final.with_name(final.name + ".old"))
    os.replace(aside, final)
    sync_folder(final.parent)


def _remove_leftovers(checkpoints: Path) -> None:
    for aside in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(aside)
    for old in checkpoints.glob("step-*.old"):
        if _is_whole(old.with_suffix("")):
            shutil.rmtree(old)
        else:  # an interrupted or broken replacement
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            os.replace(old, old.with_suffix(""))


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    kept = 0
    for path in _newest_first(checkpoints):
        is_current = _step_of(path) <= step and not path.name.endswith(".old")
        kept += is_current
        if not is_current or kept > max(keep, 1):
            shutil.rmtree(path)


def _newest_first(checkpoints: Path) -> list[Path]:
    paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
    named = [path for path in paths if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: (_step_of(path), not path.name.endswith(".old")), reverse=True)


def _step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _read(path: Path) -> Checkpoint:
    files = _verified_files(path)
    return Checkpoint(_step_of(path), tensors_from_bytes(files[TENSORS]), json.loads(files[STATE]), path)


def _is_whole(path: Path) -> bool:
    try:
        _verified_files(path)
    except (BrokenCheckpoint, OSError):
        return False
    return True


def _verified_files(path: Path) -> dict[str, bytes]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {name: manifest["files"][name]["sha256"] for name in (TENSORS, STATE)}
        is_ours = manifest["format"] == FORMAT and manifest["step"] == _step_of(path)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenCheckpoint(f"{MANIFEST} cannot be read") from None
    if not is_ours:
        raise BrokenCheckpoint(f"{MANIFEST} is of another format or step")
    return {name: _verified(path / name, digest) for name, digest in entries.items()}


def _verified(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path.name} is missing") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise BrokenCheckpoint(f"{path.name} differs from its SHA-256 ({len(data)} bytes)")
    return data

import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_vlcl.run import checkpoint, files
from dist_vlcl.run.checkpoint import load_newest

save = partial(checkpoint.save, keep=2, identity={})


class Killed(BaseException):
    """The process is gone: no handler runs in a process that was killed."""


def tensors(value: float) -> dict[str, torch.Tensor]:
    flat = torch.full((6,), value)
    return {
        "zo": flat,
        "zo/a": flat[:3],
        "transposed": torch.arange(6.0).view(2, 3).T,
        "zo/b": flat[3:].view(3, 1),
        "half": torch.tensor(value, dtype=torch.bfloat16),
        "rng": torch.arange(5, dtype=torch.uint8),
    }


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def load_without_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_newest(folder)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    saved = tensors(1.25)
    path = save(tmp_path, 123, saved, {"task": 2, "rows": [[1, 2]]})
    found = load_without_warning(tmp_path)
    assert (found.step, found.state, found.path) == (123, {"task": 2, "rows": [[1, 2]]}, path)
    assert found.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert load_without_warning(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, tensors(step), {}, keep=2)
    assert names(tmp_path) == ["step-00000003.safetensors", "step-00000004.safetensors"]


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    save(tmp_path, 5, tensors(1), {"task": 0})
    save(tmp_path, 5, tensors(2), {"task": 1})
    assert load_without_warning(tmp_path).state == {"task": 1}
    assert names(tmp_path) == ["step-00000005.safetensors"]


def count_stages(monkeypatch, die_at: int | None = None) -> list[str]:
    """Count every durable act of a save, and die just before one of them."""
    acts: list[str] = []

    def guarded(name, act):
        def call(*arguments, **options):
            acts.append(name)
            if len(acts) - 1 == die_at:
                raise Killed(f"before {name}, act {die_at}")
            return act(*arguments, **options)

        return call

    for place, name in [(files.os, "replace"), (files.os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "mkdir")]:
        monkeypatch.setattr(place, name, guarded(name, getattr(place, name)))
    return acts


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_that_is_killed_at_any_stage_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, keep, again):
    step = 1 if again else 2
    with monkeypatch.context() as patch:
        save(tmp_path / "whole", 1, tensors(1), {"version": "old"}, keep=keep)
        acts = count_stages(patch)
        save(tmp_path / "whole", step, tensors(2), {"version": "new"}, keep=keep)
    assert len(acts) >= 3
    versions = []
    for die_at in range(len(acts)):
        folder = tmp_path / str(die_at)
        save(folder, 1, tensors(1), {"version": "old"}, keep=keep)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_stages(patch, die_at)
            save(folder, step, tensors(2), {"version": "new"}, keep=keep)
        found = load_without_warning(folder)
        versions.append(found.state["version"])
        assert torch.equal(found.tensors["zo/a"], tensors({"old": 1, "new": 2}[versions[-1]])["zo/a"])
        save(folder, 3, tensors(3), {"version": "next"}, keep=keep)
        assert load_without_warning(folder).state == {"version": "next"}
        assert not [name for name in names(folder) if name.endswith(".tmp")]
    assert versions == sorted(versions, reverse=True) and set(versions) == {"old", "new"}


def flip_a_bit_of_the_tensors(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def change_the_state(path):
    data = path.read_bytes()
    assert data.count(b"a value") == 1
    path.write_bytes(data.replace(b"a value", b"b value"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit_of_the_tensors, "its content differs from its SHA-256"),
        (change_the_state, "its content differs from its SHA-256"),
        (truncate, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tmp_path, damage, reason):
    save(tmp_path, 1, tensors(1), {"key": "a value"})
    damage(save(tmp_path, 2, tensors(2), {"key": "a value"}))
    with pytest.warns(RuntimeWarning, match=f"step-00000002.safetensors:? {reason}.*using step-00000001"):
        assert load_newest(tmp_path).step == 1


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(tmp_path):
    save(tmp_path, 1, tensors(1), {}).rename(tmp_path / "checkpoints/step-00000007.safetensors")
    with pytest.warns(RuntimeWarning, match="step-00000007.* is the checkpoint of step 1"):
        assert load_newest(tmp_path) is None


def test_with_every_checkpoint_damaged_there_is_none_and_a_warning(tmp_path):
    truncate(save(tmp_path, 1, tensors(1), {}))
    with pytest.warns(RuntimeWarning, match="no intact checkpoint is left"):
        assert load_newest(tmp_path) is None


def test_a_checkpoint_of_a_future_that_was_left_does_not_outlive_the_next_save(tmp_path):
    save(tmp_path, 1, tensors(1), {}, keep=1)
    truncate(save(tmp_path, 9, tensors(9), {}, keep=2))
    save(tmp_path, 4, tensors(4), {}, keep=1)
    assert load_without_warning(tmp_path).step == 4


def test_a_full_disk_raises_and_leaves_the_old_checkpoint_and_no_stump(tmp_path, monkeypatch):
    save(tmp_path, 1, tensors(1), {})

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "write_durably", full)
        save(tmp_path, 2, tensors(2), {})
    assert names(tmp_path) == ["step-00000001.safetensors"]
    assert load_without_warning(tmp_path).step == 1


def test_a_write_that_went_wrong_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, tensors(1), {"version": 1}, keep=1)
    with monkeypatch.context() as patch, pytest.raises(checkpoint.BrokenCheckpoint, match="differs"):
        patch.setattr(files, "write_durably", lambda path, data: path.write_bytes(data.replace(b"version", b"versiom")))
        save(tmp_path, 1, tensors(2), {"version": 2}, keep=1)
    assert load_without_warning(tmp_path).state == {"version": 1} and names(tmp_path) == ["step-00000001.safetensors"]


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"tensor": torch.zeros(1)})
    assert names(tmp_path) == []


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path):
    loaded = load_file(save(tmp_path, 1, tensors(1), {}))
    assert torch.equal(loaded["zo"], tensors(1)["zo"])


def test_a_checkpoint_that_cannot_be_opened_now_is_not_called_damaged(tmp_path):
    """safetensors calls every file that it cannot open missing. A run that took it for damage would start anew and delete it."""
    save(tmp_path, 1, tensors(1.0), {})
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    next(tmp_path.rglob("*.safetensors")).chmod(0)
    me = os.geteuid()
    os.seteuid(me or 65534)  # root may read everything
    try:
        with pytest.raises(PermissionError):
            load_newest(tmp_path)
    finally:
        os.seteuid(me)


def test_a_checkpoint_that_this_process_has_no_memory_for_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, tensors(1.0), {})

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "safe_open", no_memory)
    with pytest.raises(MemoryError):
        load_newest(tmp_path)

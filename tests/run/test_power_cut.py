"""Claims about a power cut: whatever the disk had not been waited for is lost, and the run goes on as if it had been stopped earlier."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from dist_vlcl.config import Config
from dist_vlcl.dist.world import World
from dist_vlcl.reading import read_lines
from dist_vlcl.report.records import read_units
from dist_vlcl.run import checkpoint, files
from dist_vlcl.run.files import JsonLines
from dist_vlcl.step import HybridStep
from dist_vlcl.train import train
from tests.helpers.disk import Disk
from tests.helpers.tiny_clip import architecture
from tests.run.test_checkpoint import tensors
from tests.test_train import configured, last_tensors, records

TINY = [f"model.name={architecture(3, 3)}", "model.pretrained=random", "eval.zero_shot=false", "run.save_every_steps=2", "run.keep=1"]


@pytest.fixture
def disk_of(monkeypatch):
    """Follow what is on the disk of a folder."""
    disks: list[Disk] = []

    def follow(folder: Path) -> Disk:
        disks.append(Disk(folder, monkeypatch))
        return disks[-1]

    yield follow
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("unsynced_names", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_power_cut_at_any_stage_of_a_save_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, disk_of, again, unsynced_names):
    run, left, looking = tmp_path / "run", [], []
    checkpoint.save(run, 1, tensors(1), {"version": "old"}, keep=1, identity={})
    disk = disk_of(run)

    def guarded(act):
        def call(*arguments, **options):
            if not looking:  # which makes folders itself
                looking.append(1)
                left.append(disk.left(tmp_path / str(len(left)), unsynced_names))
                looking.clear()
            return act(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for place, name in [(files.os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "unlink"), (os, "mkdir")]:
            patch.setattr(place, name, guarded(getattr(place, name)))
        checkpoint.save(run, 1 if again else 2, tensors(2), {"version": "new"}, keep=1, identity={})
    left.append(disk.left(tmp_path / "after", unsynced_names))
    assert len(left) >= 4
    versions = []
    for folder in left:
        found = checkpoint.load_newest(folder)
        versions.append(found.state["version"])
        assert torch.equal(found.tensors["zo/a"], tensors({"old": 1, "new": 2}[versions[-1]])["zo/a"])
        checkpoint.save(folder, 3, tensors(3), {"version": "next"}, keep=1, identity={})
        assert checkpoint.load_newest(folder).state == {"version": "next"}
    assert versions == sorted(versions, reverse=True) and versions[0] == "old" and versions[-1] == "new"


def test_a_log_that_is_opened_again_is_on_the_disk_before_it_has_its_name(tmp_path, disk_of):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    disk = disk_of(folder)

    def steps(left: Path) -> list[int]:
        return [record["step"] for record in read_lines(left / "log.jsonl", dict)]

    log = JsonLines(folder / "log.jsonl", dict, lambda record: record["step"] < 2)
    log.append({"step": 2})
    for unsynced_names in (False, True):
        left = disk.left(tmp_path / str(unsynced_names), unsynced_names)
        assert steps(left) == [1]
    log.sync()
    assert steps(disk.left(tmp_path / "synced", True)) == [1, 2]


class PowerCut(BaseException):
    """Nothing runs after it."""


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """Runs that were never interrupted, each made once."""
    made: dict[str, Config] = {}

    def of(orders: str) -> Config:
        if orders not in made:
            made[orders] = configured(tmp_path_factory.mktemp("whole"), *TINY, f"orders={orders}", "run.name=whole")
            train(made[orders], World.alone())
        return made[orders]

    return of


@pytest.mark.parametrize(
    ("orders", "at", "unsynced_names", "written_back"),
    [
        ("dual_all", 8, False, ""),
        ("dual_all", 8, True, "journal.jsonl"),
        ("dual_hop_odd", 1, False, ""),
        ("dual_hop_odd", 8, True, "metrics.jsonl"),
    ],
)
def test_a_run_goes_on_after_a_power_cut_as_if_it_had_been_stopped_at_its_last_checkpoint(
    tmp_path, monkeypatch, disk_of, whole_of, orders, at, unsynced_names, written_back
):
    """written_back: a file that the system has written although nobody waited for it."""
    whole, root = whole_of(orders), tmp_path / "runs"
    root.mkdir()
    cut = configured(tmp_path, *TINY, f"orders={orders}", "run.name=cut")
    taken, step = [], HybridStep.__call__
    disk = disk_of(root)

    def until_the_cut(self, *arguments, **options):
        taken.append(1)
        if len(taken) == at:
            left = disk.left(tmp_path / "left", unsynced_names)
            if written_back:
                shutil.copy(root / "cut" / written_back, left / "cut")
            raise PowerCut
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(HybridStep, "__call__", until_the_cut)
        train(cut, World.alone())
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "left", root)
    saved = checkpoint.load_newest(root / "cut")
    assert (saved.step if saved else 0) == (at - 1) // 2 * 2  # saved every second step
    train(cut, World.alone())
    expected, got = last_tensors(whole), last_tensors(cut)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    for file in ("metrics.jsonl", "journal.jsonl"):
        assert [{**r, "name": ""} for r in records(whole, file)] == [{**r, "name": ""} for r in records(cut, file)]
    assert read_units(Path(whole.run.root) / "whole").equals(read_units(root / "cut"))

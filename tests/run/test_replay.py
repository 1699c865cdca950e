"""Claims about the journal: the zeroth-order units can be rebuilt from it bit for bit, and a killed run goes on from it."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dist_vlcl.commands.replay import different_tensors, rebuild
from dist_vlcl.config import Config
from dist_vlcl.dist.world import World
from dist_vlcl.reading import seal, to_line
from dist_vlcl.run import checkpoint
from dist_vlcl.run.log import JOURNAL
from dist_vlcl.step import HybridStep
from dist_vlcl.train import train
from tests.helpers.ranks import run_module, run_ranks
from tests.helpers.tiny_clip import architecture
from tests.test_train import configured, records

TINY = [f"model.name={architecture(3, 3)}", "model.pretrained=random", "eval.zero_shot=false"]
DUAL = [*TINY, "orders=dual_all"]
EVERY_OPTION = ["orders.layers=[2]", "orders.rest=frozen", "zo=conservative", "zo.probes=2", "run.save_every_steps=2"]


@pytest.mark.parametrize("command", ["replay", "evaluate"])
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path, command):
    done = run_module("dist_vlcl", command, "token=hush&run", cwd=tmp_path)
    assert done.returncode != 0 and "config.yaml is missing: give the folder of a run" in done.stderr and "hush" not in done.stderr


def run_folder(cfg: Config) -> Path:
    return Path(cfg.run.root) / cfg.run.name


def counted(world: World, cfg: Config, killed_rank: int | None = None, at: int = 0) -> int:
    """Train and return how many steps this start took; a rank that is to be killed dies in its step number `at`, by kill -9."""
    architecture(3, 3)  # make it known in this process
    whole, taken = HybridStep.__call__, []

    def step(self, *arguments, **options):
        taken.append(1)
        if world.rank == killed_rank and len(taken) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *arguments, **options)

    HybridStep.__call__ = step  # type: ignore[method-assign]
    train(cfg, world)
    return len(taken)


@pytest.mark.parametrize(
    ("killed_rank", "at", "overrides"),
    [(0, 4, ["zo=mozo"]), (1, 4, EVERY_OPTION)],
    ids=["mozo", "every_option"],
)
def test_a_killed_dual_zeroth_order_run_loses_no_finished_step(tmp_path, killed_rank, at, overrides):
    unbroken = configured(tmp_path, *DUAL, *overrides, "run.name=unbroken")
    broken = configured(tmp_path, *DUAL, *overrides, "run.name=broken")
    (steps, _) = run_ranks(counted, 2, unbroken)
    with pytest.raises(RuntimeError, match=f"rank {killed_rank} died without a word"):
        run_ranks(counted, 2, broken, killed_rank, at)
    journalled = len(records(broken, JOURNAL))
    assert journalled in (at - 1, at)  # the other rank may be the one that writes, and had all it needed for the step
    with open(run_folder(broken) / JOURNAL, "a") as file:
        file.write('{"step": 99, "ta')  # a torn line
    assert run_ranks(counted, 2, broken) == [steps - journalled] * 2
    expected, got = (checkpoint.load_newest(run_folder(cfg)).tensors for cfg in (unbroken, broken))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert records(unbroken, JOURNAL) == records(broken, JOURNAL)
    assert [{**r, "name": ""} for r in records(unbroken)] == [{**r, "name": ""} for r in records(broken)]


def test_steps_of_first_order_units_after_the_checkpoint_are_taken_again_and_the_log_says_how_many(tmp_path, capsys):
    cfg = configured(tmp_path, *TINY, "orders=first", "tasks.num_tasks=1", "run.save_every_steps=2")
    with pytest.raises(RuntimeError, match="rank 0 died without a word"):
        run_ranks(counted, 1, cfg, 0, 4)  # step 3 is in the journal, and the newest checkpoint has step 2
    train(cfg, World.alone())
    assert "1 steps after the checkpoint are taken again: first-order updates are not in the journal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "at", "saved", "taken"),
    [
        (["tasks.num_tasks=1", "run.save_every_steps=2"], 5, [2, 4], 1),  # from step 2 and the journal's 3 and 4
        ([], 8, [5], 5),  # from the journal's 1 to 5, which are the first task's; the second's 6 and 7 are taken again
    ],
    ids=["within_a_task", "the_end_of_a_task"],
)
def test_a_damaged_checkpoint_costs_no_finished_step_of_its_task_and_never_the_end(tmp_path, overrides, at, saved, taken):
    unbroken = configured(tmp_path, *DUAL, *overrides[:1], "run.name=unbroken")
    broken = configured(tmp_path, *DUAL, *overrides, "run.name=broken")
    run_ranks(counted, 1, unbroken)
    with pytest.raises(RuntimeError, match="rank 0 died without a word"):
        run_ranks(counted, 1, broken, 0, at)
    assert checkpoint.saved_steps(run_folder(broken)) == saved
    tensors = run_folder(broken) / f"checkpoints/step-{saved[-1]:08d}.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert run_ranks(counted, 1, broken) == [taken]
    expected, got = (checkpoint.load_newest(run_folder(cfg)).tensors for cfg in (unbroken, broken))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert records(unbroken, JOURNAL) == records(broken, JOURNAL)
    assert [{**r, "name": ""} for r in records(unbroken)] == [{**r, "name": ""} for r in records(broken)]


def damage(folder: Path, step: int) -> None:
    """Change one digit of a coefficient: still JSON, no longer what was written."""
    lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    position = lines[step - 1].index('"coefficient": ') + len('"coefficient": -0.0')
    digit = lines[step - 1][position]
    lines[step - 1] = lines[step - 1][:position] + str((int(digit) + 1) % 10) + lines[step - 1][position + 1 :]
    (folder / JOURNAL).write_text("".join(lines))


def test_replay_rebuilds_the_zeroth_order_units_of_a_hybrid_run_and_notices_damage(tmp_path):
    cfg = configured(tmp_path, *TINY, "orders=dual_hop_odd", "zo=conservative", "run.save_every_steps=3", "run.keep=9")
    run_ranks(counted, 2, cfg)
    folder = run_folder(cfg)
    end = checkpoint.load_newest(folder)
    for start, stop in pairwise(checkpoint.saved_steps(folder)):  # within a task, with moments, and at its end
        rebuilt = rebuild(folder, stop)
        assert (rebuilt.path.stem, rebuilt.step) == (f"step-{start:08d}", stop)
        assert different_tensors(rebuilt, checkpoint.load(folder, stop)) == []
        assert {name.split("/")[1] for name in rebuilt.tensors} == {"language.1", "language.3", "vision.1", "vision.3"}
    done = run_module("dist_vlcl", "replay", str(folder), "--output", str(tmp_path / "units.safetensors"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"equal, bit for bit, to the checkpoint of step {end.step}" in done.stdout
    assert (tmp_path / "units.safetensors").exists()
    done = run_module("dist_vlcl", "replay", str(folder), "--output", str(tmp_path / "none" / "units.safetensors"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno 2]") and "Traceback" not in done.stderr
    tensors = folder / "checkpoints/step-00000005.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-8])
    with pytest.warns(RuntimeWarning, match=r"skipped: .*step-00000005.safetensors.*; using step-00000003.safetensors instead"):
        rebuilt = rebuild(folder, 6)  # from the middle of a task into the next
    assert different_tensors(rebuilt, checkpoint.load(folder, 6)) == []
    tensors.write_bytes(whole)
    with pytest.raises(ValueError, match=r"no intact checkpoint before step 2; it has checkpoints of steps \[3, 5, 6, 9, 10\]"):
        rebuild(folder, stop=2)
    damage(folder, step=7)
    with pytest.warns(
        RuntimeWarning, match=rf"journal\.jsonl: step 7 is missing or damaged, and the newest checkpoint is of step {end.step}"
    ):
        rebuild(folder)
    with pytest.raises(ValueError, match="step 7 is missing or damaged"):
        rebuild(folder, stop=9)
    assert rebuild(folder, stop=6).step == 6
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    (folder / JOURNAL).write_text("".join(to_line(seal({**line, "device": "cuda"})) for line in lines))
    with pytest.raises(ValueError, match="the run drew directions on cuda, whose last bits differ: give --device cuda"):
        rebuild(folder, stop=6)


def test_a_run_without_zeroth_order_units_has_nothing_to_rebuild(tmp_path):
    cfg = configured(tmp_path, *TINY, "orders=first", "tasks.num_tasks=1")
    train(cfg, World.alone())
    with pytest.raises(ValueError, match="no zeroth-order units"):
        rebuild(run_folder(cfg))

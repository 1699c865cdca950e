"""Claims about whole runs: they end where they should, say what they did, and an interruption changes nothing."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from dist_vlcl.config import Config, compose_config, load_config
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import Experiment, fitted_batch_size
from dist_vlcl.report.records import read_units
from dist_vlcl.run.checkpoint import load_newest
from dist_vlcl.run.folder import RunRefused
from dist_vlcl.session import Requeued
from dist_vlcl.step import HybridStep
from dist_vlcl.train import build_step, check_warmup, train
from tests.helpers.ranks import free_port, run_module, run_ranks, warm_python
from tests.helpers.runs import digits_root
from tests.helpers.tiny_clip import architecture

SMALL_RUN = ["tasks.num_tasks=2", "train.epochs=1", "train.batch_size=60", "run.trackers=[]", "run.progress=false", "train.warmup_steps=2"]
SMALL_RUN += ["run.plots=false"]


TINY = [f"model.name={architecture(3, 3)}", "model.pretrained=random"]


def configured(tmp_path: Path, *overrides: str) -> Config:
    return compose_config([*SMALL_RUN, f"data.root={digits_root()}", f"run.root={tmp_path}/runs", *overrides])


def run_once(world: World, cfg: Config, stop_at: int | None = None) -> str:
    """Train; with `stop_at`, the last rank gets a real signal while it takes that step."""
    architecture(3, 3)  # make it known in this process
    if stop_at is not None and world.rank == world.size - 1:
        whole, calls = HybridStep.__call__, []

        def with_signal(self, *arguments, **options):
            calls.append(1)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            return whole(self, *arguments, **options)

        HybridStep.__call__ = with_signal  # type: ignore[method-assign]
    try:
        result = train(cfg, world)
    except Requeued:
        return "requeued"
    return "known" if result is None else "finished"


def last_tensors(cfg: Config) -> dict[str, torch.Tensor]:
    return load_newest(cfg.run.folder).tensors


def records(cfg: Config, file: str = "metrics.jsonl") -> list[dict]:
    lines = (Path(cfg.run.root) / cfg.run.name / file).read_text().splitlines()
    timed = ("time", "seconds", "data_seconds", "images_per_second", "crc")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize(
    ("size", "overrides"),
    [(3, ["zo=mozo"]), (2, ["zo=conservative", "train.micro_batches=2", "data.num_workers=1"])],
    ids=["mozo", "conservative"],
)
def test_a_run_stopped_in_mid_task_and_resumed_equals_one_never_stopped(tmp_path, size, overrides):
    unbroken = configured(tmp_path, *TINY, *overrides, "data.num_workers=0", "run.name=unbroken")
    broken = configured(tmp_path, *TINY, *overrides, "run.name=broken")
    assert run_ranks(run_once, size, unbroken) == ["finished"] * size
    assert run_ranks(run_once, size, broken, 3) == ["requeued"] * size
    folder = Path(broken.run.root) / "broken"
    assert load_newest(folder).step == 4  # the signal came within step 3, after its flag was exchanged
    assert (folder / "REQUEUE").exists() and json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["kind"] != "task"
    assert run_ranks(run_once, size, broken) == ["finished"] * size
    assert not (folder / "REQUEUE").exists()
    expected, got = last_tensors(unbroken), last_tensors(broken)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [{**r, "name": ""} for r in records(unbroken)] == [{**r, "name": ""} for r in records(broken)]
    assert records(unbroken, "journal.jsonl") == records(broken, "journal.jsonl")
    assert read_units(folder.with_name("unbroken")).equals(read_units(folder)) and read_units(folder).num_rows == 10 * 6
    assert run_ranks(run_once, size, broken) == ["known"] * size


def test_a_run_resumed_between_two_tasks_begins_the_next_one_with_fresh_moments(tmp_path):
    unbroken = configured(tmp_path, *TINY, "orders=first", "run.name=unbroken")
    broken = configured(tmp_path, *TINY, "orders=first", "run.name=broken")
    assert run_ranks(run_once, 1, unbroken) == ["finished"] and run_ranks(run_once, 1, broken, 6) == ["requeued"]
    folder = Path(broken.run.root) / "broken"
    max((folder / "checkpoints").iterdir()).unlink()
    assert load_newest(folder).step == 5  # the last one of the first task
    assert run_ranks(run_once, 1, broken) == ["finished"]
    expected, got = last_tensors(unbroken), last_tensors(broken)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_run_resumes_on_another_number_of_ranks(tmp_path):
    unbroken = configured(tmp_path, *TINY, "orders=dual_all", "zo=mozo", "run.name=unbroken")
    moved = configured(tmp_path, *TINY, "orders=dual_all", "zo=mozo", "run.name=moved")
    run_ranks(run_once, 1, unbroken)
    assert run_ranks(run_once, 2, moved, 4) == ["requeued"] * 2
    assert run_ranks(run_once, 1, moved) == ["finished"]
    expected, got = last_tensors(unbroken), last_tensors(moved)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_metrics_hold_every_step_and_the_whole_accuracy(tmp_path):
    cfg = configured(tmp_path, *TINY, "run.name=metrics", "run.plots=true")
    train(cfg, World.alone())
    folder = tmp_path / "runs" / "metrics"
    rows = records(cfg)
    steps, tasks = [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "task"]
    assert [r["step"] for r in steps] == list(range(1, 11)) and {r["task"] for r in steps} == {0, 1}
    assert all(set(r["zo"]) == {"language", "vision"} and torch.isfinite(torch.tensor(r["loss"])) for r in steps)
    accuracy = json.loads((folder / "accuracy.json").read_text())
    assert accuracy["complete"] and accuracy["last"] == sum(accuracy["correct"]) / sum(accuracy["total"])
    assert len(accuracy["total"]) == 4 and sum(accuracy["total"]) == 144  # the test images of digits 0 to 3
    assert [t["last"] for t in tasks][-1] == accuracy["last"]
    assert {p.name for p in (folder / "plots").glob("*.png")} >= {"accuracy_matrix.png", "accuracy.png", "loss.png"}
    journal = records(cfg, "journal.jsonl")
    assert [j["step"] for j in journal] == list(range(1, 11)) and all(len(j["moves"]) == 2 and j["seed"] > 0 for j in journal)


@pytest.mark.parametrize("granularity", ["branch", "unit"])
def test_the_size_of_a_projected_gradient_is_the_mean_over_probes_in_the_log_and_at_every_unit(tmp_path, granularity):
    options = ["orders=dual_hop_odd", "zo.probes=3", f"zo.granularity={granularity}", "tasks.num_tasks=1", "train.max_steps=2"]
    cfg = configured(tmp_path, *TINY, *options, "eval.zero_shot=false", "run.name=sizes")
    train(cfg, World.alone())
    rows = read_units(tmp_path / "runs" / "sizes").to_pylist()
    logged = [line["zo"] for line in records(cfg) if line["kind"] == "step"]
    for zo, entry in zip(logged, records(cfg, "journal.jsonl"), strict=True):
        sizes = {}
        for move in entry["moves"]:
            ((_, slopes),) = move["projected_gradient"].items()
            assert len(set(slopes)) == 3
            sizes[move["group"]] = pytest.approx(sum(map(abs, slopes)) / 3)
            assert zo[move["group"]]["projected_gradient"] == sizes[move["group"]]
        for row in (row for row in rows if row["step"] == entry["step"]):
            group = row["branch"] if granularity == "branch" else f"{row['branch']}.{row['layer']}"
            assert row["projected_gradient"] == (sizes[group] if row["order"] == "zeroth" else None)
    assert len(rows) == 2 * 6 and len(logged) == 2


def test_zero_shot_trains_nothing_and_equals_the_untrained_model(tmp_path):
    cfg = configured(tmp_path, *TINY, "orders=zero_shot", "run.name=zero")
    accuracy = train(cfg, World.alone())
    assert not [r for r in records(cfg) if r["kind"] == "step"]
    tasks = [r for r in records(cfg) if r["kind"] == "task"]
    assert [t["zero_shot"] for t in tasks] == [t["seen"] for t in tasks] == [accuracy.seen(0), accuracy.seen(1)]


def test_first_order_beats_the_shipped_clip_s_zero_shot_on_the_digits(tmp_path):
    accuracy = train(
        configured(tmp_path, "orders=first", "tasks.increment=10", "tasks.num_tasks=1", "train.max_steps=12", "run.name=learns"),
        World.alone(),
    )
    (task,) = [r for r in records(configured(tmp_path, "run.name=learns")) if r["kind"] == "task"]
    assert accuracy.seen(0) > task["zero_shot"] + 0.1


def test_what_has_no_effect_is_said(tmp_path, capsys):
    own = ["tasks.base=9", "train.max_steps=1", "run.record_every_steps=0", "eval.zero_shot=false"]
    with pytest.warns(RuntimeWarning, match=r"data\.split_seed has no effect here: it counts when shards are written"):
        train(configured(tmp_path, *TINY, *own, "data.split_seed=7"), World.alone())
    assert "warning: task 2 has one class, so its loss is 0 and it is not learned" in capsys.readouterr().out


def test_another_configuration_does_not_take_over_a_run(tmp_path):
    options = [*TINY, "orders=zero_shot", "tasks.num_tasks=1", "run.name=mine"]
    train(configured(tmp_path, *options), World.alone())
    with pytest.raises(RunRefused, match=r"zo.probes: 1 -> 2"):
        train(configured(tmp_path, *options, "zo.probes=2"), World.alone())


SHORT = ["train.max_steps=2", "eval.zero_shot=false", "run.record_every_steps=0"]


def launched(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [warm_python(), "-m", "accelerate.commands.launch", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def test_accelerate_launch_trains_on_two_processes(tmp_path):
    two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--main_process_port", str(free_port())]
    done = launched(tmp_path, *two, *port, "-m", "dist_vlcl.train", *SMALL_RUN, *SHORT, "run.name=launched", "cluster.num_processes=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 x cpu" in done.stdout and "Done. See runs/launched/accuracy.json; every step" in done.stdout
    assert done.stdout.count("Done.") == 1  # one rank speaks
    assert done.stderr == ""  # no warning of torch or accelerate about what is meant to be so
    assert json.loads((tmp_path / "runs/launched/accuracy.json").read_text())["complete"]
    assert {p.name for p in tmp_path.iterdir()} == {"data", "runs"}  # and Hydra leaves nothing behind


def test_a_block_that_there_is_not_is_refused_before_data_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"orders.layers=\[13\]: the language tower has no block 13; choose from 1 to 12"):
        train(configured(tmp_path, "orders.layers=[13]", f"data.root={tmp_path}/data"), World.alone())
    assert not list(tmp_path.iterdir())


def test_a_user_error_is_one_message_before_any_work(tmp_path):
    done = run_module("dist_vlcl.train", "orders.layers=odd", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "orders.layers='odd': choose from all, hop_odd, hop_even, prefix, suffix" in done.stderr and not list(tmp_path.iterdir())


def test_null_fits_batch_epochs_and_warmup_to_the_images_of_each_task(tmp_path, capsys):
    fit = ["train.batch_size=null", "train.warmup_steps=null", "train.epochs=null", "run.name=fitted", "tasks.num_tasks=1"]
    cfg = configured(tmp_path, *TINY, *fit, "train.max_steps=20", "eval.zero_shot=false", "orders.layers=[3]", "orders.rest=frozen")
    train(cfg, World.alone())
    saved = load_config(cfg.run.folder / "config.yaml", [f"data.root={cfg.data.root}"]).train
    assert (saved.batch_size, saved.epochs, saved.warmup_steps) == (None, None, None)
    assert "global batch 32, epochs 12" in capsys.readouterr().out  # 288 images: nine batches, 108 steps
    rates = [record["lr"] for record in records(cfg) if record["kind"] == "step"]
    assert rates[:3] == pytest.approx([cfg.first_order.lr * part for part in (0.5, 1, 1)]) and len(rates) == 20


@pytest.mark.parametrize(("images", "batch"), [(4, 8), (28, 8), (288, 32), (2500, 128), (10_000, 128), (50_000, 128)])
def test_small_tasks_get_small_batches(images, batch):
    assert fitted_batch_size(images) == batch


@pytest.mark.parametrize(
    ("words", "batch", "steps"),
    [
        (
            ["tasks.base=8", "tasks.increment=1", "tasks.num_tasks=null"],
            32,
            [111, 100, 100],
        ),  # 479 images a task in the mean; 1,151 and 143
        (["tasks.base=8", "tasks.increment=1", "tasks.num_tasks=1"], 32, [111]),  # the first task is the same if it is the only one
        (["eval.holdout=0.9"], 32, [100] * 2),
    ],
    ids=str,
)
def test_null_epochs_give_every_task_100_steps_or_a_few_more(tmp_path, words, batch, steps):
    fit = ["train.batch_size=null", "train.warmup_steps=null", "train.epochs=null"]
    experiment = Experiment.open(configured(tmp_path, *TINY, *fit, *words), World.alone())
    assert experiment.batch_size == batch and list(map(experiment.num_steps, experiment.tasks)) == steps


def test_a_run_says_its_epochs_and_counts_the_images_that_it_was_trained_on(tmp_path, capsys):
    words = ["orders=first", "eval.holdout=0.5", "train.max_steps=1", "train.epochs=null", "tasks.base=6", "eval.zero_shot=false"]
    cfg = configured(tmp_path, *TINY, *words)
    train(cfg, World.alone())
    assert "global batch 60, epochs 13 to 34\n" in capsys.readouterr().out  # 8 and 3 batches
    assert json.loads((cfg.run.folder / "accuracy.json").read_text())["train_images"] == 578  # about half of 1,152


def test_a_holdout_that_leaves_a_class_untrained_is_refused(tmp_path):
    message = r"eval\.holdout=0\.999: no training image of handwritten digit \w+ is left; give less"
    with pytest.raises(ValueError, match=message):
        train(configured(tmp_path, *TINY, "eval.holdout=0.999", "orders=zero_shot"), World.alone())
    assert not (tmp_path / "runs").exists()


def test_a_warmup_that_no_task_survives_is_refused_except_in_the_paper_s_own_runs(tmp_path):
    words = [*TINY, "train.warmup_steps=5", "tasks.num_tasks=1"]  # 288 images in batches of 60 are five steps
    with pytest.raises(ValueError, match=r"train\.warmup_steps=5: the shortest task has 5 steps.* give at most 2, or null"):
        train(configured(tmp_path, *words, "run.name=slow"), World.alone())
    with pytest.raises(ValueError, match=r"tasks\.increment=1: within a task of one class the loss is always 0"):
        train(configured(tmp_path, *TINY, "tasks.increment=1", "run.name=ones"), World.alone())
    assert not (tmp_path / "runs").exists()
    experiment = Experiment.open(configured(tmp_path, *words), World.alone())
    experiment.cfg.paper = "t1-moe-imgr20-fo"
    check_warmup(experiment, build_step(experiment))


def test_check_validates_the_options_and_does_nothing_else(tmp_path):
    done = run_module("dist_vlcl.train", "--check", "orders=dual_suffix", "run.name=mine", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "valid: runs/mine\n", "") and not list(tmp_path.iterdir())


def test_check_refuses_what_a_job_could_not_do_in_one_line(tmp_path):
    done = run_module("dist_vlcl.train", "--check", "orders.layers=[13]", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "the language tower has no block 13" in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)

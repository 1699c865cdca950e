"""Tuning uses the first task only, is judged on held-out training images, can be resumed, and writes a file that a run takes."""

import sys

import pandas as pd
import pytest
import yaml

from dist_vlcl.commands import tune
from dist_vlcl.config import compose_config, load_config
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.tasks import held_out, plain_order
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import held_out_samples, open_tasks, steps_per_epoch
from dist_vlcl.report.trials import ranked, trial_table
from tests.helpers.ranks import warm_python


def test_held_out_images_are_a_part_of_every_class_and_never_trained_on(tmp_path):
    cfg = compose_config([f"data.root={tmp_path}", "eval.holdout=0.2", "train.batch_size=50"])
    index, tasks = open_tasks(cfg, World.alone())
    task, kept = tasks[0], held_out_samples(cfg, index, tasks[0])
    sizes = index.sizes("train", task.classes)
    for class_id, shards in sizes.items():
        assert sum(s.class_id == class_id for s in kept) == round(0.2 * sum(shards))
    loader, shared = Loader(index, cfg.data), {"batch_size": 50, "transform": EvalTransform(8)}
    batches = loader.train(task, seed=0, epoch=0, without=kept, **shared)
    trained = [key for batch in batches for key in batch.samples]
    judged = [key for batch in loader.test(task.classes, held_out=kept, **shared) for key in batch.samples]
    tested = [key for batch in loader.test(task.classes, **shared) for key in batch.samples]
    everything = [key for batch in loader.train(task, seed=0, epoch=0, **shared) for key in batch.samples]
    assert len(judged) == len(kept) and sorted(trained + judged) == sorted(everything)
    assert not set(tested) & set(judged) and not set(tested) & set(trained)
    assert len(batches) == steps_per_epoch(cfg, index, task)


def test_what_is_held_out_is_a_function_of_class_and_seed_alone():
    sizes = {3: [4, 4], 7: [5], 9: [1]}
    whole = held_out(sizes, 0.25, 0)
    assert [s.class_id for s in whole] == [3, 3, 7, 9] and whole == [s for s in plain_order(sizes) if s in set(whole)]
    assert held_out({7: [5]}, 0.25, 0) == [s for s in whole if s.class_id == 7]
    assert held_out(sizes, 0, 0) == [] and any(held_out(sizes, 0.25, seed) != whole for seed in range(1, 5))


def tuned(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    try:
        tune.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, "".join(capfd.readouterr())


SHORT = ["train.max_steps=2", "train.batch_size=24", "zo.epsilon.language=1e-3", "zo.epsilon.vision=5e-4", "zo.acceptance=always"]

TUNED = {"zo": {"epsilon": {"language": 1e-3, "vision": 5e-4}, "acceptance": "always", "lr_scale": 1.0}}


def test_a_search_writes_its_choice_and_does_not_repeat_what_is_done(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [
        *SHORT,
        "zo.lr_scale=1,100000",
        "train.warmup_steps=0",
        "cluster.threads=1",
        "run.progress=false",
        "run.plots=false",
        "run.record_every_steps=0",
        "run.project=https://user:hush@host",
        "--launcher",
        warm_python(),
    ]
    status, said = tuned(monkeypatch, capfd, *words, "--out", "found")
    assert status == 0 and "3 of 3 to train" in said
    found = tmp_path / "found"
    assert yaml.safe_load((found / "tuned.yaml").read_text()) == TUNED  # the other throws the adapters away
    page = (found / "tuning.md").read_text()
    assert page.index("| 1 |") < page.index("| 100000 |") < page.index("the same units frozen") < page.index("zero-shot CLIP")
    assert (found / "tuning.png").read_bytes().startswith(b"\x89PNG") and len((found / "tuning.csv").read_text().splitlines()) == 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    trials = list((found / "trials").iterdir())
    assert len(trials) == 3
    for trial in trials:
        cfg = load_config(trial / "config.yaml")
        assert (cfg.tasks.num_tasks, cfg.eval.holdout) == (1, 0.2)
    status, said = tuned(monkeypatch, capfd, *words, "--out", "found")
    assert status == 0 and "0 of 3 to train" in said
    assert compose_config(["tuned=found/tuned.yaml"]).zo.lr_scale == 1.0


def test_what_is_searched_is_what_the_plan_reads_and_the_user_has_not_fixed():
    choices = tune.grid(compose_config(["orders=vision_all"]), {"zo.probes": ["1", "4"]}, ["zo.acceptance=always"])
    assert set(choices[0]) == {"zo.lr_scale", "zo.epsilon.vision", "zo.probes"} and len(choices) == 3 * 2 * 2
    assert len(tune.grid(compose_config([]), {}, [])) == 3 * 2 * 2 * 2
    fixed, several, seeds = tune.read_options(["seed=1,2", "orders.layers=[1,3]", "zo.lr_scale=1,2", "train.epochs=3"])
    assert (fixed, several, seeds) == (["orders.layers=[1,3]", "train.epochs=3"], {"zo.lr_scale": ["1", "2"]}, ["1", "2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["orders=first"], "nothing to tune"),
        (["orders.order=frozen"], "nothing to tune"),
        (["zo.lr_scale=1", *SHORT], "every option has one value"),
        (["zo.lr_scale=1,-1"], "zo.lr_scale=-1: give a number above 0"),
        (["--holdout", "1.5"], "--holdout 1.5"),
        (["fast"], "'fast' is not an option: give OPTION=VALUE"),
    ],
    ids=str,
)
def test_a_wrong_search_is_refused_before_anything_runs(words, message, monkeypatch, capfd):
    status, said = tuned(monkeypatch, capfd, *words)
    assert status == 2 and message in said


def trials(*rows: tuple[str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["zo.lr_scale", "accuracy", "loss"])


@pytest.mark.parametrize(("control", "is_doubtful"), [(50, True), (40, False)])
def test_a_choice_that_is_no_better_than_the_control_is_marked(tmp_path, control, is_doubtful):
    references = {"the same units frozen": control, "zero-shot CLIP": 10}
    said = "No better than the same units frozen: the held-out images show no gain from zeroth order."
    printed = tune.write(tmp_path, "command", ["zo.sides=2"], trials(("1", 50, 1.0)), references)
    tuned_file = (tmp_path / "tuned.yaml").read_text()
    texts = (f"# {said}\n" in tuned_file, f"**{said}**" in (tmp_path / "tuning.md").read_text(), said in printed)
    assert texts == (is_doubtful,) * 3 and yaml.safe_load(tuned_file) == {"zo": {"sides": 2, "lr_scale": 1}}


def test_the_best_has_the_highest_mean_then_the_lowest_loss_and_failed_ones_are_last():
    nan = float("nan")
    choices = ranked(trials(("1", 50, 1.0), ("2", 25, 0.5), ("2", 75, 0.5), ("3", nan, nan), ("4", 40, 0.1)))
    assert list(choices["zo.lr_scale"]) == ["2", "1", "4", "3"]
    assert trial_table(choices, {"frozen": 30}).splitlines()[2:] == [
        "| 2 | 50.00 | 25.00 – 75.00 | 2 | 0.5000 |",
        "| 1 | 50.00 |  | 1 | 1.0000 |",
        "| 4 | 40.00 |  | 1 | 0.1000 |",
        "| 3 | – |  | 0 | – |",
        "| frozen | 30.00 |  |  |  |",
    ]

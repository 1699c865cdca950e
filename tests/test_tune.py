"""Tuning uses the first task only, is judged on held-out training images, can be resumed, and prints the command to train."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.commands import tune
from dist_vlcl.config import compose_config, load_config
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.tasks import held_out, plain_order
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import held_out_samples, open_tasks
from dist_vlcl.report.tables import ranked, trial_table
from tests.helpers.ranks import warm_python
from tests.helpers.runs import write_run


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
    assert len(batches) == math.ceil((index.count("train", task.classes) - len(kept)) / 50)


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

SHORT += ["zo.probes=1", "zo=mozo", "seed=0"]


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
        "--fresh",
        "2",
    ]
    status, said = tuned(monkeypatch, capfd, *words, "--out", "found")
    assert status == 0 and "3 of 3 to train" in said and "4 of 4 to train" in said  # then the best and its control, two fresh seeds
    found = tmp_path / "found"
    page = (found / "tuning.md").read_text()
    _, _, best = page.rpartition("python -m dist_vlcl.train ")
    assert " --tasks 1 --holdout 0.2 --fresh 2 --out found\n" in page and "zo.lr_scale=1" in shlex.split(
        best
    )  # the other throws the adapters away
    assert page.index("| 1 |") < page.index("| 100000 |") < page.index("| the same units frozen |") < page.index("| zero-shot CLIP |")
    runs = pd.read_csv(found / "tuning.csv")
    counts = runs.groupby(["part", runs["orders.order"].fillna("zeroth")]).seed.count()
    assert counts.to_dict() == {("fresh", "frozen"): 2, ("fresh", "zeroth"): 2, ("screen", "frozen"): 1, ("screen", "zeroth"): 2}
    assert runs[["seed", "accuracy", "zero_shot"]].notna().all(axis=None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    trials = list((found / "trials").iterdir())
    assert len(trials) == 7 and re.search(r"\*\*.* the same units frozen.* (2 fresh seeds|all differences).*\*\*", page)
    for trial in trials:
        cfg = load_config(trial / "config.yaml")
        assert (cfg.tasks.num_tasks, cfg.eval.holdout) == (1, 0.2)
    status, said = tuned(monkeypatch, capfd, *words, "--out", "found")
    assert status == 0 and "0 of 3 to train" in said and "0 of 4 to train" in said


def test_what_is_searched_is_what_the_plan_reads_and_the_user_has_not_fixed():
    choices = tune.grid(compose_config(["orders=vision_all"]), {"zo.sides": ["1", "2"]}, ["zo=naive"])
    assert set(choices[0]) == {"zo.lr_scale", "zo.probes", "zo.sides"} and len(choices) == 4 * 3 * 2
    both = tune.grid(compose_config([]), {}, [])
    assert len(both) == 3 * 4 * 3 and {choice["zo.probes"] for choice in both} == {f"{{language: {n}, vision: 1}}" for n in (1, 16, 64)}
    for choice in both[::17]:  # every one of them is a configuration, and has a name of its own
        [options] = tune.command_lines([], choice, ["0"], Path("found"), ["eval.holdout=0.2"])
        assert compose_config(options).run.name == options[-1].removeprefix("run.name=")
    fixed, several, seeds = tune.read_options(["seed=1,2", "orders.layers=[1,3]", "zo.lr_scale=1,2", "train.epochs=3"])
    assert tune.read_options([])[2] == ["0", "1", "2"]
    assert (fixed, several, seeds) == (["orders.layers=[1,3]", "train.epochs=3"], {"zo.lr_scale": ["1", "2"]}, ["1", "2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["orders=first"], "nothing to tune"),
        (["orders.order=frozen"], "nothing to tune"),
        (["zo.lr_scale=1", *SHORT], "every option has one value"),
        (["zo.lr_scale=1,-1"], "zo.lr_scale=-1: give a number above 0"),
        (["--holdout", "1.5"], "--holdout 1.5"),
        (["--tasks", "0"], "--tasks 0: give a whole number above 0, or all"),
        ([*SHORT, "zo.lr_scale=1,2", "--tasks", "99"], "--tasks 99: choose from 1 to 5"),
        (["tasks.num_tasks=2"], "tasks.num_tasks: give --tasks instead"),
        (["eval.holdout=0.1"], "eval.holdout: give --holdout instead"),
        (["--tasks", "some"], "--tasks some: give a whole number above 0, or all"),
        (["--fresh", "1"], "--fresh 1: give at least 2"),
        (["fast"], "'fast' is not an option: give OPTION=VALUE"),
    ],
    ids=str,
)
def test_a_wrong_search_is_refused_before_anything_runs(words, message, monkeypatch, capfd):
    status, said = tuned(monkeypatch, capfd, *words)
    assert status == 2 and message in said


@pytest.mark.parametrize(("tasks", "option"), [("1", "tasks.num_tasks=1"), ("2", "tasks.num_tasks=2"), ("all", "tasks.num_tasks=null")])
def test_every_run_learns_as_many_tasks_as_are_asked_for_in_a_folder_for_that_number(tasks, option, monkeypatch, capfd):
    status, said = tuned(monkeypatch, capfd, *SHORT, "zo.lr_scale=1,2", "--tasks", tasks, "--list", "seed=0")
    runs = [line.split() for line in said.splitlines() if "run.root=" in line]
    assert status == 0 and len(runs) == 3 and all(option in run for run in runs)
    roots = {word for run in runs for word in run if word.startswith("run.root=tuning/")}
    assert len(roots) == 1 and (f"-tasks_{tasks}/" in roots.pop()) == (tasks != "1")


def test_several_tasks_count_with_their_mean_and_the_last_one_is_in_the_file_too(tmp_path):
    write_run(tmp_path, "seed=3", "run.name=one", last=0.5, avg=0.6, zero_shot=0.4)
    [item] = tune.prepare([("seed=3", "run.name=one", f"run.root={tmp_path}")])
    [row] = tune.trained([item]).to_dict("records")
    found = [row[name] for name in ("accuracy", "last", "zero_shot")]
    assert found == pytest.approx([60, 50, 44], abs=0.1)  # zero-shot falls from 48 to 40 over the five tasks


def test_a_run_whose_accuracies_are_no_numbers_counts_as_failed(tmp_path):
    file = write_run(tmp_path, "seed=3", "run.name=one", last=0.5, avg=0.6, zero_shot=0.4) / "accuracy.json"
    left = {key: value for key, value in json.loads(file.read_text()).items() if key != "crc"}
    file.write_text(json.dumps({**left, "zero_shot": {"0": "high"}}))
    items = tune.prepare([("seed=3", "run.name=one", f"run.root={tmp_path}")])
    with pytest.warns(Warning, match=r"accuracy.json is damaged: it has another form than dist_vlcl writes"):
        found = tune.trained(items)
    assert found[["accuracy", "last", "zero_shot"]].isna().all(axis=None)


def trials(*rows: tuple[str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["zo.lr_scale", "accuracy", "loss"])


CHOICES = [{"zo.lr_scale": scale, "zo.probes": probes} for scale in ("0.3", "1", "3", "10") for probes in ("1", "16", "64")]


def faked(rng: np.random.Generator, gain: float, spread: float = 1.0) -> tune.Search:
    """Return a search whose runs are noise around 50 %; only lr_scale=3 with 16 probes gains. A seed moves a run and its control alike."""
    common: dict[str, float] = {}

    def train(choices, seeds):
        found = []
        for choice in choices:
            more = gain if choice == {"zo.lr_scale": "3", "zo.probes": "16"} else 0.0
            values = [50 + common.setdefault(seed, 3 * rng.normal()) + spread * rng.normal() + more for seed in seeds]
            found.append(pd.DataFrame({"seed": seeds, "accuracy": values, "zero_shot": 30.0, "loss": 1.0}))
        return found

    return tune.search(CHOICES, train, ["0", "1", "2"], [str(seed) for seed in range(3, 8)])


def test_a_search_without_any_difference_claims_a_gain_in_at_most_5_percent():
    rng = np.random.default_rng(0)
    found = [faked(rng, gain=0.0) for _ in range(120)]
    claims = sum(" is better than " in search.answer for search in found)
    assert 0 < claims <= 0.05 * len(found)
    screened = [search.screened for search in found]
    fresh = [search.fresh["mean"] for search in found]
    assert np.mean(screened) > 0.7  # what the best of twelve seems to gain
    assert abs(np.mean(fresh)) < 0.15  # what it gains


def test_a_search_finds_a_real_difference_and_says_how_large_it_is():
    rng = np.random.default_rng(1)
    found = [faked(rng, gain=4.0) for _ in range(40)]
    assert sum(search.best == {"zo.lr_scale": "3", "zo.probes": "16"} for search in found) >= 38
    answers = [search.answer for search in found]
    assert sum(answer.startswith("zo.lr_scale=3 zo.probes=16 is better than the same units frozen (+") for answer in answers) >= 36
    assert np.mean([search.fresh["mean"] for search in found]) == pytest.approx(4.0, abs=0.4)


@pytest.mark.parametrize(
    ("tasks", "learned"), [("1", "the first task"), ("2", "the first 2 tasks (Avg)"), ("all", "all tasks (Avg)")], ids=["1", "2", "all"]
)
def test_the_answer_and_the_shrinkage_are_in_the_file_and_on_the_screen(tasks, learned, tmp_path):
    found = faked(np.random.default_rng(2), gain=0.0)
    printed = tune.write(tmp_path, "command", ["zo.sides=2"], tasks, found)
    assert (
        " shows no gain over the same units frozen (" in found.answer and "the best of 12 choices. The fresh runs show " in found.shrinkage
    )
    command = shlex.join(["zo.sides=2", *(f"{key}={value}" for key, value in found.best.items())])
    for text in ((tmp_path / "tuning.md").read_text(), printed):
        assert f"images of {learned}; test images were not read." in text
        assert found.answer in text and found.shrinkage in text and f"python -m dist_vlcl.train {command}" in text


def test_only_options_of_zeroth_order_can_be_searched():
    """The control has one value of every other option: the gain of more epochs would be taken for one of zeroth order."""
    cfg = compose_config(["orders=language_all"])
    for option in ("train.epochs", "orders"):
        with pytest.raises(ValueError, match=f"{option}: only options of zo can have several values"):
            tune.grid(cfg, {option: ["1", "10"]}, [])


def test_the_best_has_the_highest_mean_then_the_lowest_loss_and_those_with_a_failed_run_are_last():
    nan = float("nan")
    found = {"1": (50, 50, 1.0), "2": (25, 75, 0.5), "3": (nan, nan, nan), "4": (90, nan, 0.1), "5": (40, 40, 0.1)}
    choices = ranked(trials(*[(name, accuracy, loss) for name, (*both, loss) in found.items() for accuracy in both]))
    assert trial_table(choices, {"frozen": 30}).splitlines()[2:] == [
        "| 2 | 50.00 | 25.00 – 75.00 | 2 | 0.5000 |",
        "| 1 | 50.00 | 50.00 – 50.00 | 2 | 1.0000 |",
        "| 5 | 40.00 | 40.00 – 40.00 | 2 | 0.1000 |",
        "| 4 | 90.00 |  | 1 | 0.1000 |",
        "| 3 | – |  | 0 | – |",
        "| frozen | 30.00 |  |  |  |",
    ]


@pytest.mark.parametrize(("fresh", "words"), [((5.0, 6.0), "0.50 less"), ((7.0, 8.0), "1.50 more"), ((float("nan"), 8.0), "")])
def test_the_gain_of_the_screen_is_over_the_seeds_of_both_and_the_fresh_runs_say_less_or_more(fresh, words):
    """The control's run with seed 1, an easy one, has failed."""
    accuracies = {
        "0": (40.0, 46.0),
        "1": (float("nan"), 90.0),
        "2": (40.0, 46.0),
        "3": (30.0, 30.0 + fresh[0]),
        "4": (30.0, 30.0 + fresh[1]),
    }

    def train(choices, seeds):
        of = [[accuracies[seed][choice != tune.CONTROL] for seed in seeds] for choice in choices]
        return [pd.DataFrame({"seed": seeds, "accuracy": values, "zero_shot": 1.0, "loss": 1.0}) for values in of]

    found = tune.search([{"zo.lr_scale": "1"}], train, ["0", "1", "2"], ["3", "4"])
    assert found.screened == pytest.approx(6.0)
    assert found.shrinkage == f"In the screen it gained +6.00 points, the best of 1 choices.{words and f' The fresh runs show {words}.'}"

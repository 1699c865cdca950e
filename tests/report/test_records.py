"""Run folders as rows: which settings differ from those of the cell, and which runs may be compared."""

import json
from operator import attrgetter

import pandas as pd
import pytest

from dist_vlcl.config import compose_config
from dist_vlcl.paper import cell_of
from dist_vlcl.report.records import CELL, run_frame
from dist_vlcl.report.statistics import complete_of, results_of
from tests.helpers.runs import write_run

HOP = "paper=t2-moe-cifar10-dual-hop_odd"
SMALL = "adapter.scale=1.0; model.name=small_clip; model.pretrained=shipped"


@pytest.fixture
def frame_of(tmp_path):
    """Return a function from the options of several runs to the data frame of their folders, which only hold what a frame needs."""

    def frame(*runs: list[str], images: int = 50000, per_class: int = 100) -> pd.DataFrame:
        folders = []
        for number, options in enumerate(runs):
            config = compose_config(options).as_dict()
            steps = images // (config["train"]["batch_size"] or 128) * (config["train"]["epochs"] or 1)  # null: data=folder
            accuracy = {"complete": True, "rows": [[(1, per_class)] * 100], "steps": steps, "last": 0.5, "avg": 0.6, "forgetting": 0.1}
            folders.append(tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}")
            folders[-1].mkdir()
            (folders[-1] / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
            (folders[-1] / "accuracy.json").write_text(json.dumps(accuracy))
        found, unreadable = run_frame(folders)
        assert not unreadable
        return found

    return frame


@pytest.mark.parametrize("id", ["t1-moe-tiny20-fo", "t1-lora-imgr20-vision", "t2-moe-cifar20-dual-prefix6", "t3-moe-cifar10-mozo-hop_even"])
def test_a_published_run_has_no_other_settings_than_the_paper(frame_of, id):
    [run] = frame_of([f"paper={id}"], images=0).itertuples()
    cell = cell_of(compose_config([f"paper={id}"]).as_dict())
    assert attrgetter(*CELL)(run) == attrgetter(*CELL)(cell)
    assert run.other_settings.replace("only a part of the test images (50 a class)", "") == ""


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["seed=3", "run.name=other", "data.root=elsewhere", "cluster.num_processes=4", "train.micro_batches=2"], ""),
        (["train.epochs=2", "zo.lr_scale=3.0"], "train.epochs=2; zo.lr_scale=3.0"),
        (["model=small"], SMALL),
        (["model.pretrained=/somewhere/weights.safetensors"], "model.pretrained=weights.safetensors (5b03b3)"),
        (["zo=mozo", "zo.random_signs=true"], ""),  # random signs do not read epsilon
        (["orders.rest=frozen"], "orders.rest=frozen"),
        (["orders.rest={vision: frozen, language: frozen}"], "orders.rest=frozen"),
        (["orders.rest={vision: first, language: frozen}"], "orders.rest={language: frozen, vision: first}"),
        (["zo.probes={vision: 2, language: 8}"], "zo.probes={language: 8, vision: 2}"),
        (["orders=language_all", "zo.probes={language: 8, vision: 2}"], "zo.probes=8"),
        (["zo.random_signs=true", "zo.acceptance=always", "zo.probes=8"], "zo.probes=8"),  # a random walk always takes the step
        (["seed=4", "tasks.order=seed:4"], "tasks.order=seed:N"),
        (["orders=first", "zo.lr_scale=3.0"], ""),  # first order does not read it
        (["orders=zero_shot", "train.epochs=2", "zo.lr_scale=3.0", "model=small"], "model.name=small_clip; model.pretrained=shipped"),
    ],
    ids=str,
)
def test_other_settings_are_those_that_change_the_result_of_the_method(frame_of, options, settings):
    assert list(frame_of([HOP, *options]).other_settings) == [settings]


def test_a_part_of_the_images_is_another_setting(frame_of):
    assert list(frame_of([HOP], per_class=50).other_settings) == ["only a part of the test images (50 a class)"]
    assert list(frame_of([HOP], images=25000).shared_settings) == ["only a part of the training images (at most 250 a class)"]


def test_the_images_of_a_run_are_counted_where_its_batches_were_fitted(frame_of, tmp_path):
    folder = tmp_path / frame_of([HOP, "train.epochs=null"]).run[0]
    assert list(run_frame([folder])[0].shared_settings) == ["train.epochs=None"]
    accuracy = json.loads((folder / "accuracy.json").read_text())
    (folder / "accuracy.json").write_text(json.dumps({**accuracy, "train_images": 20000}))
    found = list(run_frame([folder])[0].shared_settings)
    assert found == ["train.epochs=None; only a part of the training images (at most 200 a class)"]


def test_other_shards_under_one_name_are_another_setting(frame_of, tmp_path):
    names = list(frame_of([HOP], [HOP, "seed=1"], [HOP, "seed=2"], ["orders=first"]).run)
    for name, digest in zip(names, ("abcdef01", "abcdef01", "1234567890", "77"), strict=True):
        (tmp_path / name / "env.json").write_text(json.dumps([{"data": digest}, {"data": None}]))
    folders = [tmp_path / name for name in names]
    cifar = ["shards abcdef", "shards abcdef", "shards 123456"]
    assert [text.split("; ")[-1] for text in run_frame(folders)[0].shared_settings][:3] == cifar
    (tmp_path / names[0] / "env.json").write_text(json.dumps([{"data": "abcdef01"}, {"data": "=1\x1b[31m"}]))  # no digest
    assert list(run_frame(folders[:2])[0].data) == ["abcdef01", "abcdef01"]
    assert all("shards" not in text for text in run_frame([*folders[:2], folders[3]])[0].other_settings)


def test_data_that_the_paper_does_not_use_are_compared_with_our_defaults(frame_of):
    own = ["data=folder", "data.name=pacs", "tasks.base=3", "tasks.increment=2", "tasks.order=natural"]
    run = frame_of(["paper=t1-moe-imgr20-fo", *own], images=0).iloc[0]
    # Without the option, batch and epochs of data=folder fit the number of images.
    assert (run.dataset, run.increment, run.other_settings) == ("pacs", 2, "tasks.base=3; train.batch_size=128")


def test_options_that_only_one_version_has_are_not_compared(tmp_path):
    """Version 0.1 had options that this one has not, and a later version may have others."""
    folder = write_run(tmp_path, HOP, last=0.5, avg=0.5)
    config = compose_config([HOP]).as_dict()
    config["zo"]["of_0.1"], config["later"] = "sequential", {"option": 1}
    del config["eval"]["holdout"]
    (folder / "config.yaml").write_text(json.dumps(config))
    accuracy = json.loads((folder / "accuracy.json").read_text())
    (folder / "accuracy.json").write_text(json.dumps({key: accuracy[key] for key in accuracy if key not in ("config", "crc")}))  # as in 0.1
    assert list(run_frame([folder])[0].other_settings) == [""]


def test_runs_are_compared_only_where_all_but_the_method_s_settings_are_equal(frame_of):
    runs = frame_of([HOP], [HOP, "zo.lr_scale=3.0"], [HOP, "train.epochs=2"], [HOP, "model=small"])
    assert list(runs.shared_settings) == ["", "", "train.epochs=2", SMALL.removeprefix("adapter.scale=1.0; ")]
    assert list(runs.method_settings) == ["", "zo.lr_scale=3.0", "", "adapter.scale=1.0"]


def test_of_runs_with_equal_settings_and_seed_the_first_counts(frame_of):
    runs = frame_of([HOP, "run.name=a"], [HOP, "run.name=b"], [HOP, "seed=1"])
    assert list(complete_of(runs).run) == [runs.run[0], runs.run[2]]


def test_other_weights_of_one_name_are_other_settings(frame_of):
    paths = [f"model.pretrained=/checkpoints/epoch_{epoch}/model.pt" for epoch in (1, 2)]
    assert len(complete_of(frame_of([HOP, paths[0]], [HOP, paths[1]]))) == 2


OWN = {"kind": "own:Adapter", "bottleneck": 64}
POINTS = {"name": "points", "estimator": "x:Y"}


@pytest.mark.parametrize(
    ("configs", "settings"),
    [
        ([{"adapter": {**OWN, "rank": rank}} for rank in (8, 64)], "adapter.bottleneck=64; adapter.rank={}"),
        ([{"zo": {**POINTS, "estimator_options": {"far": far}}} for far in (8, 64)], "zo.estimator=x:Y; zo.estimator_options.far={}"),
    ],
    ids=["adapter", "estimator"],
)
def test_options_of_a_user_s_own_class_are_settings(tmp_path, configs, settings):
    """They are called anything, and the paper's cell has none of them."""
    folders = []
    for own in configs:
        folders.append(write_run(tmp_path, HOP, f"run.name=own{len(folders)}", last=0.5, avg=0.5))
        (folders[-1] / "config.yaml").write_text(json.dumps({**compose_config([HOP]).as_dict(), **own}))
        accuracy = json.loads((folders[-1] / "accuracy.json").read_text())
        left = {key: accuracy[key] for key in accuracy if key not in ("config", "crc")}
        (folders[-1] / "accuracy.json").write_text(json.dumps(left))
    runs = run_frame(folders)[0]
    assert list(runs.method_settings) == [settings.format(8), settings.format(64)]
    assert len(complete_of(runs)) == 2


def test_a_probe_of_memory_is_no_result_and_has_the_settings_of_its_cell(frame_of):
    probe = frame_of([HOP, "tasks.num_tasks=1", "train.max_steps=5"], per_class=50, images=640)
    assert list(probe.is_probe) == [True] and list(probe.other_settings) == [""] and complete_of(probe).empty


def test_the_untrained_model_belongs_to_every_group_of_its_model(tmp_path):
    untrained = ["data=cifar100", "tasks.increment=10", "model=vit_b16", "orders=zero_shot"]
    folders = [
        write_run(tmp_path, HOP, last=0.5, avg=0.6),
        write_run(tmp_path, HOP, "train.epochs=2", last=0.5, avg=0.6, zero_shot=0.31),
        write_run(tmp_path, HOP, "model=small", last=0.5, avg=0.6),
        write_run(tmp_path, *untrained, last=0.3, avg=0.4),
    ]
    results = results_of(complete_of(run_frame(folders)[0]))
    zero_shot = results[results.variant == "zero_shot"].set_index("shared_settings")["last"]
    # The measurement of a group's own run comes first.
    assert dict(zero_shot) == pytest.approx({"": 30, "train.epochs=2": 31})


def test_a_folder_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    broken, stray, foreign = write_run(tmp_path, last=0.9, avg=0.9), tmp_path / "stray", tmp_path / "foreign"
    (broken / "accuracy.json").write_text('{"complete"')
    stray.mkdir()
    foreign.mkdir()
    (foreign / "config.yaml").write_text("a: 1\n")
    runs, unreadable = run_frame([broken, stray, foreign])
    assert runs.empty and unreadable["stray"] == "not a run folder: it has no config.yaml"
    assert all(unreadable[name].startswith("could not read its files: ") for name in (broken.name, "foreign"))

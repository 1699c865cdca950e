"""Several data sets as the tasks of one run: trained one after the other, all evaluated after each, each among its own classes."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from dist_vlcl.commands import report, verify
from dist_vlcl.commands.evaluate import evaluate_run
from dist_vlcl.commands.evaluate import report as report_of
from dist_vlcl.commands.sweep import missing_inputs
from dist_vlcl.config import compose_config, load_config
from dist_vlcl.continual.metrics import AccuracyMatrix
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import open_sets, read_shard
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import Experiment
from dist_vlcl.report.records import read_records
from dist_vlcl.run.checkpoint import load
from dist_vlcl.train import train
from tests.helpers.shards import make_index, served
from tests.helpers.tiny_clip import architecture

SIZES = {"fox": 3, "owl": 2, "elk": 4}  # classes of each set
RUN = [f"model.name={architecture(2, 2)}", "model.pretrained=random", "orders=dual_hop_odd", "train.epochs=1", "cluster.threads=1"]
RUN += ["run.trackers=[]", "run.progress=false", "run.plots=false", "train.batch_size=4", "run.keep=9"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, num_classes in SIZES.items():
        make_index(root, num_classes, train=4, test=7, name=name)
    return root


def run(root: Path, *overrides: str) -> tuple[AccuracyMatrix, Path]:
    cfg = compose_config([*RUN, f"data.root={root}", f"run.root={root}/runs", *overrides])
    accuracy = train(cfg, World.alone())
    assert accuracy
    return accuracy, cfg.run.folder


SETS = ["data=sets", "tasks.sets=[fox,owl,elk]"]


@pytest.fixture(scope="module")
def trained(root) -> tuple[AccuracyMatrix, Path]:
    return run(root, *SETS)


def test_every_row_has_every_set_and_each_is_evaluated_as_if_it_were_alone(root, trained):
    def untrained(*overrides: str) -> Experiment:
        return Experiment.open(compose_config([*RUN, f"data.root={root}", *overrides]), World.alone())

    together, alone = untrained(*SETS), []
    for name, size in SIZES.items():
        one = untrained("data=folder", f"data.name={name}", f"tasks.increment={size}")
        alone += one.evaluate(one.tasks[0])
    assert together.evaluate(together.tasks[1]) == alone and [total for _, total in alone] == [7] * 9
    assert 0 < sum(correct for correct, _ in alone) < 63
    assert together.evaluate_untrained()[0] == together.accuracy([alone]).seen(0)
    assert [len(row) for row in trained[0].rows] == [9] * 3


def test_the_first_set_is_trained_as_if_it_were_alone(root, trained):
    _, folder = run(root, "data=folder", "data.name=fox", "tasks.increment=3", "run.name=alone")
    alone, together = load(folder, 3).tensors, load(trained[1], 3).tensors
    adapters = [name for name in alone if name.startswith("adapters/")]
    assert adapters and all(torch.equal(alone[name], together[name]) for name in adapters)
    assert any(not torch.equal(together[name], load(trained[1], 5).tensors[name]) for name in adapters)


def test_the_run_is_named_after_its_sets_measured_again_and_reported(root, trained, monkeypatch, tmp_path):
    accuracy, folder = trained
    assert folder.name == "fox-owl-elk-tiny-2-2-moe-mozo-dual-hop_odd-seed0"
    assert evaluate_run(folder, World.alone(), [f"data.root={root}"]).rows == accuracy.rows
    first = read_records(folder)["task"][0]
    assert len(first["per_task"]) == 3 and first["transfer"] is not None  # all three sets
    monkeypatch.setattr(sys, "argv", ["report", str(folder), "--out", str(tmp_path / "report")])
    report.main()
    assert "fox-owl-elk" in (tmp_path / "report/report.html").read_text()


def test_a_joint_index_has_the_shards_of_every_set(root, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    data = DataConfig(name="x", reader="folder", root=str(root))
    index, sizes = open_sets(data, list(SIZES))
    assert sizes == [3, 2, 4] and index.class_names[2:5] == ("class 2", "class 0", "class 1")
    index.verify()
    owl, _ = open_sets(data, ["owl"])
    assert read_shard(index, index.shards["test"][4][0]) == read_shard(owl, owl.shards["test"][1][0])
    with served(root) as address:
        for url in (address, f"{address}/{{}}", f"pipe:cat {root}/{{}} </dev/null"):
            there, _ = open_sets(DataConfig(name="x", reader="folder", url=url, allow_pipe=True), list(SIZES))
            there.verify()
            assert there.fingerprint == index.fingerprint


@pytest.mark.parametrize("name", ["$(touch x)", "a b", "a;b", "a|b", "a\nb"])
def test_a_set_s_name_of_a_foreign_run_gives_the_shell_of_a_pipe_no_command(name, tmp_path):
    saved = compose_config(SETS).as_dict()
    saved["tasks"]["sets"] = [name, "owl"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match="give a plain folder name of letters"):
        load_config(tmp_path / "config.yaml", ["data.url=pipe:cat x/{}", "data.allow_pipe=true"])


def test_commands_open_every_set_and_tell_classes_of_one_name_apart(root, trained, capsys):
    cfg = compose_config([*RUN, f"data.root={root}", *SETS])
    verify.run(cfg)
    assert "36 training and 63 test images, every shard as it was written" in capsys.readouterr().out
    assert missing_inputs([cfg]) == []
    printed = report_of(Namespace(run=trained[1], options=[f"data.root={root}"], data=None, json=True, classes=False), World.alone())
    names = ["class 0 (1)", "class 1 (2)", "class 2 (3)", "class 0 (4)", "class 1 (5)", "class 0 (6)", "class 1 (7)", "class 2 (8)"]
    assert list(json.loads(printed)["classes"]) == [*names, "class 3"]


def test_a_set_without_shards_is_named_with_the_command_that_builds_it(root):
    cfg = compose_config([*RUN, f"data.root={root}", f"run.root={root}/runs", "data=sets", "tasks.sets=[fox,yak]"])
    with pytest.raises(FileNotFoundError, match=r"yak/index\.json is missing; build .*\n.*data=folder data\.name=yak"):
        train(cfg, World.alone())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tasks.sets=[../fox,owl]"], r"tasks\.sets='\.\./fox': give a plain folder name"),
        (["tasks.sets=[a/b/c]"], r"tasks\.sets='a/b/c'"),
        (["data=cifar100", "tasks.sets=[fox,owl]"], r"tasks\.sets=\['fox', 'owl'\]: each set is one task.*tasks\.order='paper'"),
        (["data=sets", "tasks.sets=[fox,owl]", "tasks.base=2"], r"tasks\.base=2 mean nothing; use data=sets"),
    ],
)
def test_options_that_contradict_the_sets_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        compose_config(options)


def test_names_of_organisations_can_be_sets():
    cfg = compose_config(["data=sets", "tasks.sets=[org/fox,owl]"])
    assert cfg.data.name == "org-fox-owl" and cfg.run.name.startswith("org-fox-owl-moe")

"""Claims about a run folder that is damaged or comes from someone else: it is data, each file belongs to one run, and damage is named."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pyarrow.parquet
import pytest
import torch
import yaml

from dist_vlcl import experiment, train
from dist_vlcl.commands import evaluate, sweep
from dist_vlcl.commands import report as report_command
from dist_vlcl.config import Config, compose_config, load_config
from dist_vlcl.dist.agree import DisagreementError
from dist_vlcl.dist.collectives import Collectives
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.reading import seal, to_line
from dist_vlcl.report.records import read_records, read_units, run_frame
from dist_vlcl.run import checkpoint
from dist_vlcl.run.folder import RunConfig, RunFolder, RunRefused
from dist_vlcl.run.signals import Preemption
from dist_vlcl.run.state import TrainState
from dist_vlcl.run.unit_records import UnitRecords
from tests.helpers import mutate
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import write_run
from tests.helpers.shards import make_index
from tests.helpers.tiny_clip import architecture
from tests.run.test_checkpoint import tensors
from tests.run.test_log import open_log, printed
from tests.run.test_unit_records import go_on
from tests.test_train import configured, run_once

RESULTS = {"last": 0.5, "avg": 0.5, "forgetting": 0.0, "rows": [[[1, 2]]]}
CONFIG = {"seed": 0, "run": {"name": "a"}}


def open_run(root: Path, **more) -> RunFolder:
    return RunFolder.open(RunConfig(name="a", root=str(root)), CONFIG, World.alone(), **more)


def saved_config(folder: Path, *options: str, **groups: dict) -> Path:
    config = compose_config(options).as_dict()
    for group, values in groups.items():
        config[group] = {**config[group], **values}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder / "config.yaml"


# A configuration is data


OUTSIDE = {
    "a command": {"data": {"url": "pipe:touch hacked; cat {}", "allow_pipe": True}},
    "an address": {"data": {"url": "https://elsewhere/{}"}},
    "a folder": {"data": {"root": "/elsewhere"}},
    "a folder above": {"data": {"root": "data/../../elsewhere"}},
    "a file of weights": {"model": {"pretrained": "/elsewhere/weights.pt"}},
    "a file of weights in the run folder": {"model": {"pretrained": "runs/mine/weights.pt"}},
    "a file of weights here": {"model": {"pretrained": "weights.pt"}},
    "an estimator": {"zo": {"estimator": "antigravity:Class"}},
    "an adapter": {"adapter": {"kind": "antigravity:Class"}},
}


@pytest.mark.parametrize("groups", OUTSIDE.values(), ids=OUTSIDE)
def test_what_leads_out_of_a_run_folder_counts_only_on_the_command_line(tmp_path, monkeypatch, capsys, groups):
    monkeypatch.chdir(tmp_path)
    saved_config(tmp_path / "run", **groups)
    monkeypatch.setattr(sys, "argv", ["evaluate", "run"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    said = capsys.readouterr().err
    assert "only a command line may name. To trust them, add: " in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run"} and "antigravity" not in sys.modules


def test_an_option_that_is_repeated_counts_and_one_that_decides_the_result_does_not(tmp_path):
    path = saved_config(tmp_path, data={"url": "pipe:cat {}", "allow_pipe": True, "root": "/there"})
    data = load_config(path, ["data.url=pipe:zcat '{}'", "data.allow_pipe=true", "data.root=/here"]).data
    assert (data.url, data.allow_pipe, data.root) == ("pipe:zcat '{}'", True, "/here")
    with pytest.raises(ValueError, match=r"add: data\.allow_pipe=True$"):
        load_config(path, ["data.url=pipe:cat {}", "data.root=/here"])
    with pytest.raises(ValueError, match=r"seed: the run decides this"):
        load_config(path, ["seed=1"])
    path = saved_config(tmp_path, zo={"estimator": "antigravity:Class"})
    assert load_config(path, ["zo.estimator=finite_difference"]).zo.estimator == "finite_difference"


def test_a_value_that_is_not_allowed_names_the_file_that_holds_it(tmp_path):
    path = saved_config(tmp_path, model={"prompt": "a photo"})
    with pytest.raises(ValueError, match=r"config\.yaml: model\.prompt='a photo': must contain"):
        load_config(path)


HUGE = {"cluster": ("threads", "timeout_s"), "data": ("num_workers", "timeout_s"), "adapter": ("experts", "bottleneck")}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in HUGE.items() for name in names])
def test_a_saved_configuration_cannot_ask_for_a_billion_of_anything(tmp_path, group, name):
    path = saved_config(tmp_path, **{group: {name: 10**9}})
    with pytest.raises(ValueError, match=rf"config\.yaml: {group}\.{name}=1000000000\S*: give a number of .* and at most"):
        load_config(path)


@pytest.mark.parametrize("text", ["data: {name: '${oc.env:SECRET}'}", "'${oc.env:SECRET}': 1", "data: {x: [1, '${seed}']}"])
def test_no_interpolation_is_resolved(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "hush")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"holds an interpolation") as refused:
        load_config(tmp_path / "config.yaml")
    assert "hush" not in str(refused.value)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
ODD = {"empty": "", "a list": "- a\n", "a number": "5", "a bomb": BOMB, "deep": "[" * 1000, "binary": "\x00\x01", "numbers": "1: 2\n"}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_configuration_of_another_kind_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        load_config(tmp_path / "config.yaml")
    run = tmp_path / "a"
    open_run(tmp_path).close()
    (run / "config.yaml").write_text(text)
    with pytest.raises(RunRefused, match=r"config\.yaml is damaged"):
        open_run(tmp_path)


def test_weights_that_lie_in_the_working_directory_under_the_name_of_a_tag_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved_config(tmp_path / "run", model={"pretrained": "openai"})
    assert load_config(path).model.pretrained == "openai"
    (tmp_path / "openai").touch()
    with pytest.raises(ValueError, match=r"add: model\.pretrained=openai$"):
        load_config(path)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(OSError, match="not a regular file"):
        load_config(tmp_path / "config.yaml")


# One identity of a run


def test_a_process_that_has_lost_its_folder_writes_nothing_into_the_next_run_of_that_name(tmp_path):
    old = open_run(tmp_path)
    shutil.rmtree(old.path)
    new = open_run(tmp_path)
    for write in (old.check_owner, old.request_requeue, lambda: old.write_accuracy(RESULTS, complete=True)):
        with pytest.raises(RunRefused, match="was moved or replaced"):
            write()
    assert not (new.path / "REQUEUE").exists() and not (new.path / "accuracy.json").exists()
    new.write_accuracy(RESULTS)


def test_a_checkpoint_and_a_result_of_another_run_are_not_used(tmp_path):
    """The old process was between its look at the folder and its write."""
    old = open_run(tmp_path)
    old.write_accuracy(RESULTS, complete=True)
    checkpoint.save(old.path, 9, tensors(9), {}, keep=2, identity=old.identity)
    left = [(path.relative_to(old.path), path.read_bytes()) for path in old.path.rglob("*.*") if path.suffix in (".json", ".safetensors")]
    shutil.rmtree(old.path)
    new = open_run(tmp_path)
    checkpoint.save(new.path, 2, tensors(2), {}, keep=2, identity=new.identity)
    for name, content in left:
        if name.name != "env.json":
            (new.path / name).write_bytes(content)
    new.close()
    with pytest.warns(RuntimeWarning, match="accuracy.json belongs to another run"):
        again = open_run(tmp_path)
    assert not again.is_complete and again.identity == new.identity
    with pytest.warns(RuntimeWarning, match="step-00000009.safetensors belongs to another run; using step-00000002"):
        assert checkpoint.load_newest(again.path, again.identity).step == 2


def test_a_checkpoint_of_other_data_or_another_configuration_is_refused_though_env_json_is_gone(tmp_path):
    run = open_run(tmp_path, data="one")
    checkpoint.save(run.path, 1, tensors(1), {}, keep=2, identity=run.identity)
    run.close()
    (run.path / "env.json").unlink()
    again = open_run(tmp_path, data="two")
    assert again.identity["run"] == run.identity["run"]
    with pytest.raises(ValueError, match=r"saved with other data"):
        checkpoint.load_newest(again.path, again.identity)
    with pytest.raises(ValueError, match="saved with another configuration"):
        checkpoint.load_newest(again.path, {**run.identity, "config": "c"})


def test_a_run_is_refused_on_other_data_before_it_has_a_checkpoint(tmp_path):
    open_run(tmp_path, data="one").close()
    with pytest.raises(RunRefused, match=r"was started on other data \(digest was one, is two\)"):
        open_run(tmp_path, data="two")
    open_run(tmp_path, data="one").close()


def test_a_copy_of_a_run_goes_on_under_its_own_name(tmp_path):
    run = open_run(tmp_path)
    checkpoint.save(run.path, 1, tensors(1), {}, keep=2, identity=run.identity)
    shutil.copytree(run.path, tmp_path / "b")
    copy = RunFolder.open(RunConfig(name="b", root=str(tmp_path)), {**CONFIG, "run": {"name": "b"}}, World.alone())
    assert checkpoint.load_newest(copy.path, copy.identity).step == 1


# Damage is named


WRONG = ["5", '"x"', "{", "[[]]", '{"wandb": 1}', "[" * 30000, "9" * 9000]
OF_OTHERS = ['{"complete": true}', '{"complete": 1}']  # such keys do no harm in trackers.json


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *itertools.product(["accuracy.json", "env.json", "trackers.json"], WRONG),
        *itertools.product(["accuracy.json", "env.json"], OF_OTHERS),
    ],
)
def test_json_of_another_kind_is_ignored_with_a_warning(tmp_path, name, text):
    run = open_run(tmp_path)
    run.write_accuracy(RESULTS, complete=True)
    checkpoint.save(run.path, 1, tensors(1), {}, keep=2, identity=run.identity)
    run.close()
    (run.path / name).write_text(text)
    with pytest.warns(RuntimeWarning, match=name):
        again = open_run(tmp_path)
        open_log(again.path).close()
    assert again.is_complete == (name != "accuracy.json")


def test_a_changed_digit_in_a_result_is_noticed(tmp_path, monkeypatch):
    kept, changed, moved = (write_run(tmp_path, f"run.name={name}", f"seed={seed}", last=0.9, avg=0.9) for seed, name in enumerate("abc"))
    text = (changed / "accuracy.json").read_text()
    (changed / "accuracy.json").write_text(text.replace('"last": 0.9', '"last": 0.8'))
    (moved / "config.yaml").write_text((moved / "config.yaml").read_text().replace("probes: 1", "probes: 2"))
    assert "probes: 2" in (moved / "config.yaml").read_text()
    said = report_of(monkeypatch, tmp_path, kept, changed, moved)
    assert "b (could not read" in said and "CRC-32" in said
    assert "c (could not read" in said and "belongs to another configuration" in said and "a (could" not in said


def report_of(monkeypatch, tmp_path: Path, *folders: Path) -> str:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders), "--out", str(tmp_path / "report")])
    report_command.main()
    return (tmp_path / "report/report.md").read_text()


def test_one_damaged_run_does_not_stop_the_report_of_the_others(tmp_path, monkeypatch):
    names = ("good", "empty", "units", "picture")
    folders = {name: write_run(tmp_path, f"run.name={name}", f"seed={k}", last=0.5, avg=0.5) for k, name in enumerate(names)}
    (folders["empty"] / "accuracy.json").write_text('{"complete": true}')
    go_on(folders["units"], 1, 3)
    part = folders["units"] / "units/step-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    hostile = "![x](&#47;etc&#47;passwd) $\\frac{"
    config = yaml.safe_load((folders["picture"] / "config.yaml").read_text())
    (folders["picture"] / "accuracy.json").write_text(json.dumps({**RESULTS, "complete": True}))
    (folders["picture"] / "config.yaml").write_text(yaml.safe_dump({**config, "zo": {**config["zo"], "directions": hostile}}))
    said = report_of(monkeypatch, tmp_path, *folders.values())
    assert "empty (could not read" in said and "units (could not read" in said and "good (could" not in said
    html = (tmp_path / "report/report.html").read_text()
    assert "&amp;#47;etc" in html and all("image/png" in picture.split('"')[0] for picture in html.split('src="')[1:])


def silently_changed(content: bytes) -> bytes:
    """Flip a bit of a Parquet file that only the checksums of its pages show: without them its table reads, and is another."""
    right = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    for number in range(8 * 20, 8 * 400, 8):
        flipped = mutate.flip_bit(content, number)
        with contextlib.suppress(OSError, pyarrow.ArrowException):
            if not pyarrow.parquet.read_table(pyarrow.BufferReader(flipped)).equals(right):
                return flipped
    raise AssertionError("no such bit")


def test_damaged_records_of_units_are_set_aside_and_the_run_goes_on(tmp_path):
    go_on(tmp_path, 1, 6)
    part = tmp_path / "units/step-00000004.parquet"
    part.write_bytes(silently_changed(part.read_bytes()))
    with pytest.raises(ValueError, match=r"step-00000004\.parquet is damaged"):
        read_units(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"step-00000004\.parquet is damaged.*the run goes on"):
        UnitRecords(tmp_path, [], every=1, step=6)
    assert set(read_units(tmp_path)["step"].to_pylist()) == {1, 2, 3} and (tmp_path / "step-00000004.parquet.damaged").exists()


@pytest.mark.parametrize(
    ("edit", "text"),
    [(lambda lines: lines[:1] + lines[2:], "missing: 1, the first is"), (lambda lines: lines + lines[1:2], "doubled: 1, the first is")],
)
def test_a_hole_or_a_doubled_line_before_the_checkpoint_is_named_at_a_resume(tmp_path, edit, text):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step, "task": 0})
        log.journal({"step": step, "task": 0})
    log.close()
    assert "damaged" not in printed(open_log(tmp_path, TrainState(step=3)))
    for name in ("metrics.jsonl", "journal.jsonl"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"".join(edit(whole.splitlines(keepends=True))))
        said = printed(open_log(tmp_path, TrainState(step=3)))
        assert f"{name} was damaged before the checkpoint of step 3: steps {text}" in said
        (tmp_path / name).write_bytes(whole)


def test_a_line_of_the_metrics_that_was_moved_is_named_at_a_resume(tmp_path):
    log = open_log(tmp_path)
    log.step({"step": 1, "task": 0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))  # the run's line after the first step
    assert "metrics.jsonl was damaged before the checkpoint of step 1: lines in another order" in printed(
        open_log(tmp_path, TrainState(step=1))
    )


def test_a_changed_digit_in_a_metric_is_left_out_with_a_warning(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2):
        log.step({"step": step, "task": 0, "loss": 0.25})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.25', '"loss": 0.35', 1))
    with pytest.warns(RuntimeWarning, match=r"metrics.jsonl: 1 damaged lines were left out"):
        assert [record["step"] for record in read_records(tmp_path)["step"]] == [2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "journal.jsonl"])
@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda lines: lines[:2] + lines[3:], "missing: 1"),
        (lambda lines: lines[:-2], "missing: "),
        (lambda lines: [], "missing: "),
        (lambda lines: lines + lines[2:3], "doubled: 1"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "in another order"),
    ],
)
def test_a_hole_a_doubled_line_or_another_order_is_named_in_the_report(tmp_path, monkeypatch, name, edit, text):
    run = write_run(tmp_path, "orders=dual_all", "tasks.num_tasks=1", last=0.5, avg=0.5, records=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run_frame([run])
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join(edit(lines)))
    with pytest.warns(RuntimeWarning, match=rf"{name} is damaged: steps {text}"):
        run_frame([run])


def test_a_hostile_step_costs_no_memory_or_is_left_out(tmp_path):
    for step, said in ((10**12, "steps missing: 999999999999, the first is 1"), (1 << 70, "1 damaged lines were left out")):
        (tmp_path / "metrics.jsonl").write_text(to_line(seal({"kind": "step", "step": step, "task": 0, "loss": 1.0})))
        with pytest.warns(RuntimeWarning, match=said):
            read_records(tmp_path)


OTHER_TYPES = "b/config.yaml is damaged: its values have other types"


@pytest.mark.parametrize(
    ("group", "change", "reason"),
    [
        ("train", {"epochs": "x"}, "could not read its files"),
        ("train", {"batch_size": [1]}, "could not read its files"),
        ("tasks", {"increment": "x"}, OTHER_TYPES),
        ("tasks", {"increment": [1]}, OTHER_TYPES),
        ("zo", {"name": {}}, OTHER_TYPES),
        ("orders", {"branch": 5}, OTHER_TYPES),
    ],
)
def test_a_configuration_with_impossible_values_costs_the_report_one_run(tmp_path, group, change, reason):
    runs = [write_run(tmp_path, f"run.name={name}", f"seed={k}", "data=cifar100", last=0.5, avg=0.5) for k, name in enumerate("ab")]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    (runs[1] / "config.yaml").write_text(yaml.safe_dump({**config, group: {**config[group], **change}}))
    accuracy = json.loads((runs[1] / "accuracy.json").read_text())
    del accuracy["config"], accuracy["crc"]
    (runs[1] / "accuracy.json").write_text(json.dumps(accuracy))
    frame, unreadable = run_frame(runs)
    assert list(frame.run) == ["a"] and reason in unreadable["b"]


def with_header(path: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


UNREADABLE = {
    "an unknown type": lambda path: with_header(path, {"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}),
    "a type without torch": lambda path: with_header(path, {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}),
    "no metadata": lambda path: with_header(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "text as metadata": lambda path: with_header(
        path, {"__metadata__": {"state": "["}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_a_checkpoint_that_cannot_be_read_falls_back_to_the_older_one(tmp_path, damage):
    checkpoint.save(tmp_path, 1, tensors(1), {}, keep=2, identity={})
    damage(checkpoint.save(tmp_path, 2, tensors(2), {}, keep=2, identity={}))
    with pytest.warns(RuntimeWarning, match="step-00000002.*using step-00000001"):
        assert checkpoint.load_newest(tmp_path).step == 1


# Ranks and processes


NAMED = {
    "packages": "packages.pillow: ranks [1] differ",
    "code": "the code: ranks [1] differ from rank 0",
    "seed": "configuration.seed: ranks [1] differ from rank 0 (rank 0: 0; rank 1: 1)",
    "pixels": "the model's inputs.image: ranks [1] differ",
    "tokens": "the model's inputs.prompts: ranks [1] differ",
}


def with_others(world: World, cfg: Config) -> list[str]:
    """Return what rank 1 is told where its own is another, for each of these."""
    architecture(3, 3)
    versions, pixels, tokens = experiment.package_versions(), experiment.transformed_sample, TwoTowers.prompts
    other = {
        "packages": mock.patch.object(experiment, "package_versions", lambda: {**versions, "pillow": "1.1"}),
        "code": mock.patch.object(experiment, "code_digest", lambda: "dist_vlcl 0.1.0 another"),
        "pixels": mock.patch.object(experiment, "transformed_sample", lambda size: pixels(size) + 1),
        "tokens": mock.patch.object(TwoTowers, "prompts", lambda *arguments: tokens(*arguments) + 1),
    }
    said = []
    for what in NAMED:
        mine = replace(cfg, seed=1) if what == "seed" and world.rank == 1 else cfg
        with other[what] if what in other and world.rank == 1 else contextlib.nullcontext():
            try:
                train.train(mine, world)
                said.append("trained")
            except DisagreementError as error:
                said.append(str(error))
    return said


def test_what_differs_on_a_rank_is_named_before_training(tmp_path):
    cfg = configured(tmp_path, f"model.name={architecture(3, 3)}", "model.pretrained=random")
    for said in run_ranks(with_others, 2, cfg):
        assert all(named in one for named, one in zip(NAMED.values(), said, strict=True)), said
    assert not (tmp_path / "runs").exists()


def threads_by_default(world: World) -> int:
    os.environ["OMP_NUM_THREADS"] = "3"
    torch.set_num_threads(3)
    World.from_environment(ClusterConfig(device="cpu"))
    return torch.get_num_threads()


def test_a_rank_computes_on_one_thread_unless_the_configuration_says_otherwise():
    assert run_ranks(threads_by_default, 1) == [1]


def test_a_resume_with_another_number_of_threads_says_so(tmp_path, capsys):
    tiny = [f"model.name={architecture(3, 3)}", "model.pretrained=random", "tasks.num_tasks=1", "eval.zero_shot=false"]
    cfg = configured(tmp_path, *tiny, "orders=dual_all")
    assert run_ranks(run_once, 1, cfg, 2) == ["requeued"]
    torch.set_num_threads(2)
    try:
        train.train(cfg, World.alone())
    finally:
        torch.set_num_threads(1)
    assert "resuming with 2 CPU threads per rank what 1 have computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("[../gloo/transport] Connection closed by peer", "error on rank 1 of 2: a collective of torch at step 7: rank 0 (one) has died"),
        ("no memory", "error on rank 1 of 2: no memory"),
    ],
)
def test_an_error_of_the_network_names_rank_and_step_wherever_it_comes_from(monkeypatch, capsys, error, said):
    world = World(1, 2, collectives=Collectives(1, ["one", "two"], 1))

    def fail(*_: object) -> None:
        world.collectives.where = "step 7"
        raise RuntimeError(error)

    monkeypatch.setattr(World, "from_environment", lambda _: world)
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit):
        train.run_and_report(compose_config([]))
    assert capsys.readouterr().err.startswith(said)


def test_a_rank_that_does_not_meet_the_others_names_itself(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail(_: object) -> None:
        raise RuntimeError("nobody came")

    monkeypatch.setattr(World, "from_environment", fail)
    with pytest.raises(SystemExit):
        train.run_and_report(compose_config([]))
    assert capsys.readouterr().err.startswith("error on rank 1 of 2: nobody came")


TRAINER = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def until(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def test_a_sweep_that_is_killed_takes_its_trainer_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pid = os.fork()
    if pid == 0:
        sweep.train([sys.executable, "-c", TRAINER], Preemption())
        os._exit(1)
    until(tmp_path / "ready")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(tmp_path / "saved")


def test_a_terminal_that_is_gone_does_not_stop_a_run(tmp_path):
    log = open_log(tmp_path)
    log._console.file.write = lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    log.say("a message")
    log.table("", ["a"], [["b"]])
    log.step({"step": 1, "task": 0})
    assert len(read_records(tmp_path)["step"]) == 1


def test_shards_are_for_whom_the_umask_allows(tmp_path):
    before = os.umask(0o077)
    try:
        make_index(tmp_path, num_classes=1)
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "tiny", tmp_path / "tiny/index.json")] == ["0o700", "0o600"]


def test_a_name_does_not_steer_the_terminal(tmp_path):
    log = open_log(tmp_path)
    log.say("data \x1b[2J")
    log.table("", ["name"], [["\x1b[31mred"]])
    assert "\x1b" not in printed(log) and "\\x1b[31mred" in printed(log)

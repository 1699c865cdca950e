"""A sweep trains what is missing, continues after a failure and names it, and stops at a signal; with real runs on the digits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from contextlib import nullcontext

import pytest
import yaml
from rich.console import Console

from dist_vlcl.commands import sweep
from dist_vlcl.data.shards import open_index
from dist_vlcl.report.records import read_records
from dist_vlcl.run.folder import as_saved
from dist_vlcl.saved import digest_of
from tests.helpers.ranks import warm_python
from tests.helpers.runs import write_run

SHORT = ["data=digits", "model=small", "tasks.increment=2", "tasks.order=natural", "tasks.num_tasks=1", "train.max_steps=1"]
QUIET = ["train.batch_size=16", "eval.zero_shot=false", "run.trackers=[]", "run.progress=false", "cluster.threads=1"]
QUIET += ["run.plots=false", "run.record_every_steps=0"]


def swept(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit status and everything that it and its runs have printed."""
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    return ended.value.code, "".join(capfd.readouterr())


def test_a_failed_run_is_named_and_does_not_hold_up_the_others_and_the_next_sweep_trains_only_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["paper=t1-moe-cifar20-fo,t1-moe-cifar20-dual", *SHORT, *QUIET, "--launcher", warm_python()]
    first, second = (item.folder for item in sweep.prepare(sweep.command_lines(words[:-2])))
    (first / "checkpoints").mkdir(parents=True)  # of a run whose config.yaml is lost
    status, said = swept(monkeypatch, capfd, *words)
    assert status == 1 and f"failed: {first.name}" in said and "cannot continue" in said
    assert re.search(rf"{second.name} +done", said) and read_records(second)["step"]
    shutil.rmtree(first)
    own = {key: yaml.safe_load((second / "config.yaml").read_text())[key] for key in ("first_order", "run")}
    written = (second / "metrics.jsonl").stat().st_mtime_ns
    status, said = swept(monkeypatch, capfd, *words, "--item", "1")
    assert status == 0 and "0 of 1 to train" in said and not first.exists()
    status, said = swept(monkeypatch, capfd, *words)
    assert status == 0 and "1 of 2 to train" in said
    assert re.search(rf"{first.name} +done", said) and re.search(rf"{second.name} +complete before", said)
    assert (second / "metrics.jsonl").stat().st_mtime_ns == written
    # the result of other options is not taken for that of these, though the folder's name is the same
    words = [*words, f"run.name={second.name}", f"first_order.lr={2 * own['first_order']['lr']}", "--item", "1"]
    status, said = swept(monkeypatch, capfd, *words)
    assert status == 2 and "first_order.lr: 0.001 -> 0.002; choose another folder" in said and "to train" not in said
    status, said = swept(monkeypatch, capfd, *[word for word in words if "max_steps" not in word and "first_order.lr" not in word])
    assert status == 2 and "train.max_steps: 1 -> None; choose another folder" in said


def test_a_run_that_fails_at_once_is_not_taken_for_one_that_a_signal_stopped_before(tmp_path, monkeypatch):
    """Its folder has the marker of an earlier stop; the sweep would leave out all runs after it."""
    monkeypatch.chdir(tmp_path)
    items = sweep.prepare(sweep.command_lines(["paper=t1-moe-cifar20-fo,t1-moe-cifar20-dual", *SHORT, *QUIET]))
    items[0].folder.mkdir(parents=True)
    (items[0].folder / "REQUEUE").touch()
    outcomes = sweep.run_all(items, [sys.executable, "-c", "raise SystemExit(2)"], Console(quiet=True))
    assert list(outcomes.values()) == ["FAILED (exit status 2)"] * 2


@pytest.mark.parametrize(
    ("was", "asked", "is_other"),
    [
        (["train.batch_size=16", "train.epochs=3"], ["train.batch_size=null", "train.epochs=null"], True),
        (["tasks.num_tasks=1"], [], True),
        (["orders.order=frozen", "zo.probes=1"], ["orders.order=frozen", "zo.probes=16"], False),  # which frozen units do not read
        (["orders=first", "zo.probes=1"], ["orders=first", "zo.probes=16"], False),
        (["zo.probes=1"], ["zo.probes=16"], True),
        (["run.keep=1"], ["run.keep=2"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "interrupted"])
def test_a_run_with_other_options_is_not_taken_for_that_of_these(tmp_path, was, asked, is_other, is_complete):
    own = [f"run.root={tmp_path}", "run.name=same"]
    folder = write_run(tmp_path, *own, *was, last=0.5, avg=0.5)
    accuracy = json.loads((folder / "accuracy.json").read_text())
    del accuracy["crc"]
    ended = {"complete": True, "train_images": 9} if is_complete else {"complete": False}
    (folder / "accuracy.json").write_text(json.dumps({**accuracy, **ended}))
    is_other |= not is_complete and "zo.probes=1" in was  # a resume refuses it
    [item] = sweep.prepare([(*own, *asked)])
    assert item.is_complete == is_complete and item.folder == folder
    with pytest.raises(ValueError, match="has a run with other options") if is_other else nullcontext():
        item.check()


def test_the_numbers_that_an_earlier_version_fitted_are_the_null_of_today(tmp_path):
    own = [f"run.root={tmp_path}", "run.name=same"]
    write_run(tmp_path, *own, "train.batch_size=16", "train.epochs=3", last=0.5, avg=0.5)  # its accuracy.json has no train_images
    [item] = sweep.prepare([(*own, "train.batch_size=null", "train.epochs=null")])
    item.check()


def test_the_result_of_other_images_is_not_taken_for_that_of_these(tmp_path):
    own = [f"run.root={tmp_path}", "run.name=same", f"data.root={tmp_path}/data"]
    folder = write_run(tmp_path, *own, last=0.5, avg=0.5)
    [item] = sweep.prepare([tuple(own)])
    (folder / "env.json").write_text(json.dumps([{"data": "0123456789abcdef0123"}]))
    item.check()  # the data are not on this machine
    [elsewhere] = sweep.prepare([(*own, "data.url=http://127.0.0.1:9")])
    digest = open_index(item.config.data).fingerprint
    with pytest.raises(ValueError, match=f"same has a run on other data .digest was 0123456789abcdef, is {digest[:16]}"):
        item.check()
    with warnings.catch_warnings(action="error"):
        elsewhere.check()  # no server is asked
    (folder / "env.json").write_text(json.dumps([{"data": digest}]))
    item.check()


def test_a_number_of_processes_below_one_is_refused(monkeypatch, capfd):
    status, said = swept(monkeypatch, capfd, "paper=t1-moe-cifar20-fo", "--processes", "-3", "--list")
    assert status == 2 and "--processes -3: give at least 1" in said


def test_missing_data_and_weights_are_named_once_and_before_the_first_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["paper=t1-moe-cifar20-fo,t1-moe-cifar20-dual", "model=small", "model.pretrained=/none.safetensors", *QUIET]
    status, said = swept(monkeypatch, capfd, *words)
    assert status == 2 and said.count("cifar100/index.json is missing; build the shards first") == 1
    assert said.count("model.pretrained='/none.safetensors': could not load the weights") == 1 and "to train" not in said
    assert not (tmp_path / "runs").exists()


def test_a_signal_stops_the_sweep_with_its_run_saved(tmp_path):
    """Slurm's SIGUSR1, to the sweep alone."""
    long = [word for word in SHORT if "max_steps" not in word] + ["train.epochs=1000"]
    command = [
        warm_python(),
        "-m",
        "dist_vlcl",
        "sweep",
        "paper=t1-moe-cifar20-dual,t1-moe-cifar20-fo",
        *long,
        *QUIET,
        "--processes",
        "1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not any(read_records(folder)["step"] for folder in tmp_path.glob("runs/*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == os.EX_TEMPFAIL and "the same command continues from here" in said
    [folder] = tmp_path.glob("runs/*")
    assert (folder / "REQUEUE").exists() and list(folder.glob("checkpoints/step-*"))


def test_seeds_controls_and_groups_are_planned_each_once():
    assert len(sweep.command_lines(["paper=all,figure8"])) == 116
    assert len(sweep.command_lines(["paper=figure8"])) == 30 and len(sweep.command_lines(["paper=figure8", "seed=7"])) == 6
    planned = sweep.command_lines(["paper=t3-*-cifar10-*,t2-moe-cifar10-dual-hop_odd", "seed=0,1", "train.epochs=2"], controls=True)
    ids = [words[0].removeprefix("paper=") for words in planned]
    odd, even = (
        [f"{control}-moe-cifar10-dual-{layers}" for control in ("frozen", "signwalk", "sign")] for layers in ("hop_odd", "hop_even")
    )
    assert ids == [
        *("t3-moe-cifar10-mozo-hop_odd", "t3-moe-cifar10-mozo-hop_even") * 2,
        *["t2-moe-cifar10-dual-hop_odd"] * 2,
        *(*odd, "zero-shot-cifar10", *even) * 2,
        *["walk-moe-cifar10-dual-hop_odd"] * 2,
    ]
    assert all(words[2:] == ("train.epochs=2",) for words in planned) and len(set(planned)) == len(planned)
    some = planned[:2] + planned[-2:]  # composing takes a quarter of a second each
    folders = [item.folder.name for item in sweep.prepare(some)]
    assert len(set(folders)) == len(folders) and all("-epochs_2-" in name for name in folders)
    first, *others = sweep.command_lines(["paper=t1-moe-cifar20-fo,t1-moe-cifar20-dual", "zo.lr_scale=1,3"])  # first order does not read zo
    assert first == ("paper=t1-moe-cifar20-fo", "seed=0")
    assert others == [("paper=t1-moe-cifar20-dual", "seed=0", f"zo.lr_scale={scale}") for scale in (1, 3)]


def test_without_a_row_of_the_paper_every_combination_of_values_is_a_run_with_a_name_of_its_own():
    words = ["seed=0,1", "zo.clip=5,null", "orders.rest={language: first, vision: frozen},first"]
    planned = sweep.command_lines(["run.root=here", "tasks.order=[1,0]", "orders=dual_all", *words])
    assert len(set(planned)) == 8 and all({"run.root=here", "tasks.order=[1,0]"} < set(run) for run in planned)
    assert planned[0][2:6] == ("orders=dual_all", "seed=0", "zo.clip=5", "orders.rest={language: first, vision: frozen}")
    items = sweep.prepare(planned)
    name = "digits-inc2-moe-mozo-dual-all-{}seed{}-clip_{}-rest_{}"
    assert items[0].folder.name == name.format("rest-mixed-", 0, 5, "_language_first_vision_frozen_")
    assert items[-1].folder.name == name.format("", 1, "null", "first") and len({item.folder for item in items}) == 8
    assert len(sweep.command_lines(["paper=t1-moe-cifar20-fo", "seed=0, 1", "train.epochs=1,2,3"])) == 6
    first, *others = sweep.command_lines(["orders=first,dual_all", "zo=mozo,sign", "seed=3,3"])  # first order does not read zo
    assert first == ("orders=first", "seed=3") and [words[1] for words in others] == ["zo=mozo", "zo=sign"]
    scaled = sweep.command_lines(["orders=first,dual_all", "++zo.lr_scale=1,3", "adapter.dropout=0,0.1"])
    assert [words[:2] for words in scaled[:2]] == [("orders=first", f"adapter.dropout={rate}") for rate in ("0", "0.1")]
    names = [words[-1].removeprefix("run.name=auto-") for words in scaled]
    assert names == ["dropout_0", "dropout_0.1", *(f"lr_scale_{scale}-dropout_{rate}" for scale in (1, 3) for rate in ("0", "0.1"))]
    assert sweep.command_lines(["zo.clip=1,2", "run.name=auto-x"])[1] == ("zo.clip=2", "run.name=auto-x-clip_2")
    assert sweep.command_lines(["orders.order=zeroth,frozen", "data.source='a,b'"])[1] == ("orders.order=frozen", "data.source='a,b'")


def test_a_run_saved_before_there_were_options_of_own_estimators_is_the_same_run():
    [item] = sweep.prepare([("seed=1",)])
    saved = as_saved(item.config.as_dict())
    del saved["zo"]["estimator_options"]
    assert item.changes(saved) == {} and digest_of(saved) == digest_of(as_saved(item.config.as_dict()))
    assert list(item.changes(saved | {"seed": 2})) == ["seed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,1", "--controls"], "--controls needs paper=..."),
        (["train.epochs=1,2", "run.name=one", "--item", "2"], "--item 2: choose from 0 to 1"),
        (["seed=0,1", "run.name=one"], "seed=0 run.name=one and seed=1 run.name=one would share the folder"),
        (["first_order.betas=0.9,0.99"], "write a list in brackets and quotes: 'first_order.betas=[0.9]'"),
        (["seed=0,1", "orders.layers=[3],[13]"], "seed=0 'orders.layers=[13]' run.name=auto-layers__13_: "),
        (["paper=table9"], "paper='table9': no such run"),
        (["paper=table3", "fast"], "'fast' is not an option: give OPTION=VALUE"),
        (
            ["paper=t3-moe-cifar10-*", "train.epoch=2"],
            "mozo-hop_odd seed=0 train.epoch=2: train.epoch: no such option",
        ),
        (["paper=t3-moe-cifar10-*", "zo.sides=3"], "zo.sides=3: choose from 1, 2"),
        (["paper=t3-moe-cifar10-*", "run.name=one"], "would share the folder"),
        (["paper=t3-moe-cifar10-*", "orders.layers=[13]"], "paper=t3-moe-cifar10-mozo-hop_odd seed=0 'orders.layers=[13]': "),
        (["paper=table3", "--item", "6"], "--item 6: choose from 0 to 5"),
        (["paper=table3", "train.epoch=2", "--count"], "train.epoch: no such option; did you mean train.epochs?"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_anything_runs(words, message, monkeypatch, capfd):
    status, said = swept(monkeypatch, capfd, *words)
    assert status == 2 and message in said


def test_count_prints_the_number_of_runs_and_several_processes_are_started_by_accelerate(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["sweep", "paper=table3", "--count"])
    sweep.main()
    assert capfd.readouterr().out == "6\n"
    launcher = sweep.launcher_of(Namespace(launcher=None, processes=2))
    assert launcher[:5] == [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
    ]


def test_a_folder_of_own_configurations_reaches_every_run(tmp_path, monkeypatch, capfd):
    (tmp_path / "zo").mkdir()
    (tmp_path / "zo/mine.yaml").write_text("name: mine\n")
    monkeypatch.setattr(sys, "argv", ["sweep", "--config-dir", str(tmp_path), "paper=table3", "zo=mine", "--list"])
    sweep.main()
    assert {f"file://{tmp_path}" in line for line in capfd.readouterr().out.splitlines()} == {True}

import errno
import fcntl
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from dist_vlcl.dist.world import World
from dist_vlcl.masking import masked
from dist_vlcl.options import validate
from dist_vlcl.run import folder
from dist_vlcl.run.environment import code_version
from dist_vlcl.run.folder import RunConfig, RunFolder, RunRefused, differences
from dist_vlcl.saved import MAY_CHANGE
from tests.run.alone import Follower

CONFIG = {"run": {"name": "a"}, "data": {"name": "digits", "root": "/x"}, "zo": {"epsilon": 1e-3, "layers": (1, 3)}}


def settings(tmp_path, **changes) -> RunConfig:
    return RunConfig(**{"name": "a", "root": str(tmp_path / "runs"), **changes})


def changed(**groups) -> dict:
    return {name: {**values, **groups.get(name, {})} for name, values in CONFIG.items()}


def test_a_new_run_has_its_configuration_and_environment(tmp_path):
    run = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    assert run.path == tmp_path / "runs/a" and "starting" in run.message and not run.is_complete
    assert yaml.safe_load((run.path / "config.yaml").read_text())["zo"] == {"epsilon": 1e-3, "layers": [1, 3]}
    (start,) = json.loads((run.path / "env.json").read_text())
    assert {"python", "host", "command", "code"} <= start.keys() and "torch" in start["packages"]
    assert (run.path / "checkpoints").is_dir() and (run.path / "plots").is_dir()


def test_the_same_configuration_continues_and_every_start_is_recorded(tmp_path):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    run = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    assert "continuing" in run.message
    assert len(json.loads((run.path / "env.json").read_text())) == 2


def test_another_configuration_is_refused_with_was_and_is(tmp_path):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    with pytest.raises(RunRefused, match=r"zo\.epsilon: 0\.001 -> 0\.01") as refusal:
        RunFolder.open(settings(tmp_path), changed(zo={"epsilon": 1e-2}, data={"root": "/y"}), World.alone())
    assert "data.root" not in str(refusal.value)
    assert yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())["zo"]["epsilon"] == 1e-3


def test_the_docs_list_what_a_resume_may_change():
    page = (Path(__file__).parents[2] / "docs/reliability.md").read_text()
    (listed,) = re.findall(r"^What a resume may change: (.*?)\.$", page, re.M | re.S)
    assert set(re.findall(r"`(.+?)`", listed)) == set(MAY_CHANGE)


def test_keys_that_may_change_are_taken_over_and_said(tmp_path):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    run = RunFolder.open(settings(tmp_path), changed(data={"root": "/y"}, run={"keep": 5}), World.alone())
    assert "data.root: /x -> /y" in run.message
    assert yaml.safe_load((run.path / "config.yaml").read_text())["data"]["root"] == "/y"


def test_a_run_of_before_an_option_that_changes_no_result_goes_on(tmp_path):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    assert "continuing" in RunFolder.open(settings(tmp_path), {**CONFIG, "model": {"graphs": True}}, World.alone()).message


def test_differences_name_keys_that_came_and_went():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": []}}) == {"a.c": "2 -> (absent)", "a.d": "(absent) -> []"}


def test_other_weights_of_the_model_are_refused(tmp_path):
    """A file of weights can be written anew under its name; the adapters would go on over another CLIP."""
    for weights in ("one", "one", ""):  # "": not measured, as under ZeRO-3 and before this version
        RunFolder.open(settings(tmp_path), CONFIG, World.alone(), weights=weights).close()
    with pytest.raises(RunRefused, match=r"was started with other weights of the model \(digest was one, is two\)"):
        RunFolder.open(settings(tmp_path), CONFIG, World.alone(), weights="two")


def test_other_code_goes_on_and_says_so(tmp_path):
    codes = ["one, torch 2", "one, torch 2", "two, torch 2"]
    messages = [RunFolder.open(settings(tmp_path), CONFIG, World.alone(), code_digest=code).message for code in codes]
    said = "; the code has changed since the last start (one, torch 2 -> two, torch 2)"
    assert [message.endswith(said) for message in messages] == [False, False, True]
    starts = json.loads((tmp_path / "runs/a/env.json").read_text())
    assert [start["code_digest"] for start in starts] == codes


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "$(touch x)", "a\n", "ä"])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"run\.name"):
        validate(settings(tmp_path, name=name))


class Recorder(World):
    def on_main(self, work, what):
        try:
            self.shared = super().on_main(work, what)
        except ValueError as error:
            self.shared = error
            raise
        return self.shared


def test_every_rank_gets_the_folder_or_the_same_error(tmp_path):
    world = Recorder()
    run = RunFolder.open(settings(tmp_path), CONFIG, world)
    follower = RunFolder.open(settings(tmp_path), CONFIG, Follower(pickle.loads(pickle.dumps(world.shared))))
    assert (follower.path, follower.message) == (run.path, run.message)
    with pytest.raises(RunRefused) as first:
        RunFolder.open(settings(tmp_path), changed(zo={"epsilon": 1}), world)
    with pytest.raises(RunRefused) as second:
        RunFolder.open(settings(tmp_path), changed(zo={"epsilon": 1}), Follower(world.shared))
    assert str(first.value) == str(second.value)


def test_a_root_that_cannot_be_made_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "runs").write_text("a file")
    world = Recorder()
    with pytest.raises(RunRefused, match="runs/a"):
        RunFolder.open(settings(tmp_path), CONFIG, world)
    assert isinstance(world.shared, RunRefused)


@pytest.mark.parametrize(
    ("number", "is_final"),
    [(errno.ESTALE, False), (errno.EIO, False), (errno.ENOSPC, False), (errno.EACCES, True), (errno.ELOOP, True), (None, True)],
)
def test_only_an_error_of_the_disk_that_lasts_refuses_the_folder(number, is_final, tmp_path, monkeypatch):
    """A refusal ends a job of Slurm or elastic.sh; after any other error it is started again."""

    def fails(path, *_):
        raise OSError(number, "broken", str(path)) if number else OSError(f"{path} is broken")

    monkeypatch.setattr(folder, "replace_file", fails)
    with pytest.raises(RunRefused if is_final else OSError, match=r"run folder .*broken"):
        RunFolder.open(settings(tmp_path), CONFIG, World.alone())


def test_ranks_but_the_first_write_nothing(tmp_path):
    shared = {"path": tmp_path / "runs/a", "is_complete": False, "message": "", "identity": {"run": "r", "config": "c"}}
    run = RunFolder.open(settings(tmp_path), CONFIG, Follower(shared))
    run.write_accuracy({"last": 0.5}, complete=True)
    run.request_requeue()
    assert list(tmp_path.iterdir()) == []


def test_a_complete_run_says_so_and_where_to_look(tmp_path):
    run = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    run.write_accuracy({"last": 0.4})
    assert not RunFolder.open(settings(tmp_path), CONFIG, World.alone()).is_complete
    results = {"last": 0.5, "avg": 0.5, "forgetting": 0.0, "rows": [[[1, 2]]]}
    run.write_accuracy(results, complete=True)
    again = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    assert again.is_complete and "complete" in again.message and "accuracy.json" in again.message
    assert json.loads((run.path / "accuracy.json").read_text()).items() >= {**results, "complete": True}.items()


def test_the_wish_for_a_requeue_ends_with_the_next_start(tmp_path):
    run = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    run.request_requeue()
    assert (run.path / "REQUEUE").exists()
    RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    assert not (run.path / "REQUEUE").exists()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_uses_is_refused(tmp_path):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone()).close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs/a/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunRefused, match="in use"):
            RunFolder.open(settings(tmp_path), CONFIG, World.alone())
        other.stdin.close()
    assert "continuing" in RunFolder.open(settings(tmp_path), CONFIG, World.alone()).message


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch):
    def no_locks(file, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(
        RuntimeWarning, match=r"runs/a: this file system has no locks .*No locks available.*no other job uses this run\.name"
    ):
        assert "starting" in RunFolder.open(settings(tmp_path), CONFIG, World.alone()).message


def test_a_start_by_the_scheduler_waits_for_ranks_that_it_had_lost_sight_of(tmp_path, monkeypatch):
    RunFolder.open(settings(tmp_path), CONFIG, World.alone()).close()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs/a/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        threading.Timer(1, other.stdin.close).start()
        RunFolder.open(settings(tmp_path), CONFIG, World.alone()).close()
        assert other.wait(10) == 0


def test_no_secret_of_the_environment_or_command_line_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hush-1")
    monkeypatch.setattr(sys, "argv", ["train.py", "wandb_api_key=hush-2", "HF_TOKEN=hush-3", "zo.epsilon=1"])
    run = RunFolder.open(settings(tmp_path), CONFIG, World.alone())
    written = "".join(path.read_text() for path in run.path.rglob("*") if path.is_file())
    assert "hush" not in written and "zo.epsilon=1" in written
    assert masked("db_password=x y") == "db_password=*** y"


def test_the_code_version_is_that_of_tracked_files_only(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    assert code_version(package) is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    commit = code_version(package)
    assert len(commit) == 40
    (package / "a.py").write_text("changed")
    assert code_version(package) == commit + "-dirty"
    (tmp_path / "site").mkdir()
    assert code_version(tmp_path / "site") is None

"""Claims about trackers: they get every number, a resume continues their run, and none of them ever stops training."""

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from accelerate import PartialState

from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.trackers import Trackers, numbers_of


@pytest.fixture(autouse=True, scope="module")
def accelerate_state():
    """Accelerate's trackers log through its state, which a run has before it starts them."""
    PartialState()
    yield
    PartialState._reset_state()


WANDB_TWICE = """
import accelerate, json, sys, warnings
from pathlib import Path
from dist_vlcl.dist.world import World
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.log import RunLog
from dist_vlcl.run.state import TrainState
warnings.simplefilter("error", RuntimeWarning)
accelerate.PartialState()
folder, state = Path(sys.argv[1]), TrainState()
for start in range(2):
    log = RunLog(folder, RunConfig(name="a"), World.alone(), {"zo": {"epsilon": 1e-3}}, state)
    assert list(log._trackers._trackers) == ["wandb"]
    state.advance()
    log.step({"step": state.step, "task": 0, "loss": 0.5, "zo": {"vision": {"projected_gradient": 1.0}}})
    log.close()
    (start or print("the id is", json.loads((folder / "trackers.json").read_text())["wandb"], flush=True))
"""


def test_wandb_runs_offline_in_the_run_folder_and_a_resume_continues_the_same_wandb_run(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", WANDB_TWICE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    wandb_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert f"the id is {wandb_id}\n" in result.stdout
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(f"-{wandb_id}" in run.name for run in runs)  # a second start within the second adds "-1"


class FakeWandb(types.ModuleType):
    """A wandb that records its calls, and fails in the calls that it is told to fail in."""

    def __init__(self, logged_in: bool = True, fails_in: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.logged_in, self.fails_in = logged_in, fails_in
        self.inits, self.logged, self.stored = [], [], []
        self.offline, self.url, self.id, self.config = True, None, "the-id", self

    def _do(self, name: str) -> None:
        if name in self.fails_in:
            raise RuntimeError(f"{name} failed")

    def login(self, prompt):
        assert not prompt
        return self.logged_in

    def Settings(self, **settings):
        return settings

    def init(self, mode=None, **arguments):
        self.inits.append({"mode": mode, **arguments})
        self._do(f"init {mode}")
        return self

    def update(self, values, allow_val_change):
        self.stored.append(values)

    def define_metric(self, *_, **__):
        self._do("define_metric")

    def log(self, record, step=None):
        assert step is None
        self._do("log")
        self.logged.append(record)

    def finish(self):
        self._do("finish")


def start(tmp_path: Path, monkeypatch, fake: FakeWandb) -> Trackers:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return Trackers(tmp_path, RunConfig(name="a"), {"zo": {"epsilon": 1e-3}})


@pytest.mark.parametrize("failure", ["init offline", "define_metric", "log", "finish"])
def test_a_tracker_that_fails_anywhere_is_one_warning(tmp_path, monkeypatch, failure):
    with pytest.warns(RuntimeWarning, match=f"run.trackers: wandb is off for this run: RuntimeError: {failure} failed"):
        with warnings.catch_warnings(record=True) as all_warnings:
            warnings.simplefilter("always")
            trackers = start(tmp_path, monkeypatch, FakeWandb(logged_in=False, fails_in=(failure,)))
            for step in (1, 2):
                trackers.log({"kind": "step", "step": step, "loss": 1.0})
            trackers.close()
            trackers.close()
        ours = [warning for warning in all_warnings if "run.trackers" in str(warning.message)]
        assert len(ours) == 1
        warnings.warn_explicit(ours[0].message, RuntimeWarning, "here", 1)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_warning(tmp_path, monkeypatch, name):
    for module in ("tensorboard", "tensorboardX", "torch.utils.tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.warns(RuntimeWarning, match=f"run.trackers: {name} is off for this run: pip install {name}$") as warned:
        trackers = Trackers(tmp_path, RunConfig(name="a", trackers=[name]), {})
        trackers.log({"kind": "step", "step": 1, "loss": 1.0})
    assert len(warned) == 1


@pytest.mark.parametrize(("logged_in", "mode"), [(True, None), (False, "offline")])
def test_wandb_is_online_if_the_user_is_logged_in(tmp_path, monkeypatch, logged_in, mode):
    fake = FakeWandb(logged_in)
    start(tmp_path, monkeypatch, fake)
    assert [init["mode"] for init in fake.inits] == [mode]


def test_wandb_s_own_variable_decides_the_mode(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Trackers(tmp_path, RunConfig(name="a"), {})
    assert [init["mode"] for init in fake.inits] == [None]  # wandb reads the variable itself


def test_wandb_gets_the_configuration_once_and_the_step_the_numbers_and_the_id_in_every_start(tmp_path, monkeypatch):
    fake = FakeWandb()
    for _ in range(2):
        trackers = start(tmp_path, monkeypatch, fake)
        trackers.log({"kind": "step", "step": 7, "task": 1, "time": 9.9, "zo": {"vision": {"epsilon": 0.5}}, "text": "x"})
    first, second = fake.inits
    assert (first["id"], second["id"], second["resume"]) == (None, "the-id", "allow")
    assert (first["project"], first["name"], first["dir"], first["settings"]["console"]) == ("dist_vlcl", "a", str(tmp_path), "off")
    assert fake.stored == [{"zo.epsilon": "0.001"}]
    assert fake.logged == [{"global_step": 7, "step/task": 1, "step/zo/vision/epsilon": 0.5}] * 2


def test_without_trackers_nothing_is_imported_or_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers = Trackers(tmp_path, RunConfig(name="a", trackers=[]), {})
        trackers.log({"kind": "step", "step": 1})
    assert not list(tmp_path.iterdir())


def test_a_nested_record_becomes_flat_numbers():
    assert numbers_of({"kind": "task", "step": 1, "seen": 0.5, "per_task": [1], "a": {"b": 2}}) == {"task/seen": 0.5, "task/a/b": 2}

import io
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from rich.console import Console

from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.journal import sealed
from dist_vlcl.run.log import RunLog
from dist_vlcl.run.mirror import WandbMirror, flat_numbers
from dist_vlcl.run.state import TrainState
from tests.run.alone import Alone, Follower

QUIET = RunConfig(name="a", wandb="off")
NUM_TASKS, STEPS_A_TASK = 3, 4


def console(**options) -> Console:
    return Console(file=io.StringIO(), **{"width": 120, **options})


def open_log(folder, state=None, settings=QUIET, **options) -> RunLog:
    return RunLog(folder, settings, Alone(), {}, state, **{"console": console(), **options})


def printed(log: RunLog) -> str:
    return log._console.file.getvalue()


def run_steps(folder, state: TrainState, stop_after: int | None = None) -> TrainState:
    """A run of three tasks of four steps, killed after some number of log calls; returns what its checkpoint would hold."""
    log = open_log(folder, state)
    saved = TrainState.from_dict(state.to_dict())
    calls = 0

    def is_dead() -> bool:
        nonlocal calls
        calls += 1
        return calls == stop_after

    while state.task < NUM_TASKS:
        while state.batch < STEPS_A_TASK:
            state.advance()
            log.step({"step": state.step, "task": state.task, "loss": 1 / state.step})
            if is_dead():
                return saved
            log.journal({"step": state.step, "seed": state.step * 3})
            if is_dead():
                return saved
            if state.batch % 2 == 0:
                saved = TrainState.from_dict(state.to_dict())
        log.task({"step": state.step, "task": state.task, "per_task": [0.5] * (state.task + 1), "seen": 0.5})
        if is_dead():
            return saved
        state.next_task()
        saved = TrainState.from_dict(state.to_dict())
    log.close()
    return saved


def lines(folder, name: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def test_after_any_interruption_the_files_are_those_of_an_uninterrupted_run(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run_steps(whole, TrainState())
    assert [line["kind"] for line in lines(whole, "metrics.jsonl")] == ["run", *(["step"] * 4 + ["task"]) * 3]
    for stop_after in range(1, 28):
        folder = tmp_path / str(stop_after)
        folder.mkdir()
        saved = run_steps(folder, TrainState(), stop_after)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"kind": "step", "step": 1, "lo')
        run_steps(folder, saved)
        for name in ("metrics.jsonl", "journal.jsonl"):
            assert lines(folder, name) == lines(whole, name), stop_after


def test_a_line_is_in_the_file_before_the_call_returns(tmp_path):
    log = open_log(tmp_path)
    log.step({"step": 1, "task": 0, "loss": torch.tensor(0.5)})
    log.journal({"step": 1, "seeds": torch.tensor([1, 2])})
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "step" and last["loss"] == 0.5 and last["time"] > 0
    assert lines(tmp_path, "journal.jsonl") == [sealed({"step": 1, "seeds": [1, 2]})]


def test_steps_of_a_rank_that_went_astray_leave_the_journal(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.journal({"step": step})
    log.truncate_after(after=1)
    log.journal({"step": 2, "seed": 5})
    assert lines(tmp_path, "journal.jsonl") == [sealed({"step": 1}), sealed({"step": 2, "seed": 5})]


def test_a_run_without_a_state_begins_anew(tmp_path):
    log = open_log(tmp_path)
    log.note("before the first step", 0, 0)
    log.step({"step": 1, "task": 0})
    open_log(tmp_path)
    assert [line["kind"] for line in lines(tmp_path, "metrics.jsonl")] == ["run"]


def test_ranks_but_the_first_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path, QUIET, Follower(), {})
    log.step({"step": 1, "task": 0})
    log.task({"step": 1, "task": 0})
    log.note("x", 1, 0)
    log.journal({"step": 1})
    log.table("t", ["a"], [[1]])
    assert list(log.progress([1, 2], 2)) == [1, 2]
    log.close()
    assert log.wandb_id is None and list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_accuracy_matrix_so_far_is_printed_also_after_a_resume(tmp_path):
    log = open_log(tmp_path)
    log.task({"step": 4, "task": 0, "per_task": [0.9876], "seen": 0.9876})
    resumed = open_log(tmp_path, TrainState(step=4, task=1))
    resumed.task({"step": 8, "task": 1, "per_task": [0.8, 0.9], "seen": 0.85, "last": 0.85, "avg": 0.9188, "forgetting": 0.1876})
    text = printed(resumed)
    for number in ("98.76", "80.00", "90.00", "85.00", "Avg 91.88", "forgetting 18.76"):
        assert number in text


def test_a_matrix_wider_than_the_terminal_shows_the_first_and_the_newest_tasks(tmp_path):
    log = open_log(tmp_path, console=console(width=80))
    log.task({"step": 1, "task": 29, "per_task": [task / 100 for task in range(30)], "seen": 0.5})
    text = printed(log)
    assert "0.00" in text and "29.00" in text and "10.00" not in text and "23 tasks not shown" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_note_is_kept_and_said_and_a_remark_only_said(tmp_path):
    log = open_log(tmp_path)
    log.note("skipped [1/2] update", 3, 0)
    log.say("resumed")
    assert lines(tmp_path, "metrics.jsonl")[-1] == {"kind": "note", "step": 3, "task": 0, "text": "skipped [1/2] update"}
    assert printed(log) == "skipped [1/2] update\nresumed\n"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_at_the_end(tmp_path):
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    for batch in log.progress(range(40, 95), total=95, completed=40, description="task 1/3"):
        clock.now += 1
        log.step({"step": batch + 1, "task": 0, "loss": 0.25, "images_per_second": 31.4, "zo": {"vision": {"projected_gradient": -0.5}}})
    shown = printed(log).splitlines()
    assert len(shown) == 6
    assert shown[0] == "task 1/3  50/95   53 %  loss 0.2500  vision -5.00e-01  31 images/s  0:00:45 left"
    assert shown[-1].startswith("task 1/3  95/95  100 %")


def test_on_a_terminal_there_is_a_bar_with_the_loss(tmp_path):
    log = open_log(tmp_path, console=console(force_terminal=True, width=160))
    for batch in log.progress(range(2, 4), total=4, completed=2, description="task 1"):
        log.step({"step": batch, "task": 0, "loss": 0.125})
    assert "4/4" in printed(log) and "loss 0.1250" in printed(log)


def test_a_loop_that_is_left_early_leaves_the_terminal_in_order(tmp_path):
    log = open_log(tmp_path, console=console(force_terminal=True))
    for _ in log.progress(range(4), total=4):
        break
    assert list(log.progress(range(2), total=2)) == [0, 1]  # rich refuses a second live display


def test_progress_can_be_off(tmp_path):
    log = open_log(tmp_path, settings=RunConfig(name="a", wandb="off", progress=False))
    assert list(log.progress(range(3), 3)) == [0, 1, 2] and printed(log) == ""


def test_a_table_shows_its_cells(tmp_path):
    log = open_log(tmp_path)
    log.table("orders", ["unit", "order"], [["vision.3", "ZEROTH"], ["vision.4", 1]])
    assert all(word in printed(log) for word in ("orders", "unit", "vision.3", "ZEROTH"))


# Weights & Biases

WANDB_TWICE = """
import sys, warnings
from pathlib import Path
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.journal import sealed
from dist_vlcl.run.log import RunLog
from dist_vlcl.run.state import TrainState
from tests.run.alone import Alone
warnings.simplefilter("error")
settings = RunConfig(name="a", wandb="offline")
state = TrainState()
for start in range(2):
    log = RunLog(Path(sys.argv[1]), settings, Alone(), {"zo": {"epsilon": 1e-3}}, state)
    assert log._mirror.is_on
    state.wandb_id = state.wandb_id or log.wandb_id
    assert log.wandb_id == state.wandb_id
    state.advance()
    log.step({"step": state.step, "task": 0, "loss": 0.5, "zo": {"vision": {"projected_gradient": 1.0}}})
    log.close()
died_before_its_first_checkpoint = RunLog(Path(sys.argv[1]), RunConfig(name="a", wandb="off"), Alone(), {})
assert died_before_its_first_checkpoint.wandb_id == state.wandb_id
print(f"the id is <{state.wandb_id}>", flush=True)
"""


def test_wandb_runs_offline_inside_the_run_folder_and_keeps_its_id(tmp_path):
    result = subprocess.run([sys.executable, "-c", WANDB_TWICE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    wandb_id = re.search(r"the id is <(\w+)>", result.stdout)[1]  # wandb may print after us
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(f"-{wandb_id}" in run.name for run in runs)  # a second start within the second adds "-1"
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_without_wandb_the_run_goes_on_after_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(RuntimeWarning, match="wandb is off") as warned:
        log = open_log(tmp_path, settings=RunConfig(name="a", wandb="offline"))
        for step in (1, 2):
            log.step({"step": step, "task": 0, "loss": 0.5})
        log.close()
    assert len(warned) == 1 and len(lines(tmp_path, "metrics.jsonl")) == 3


class FakeWandb:
    """A wandb that records what it is asked and fails where it is told to."""

    def __init__(self, logged_in: bool = True, fails_in: tuple[str, ...] = ()) -> None:
        self.logged_in, self.fails_in = logged_in, fails_in
        self.modes, self.inits, self.logged = [], [], []
        self.offline, self.url = True, None

    def _do(self, name: str) -> None:
        if name in self.fails_in:
            raise RuntimeError(f"{name} failed")

    def login(self, prompt):
        assert not prompt
        self._do("login")
        return self.logged_in

    def Settings(self, **settings):
        return settings

    def init(self, mode, **arguments):
        self.modes.append(mode)
        self.inits.append(arguments)
        self._do(f"init {mode}")
        return self

    def define_metric(self, *_, **__):
        self._do("define_metric")

    def log(self, record):
        self._do("log")
        self.logged.append(record)

    def finish(self):
        self._do("finish")


def mirror(tmp_path, monkeypatch, fake: FakeWandb, mode: str = "auto", id: str | None = None) -> WandbMirror:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return WandbMirror(tmp_path, mode, "project", "name", {}, id)


@pytest.mark.parametrize("failure", ["init offline", "define_metric", "log", "finish"])
def test_wandb_that_fails_anywhere_is_one_warning(tmp_path, monkeypatch, failure):
    with pytest.warns(RuntimeWarning, match=f"{failure} failed") as warned:
        listener = mirror(tmp_path, monkeypatch, FakeWandb(fails_in=(failure,)), "offline")
        listener.log({"kind": "step", "step": 1, "loss": 1.0})
        listener.log({"kind": "step", "step": 2, "loss": 1.0})
        listener.close()
        listener.close()
    assert len(warned) == 1 and not listener.is_on


@pytest.mark.parametrize(("logged_in", "asked", "mode"), [(True, None, "online"), (False, None, "offline"), (True, "offline", "offline")])
def test_auto_is_online_where_the_user_is_logged_in_and_has_not_said_otherwise(tmp_path, monkeypatch, logged_in, asked, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    fake = FakeWandb(logged_in)
    mirror(tmp_path, monkeypatch, fake)
    assert fake.modes == [mode]


@pytest.mark.parametrize(("failure", "modes"), [("login", ["offline"]), ("init online", ["online", "offline"])])
def test_auto_goes_on_offline_where_there_is_no_way_out_and_says_why(tmp_path, monkeypatch, failure, modes):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb(fails_in=(failure,))
    with pytest.warns(RuntimeWarning, match=f"offline.*{failure} failed"):
        assert mirror(tmp_path, monkeypatch, fake).is_on
    assert fake.modes == modes


def test_wandb_gets_the_id_the_step_and_the_numbers(tmp_path, monkeypatch):
    fake = FakeWandb()
    listener = mirror(tmp_path, monkeypatch, fake, "online", id="abc")
    listener.log({"kind": "step", "step": 7, "task": 1, "time": 9.9, "zo": {"vision": {"epsilon": 0.5}}, "text": "x"})
    assert listener.id == "abc" and fake.inits[0]["id"] == "abc" and fake.inits[0]["resume"] == "allow"
    assert fake.inits[0]["settings"]["console"] == "off" and fake.inits[0]["dir"] == str(tmp_path)
    assert fake.logged == [{"global_step": 7, "step/task": 1, "step/zo/vision/epsilon": 0.5}]


def test_wandb_off_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listener = WandbMirror(tmp_path, "off", "p", "n", {})
        listener.log({"kind": "step", "step": 1})
    assert not listener.is_on


def test_nested_records_become_flat_numbers():
    assert flat_numbers({"kind": "task", "seen": 0.5, "per_task": [1], "a": {"b": 2}}) == {"task/seen": 0.5, "task/a/b": 2}

import io
import json
import os
import re
import resource
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from dist_vlcl.dist.world import World
from dist_vlcl.reading import read_lines
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.log import RunLog
from dist_vlcl.run.state import TrainState
from tests.run.alone import Follower

QUIET = RunConfig(name="a", trackers=[])
NUM_TASKS, STEPS_A_TASK = 3, 4


def console(**options) -> Console:
    return Console(file=io.StringIO(), **{"width": 120, **options})


def open_log(folder, state=None, settings=QUIET, **options) -> RunLog:
    return RunLog(folder, settings, World.alone(), {}, state or TrainState(), console(**options))


def printed(log: RunLog) -> str:
    return log._console.file.getvalue()


def run_steps(folder, state: TrainState, stop_after: int | None = None) -> TrainState:
    """A run of three tasks of four steps, killed after some number of log calls; returns what its checkpoint would hold."""
    log = open_log(folder, state)
    saved = TrainState.from_dict(asdict(state))
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
                saved = TrainState.from_dict(asdict(state))
        log.task({"step": state.step, "task": state.task, "per_task": [0.5] * (state.task + 1), "seen": 0.5})
        if is_dead():
            return saved
        state.next_task()
        saved = TrainState.from_dict(asdict(state))
    log.close()
    return saved


def lines(folder, name: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("time", "crc")} for record in records]


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
    assert lines(tmp_path, "journal.jsonl") == [{"step": 1, "seeds": [1, 2]}]


def test_steps_of_a_rank_that_has_diverged_leave_the_journal(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.journal({"step": step})
    log.truncate_after(1)
    log.journal({"step": 2, "seed": 5})
    assert lines(tmp_path, "journal.jsonl") == [{"step": 1}, {"step": 2, "seed": 5}]


def test_a_run_at_step_0_begins_anew(tmp_path):
    log = open_log(tmp_path)
    log.note("before the first step", 0, 0)
    log.step({"step": 1, "task": 0})
    open_log(tmp_path)
    assert [line["kind"] for line in lines(tmp_path, "metrics.jsonl")] == ["run"]


def test_ranks_but_the_first_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path, QUIET, Follower(), {}, TrainState())
    log.step({"step": 1, "task": 0})
    log.task({"step": 1, "task": 0})
    log.note("x", 1, 0)
    log.journal({"step": 1})
    log.table("t", ["a"], [[1]])
    assert list(log.progress([1, 2], 2)) == [1, 2]
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_accuracy_matrix_so_far_is_printed_also_after_a_resume(tmp_path):
    log = open_log(tmp_path)
    log.task({"step": 4, "task": 0, "per_task": [0.9876], "seen": 0.9876})
    resumed = open_log(tmp_path, TrainState(step=4, task=1))
    resumed.task({"step": 8, "task": 1, "per_task": [0.8, 0.9], "seen": 0.85, "last": 0.85, "avg": 0.9188, "forgetting": 0.1876})
    text = printed(resumed)
    for number in ("98.76", "80.00", "90.00", "85.00", "Avg 91.88", "forgetting 18.76"):
        assert number in text


def test_a_matrix_wider_than_the_terminal_shows_the_first_and_the_newest_tasks(tmp_path):
    log = open_log(tmp_path, width=80)
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
    log = open_log(tmp_path, get_time=clock)
    for batch in log.progress(range(40, 95), total=95, completed=40, description="task 1/3"):
        clock.now += 1
        log.step({"step": batch + 1, "task": 0, "loss": 0.25, "images_per_second": 60.0 if batch % 2 else 20.0, "seconds": 1.0})
    shown = printed(log).split("\n")
    shown = [line for line in shown if line]  # early versions of rich print an empty line at the end
    assert len(shown) == 6
    assert shown[0] == "task 1/3  50/95   53 %  loss 0.2500  40 images/s  0:00:45 left"  # the mean rate
    assert shown[-1].startswith("task 1/3  95/95  100 %")


def test_on_a_terminal_there_is_a_bar_with_the_loss(tmp_path):
    log = open_log(tmp_path, force_terminal=True, width=160)
    for batch in log.progress(range(2, 4), total=4, completed=2, description="task 1"):
        log.step({"step": batch, "task": 0, "loss": 0.125})
    assert "4/4" in printed(log) and "loss 0.1250" in printed(log)


def test_count_time_left_loss_and_rate_fit_into_80_columns(tmp_path):
    clock = Clock()
    log = open_log(tmp_path, force_terminal=True, width=80, get_time=clock)
    for batch in log.progress(range(990, 1000), total=1000, completed=990, description="task 10/20"):
        clock.now += 1
        log.step({"step": batch, "task": 0, "loss": 12.125, "images_per_second": 12345.0, "seconds": 1.0})
    last = next(line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", printed(log)))[::-1] if line.strip())
    assert "1000/1000" in last and "0:00:0" in last and "loss 12.1250  12345 images/s" in last and len(last) <= 80


def test_a_loop_that_is_left_early_leaves_the_terminal_in_order(tmp_path):
    log = open_log(tmp_path, force_terminal=True)
    for _ in log.progress(range(4), total=4):
        break
    assert list(log.progress(range(2), total=2)) == [0, 1]  # rich refuses a second live display


def test_progress_can_be_off(tmp_path):
    log = open_log(tmp_path, settings=RunConfig(name="a", trackers=[], progress=False))
    assert list(log.progress(range(3), 3)) == [0, 1, 2] and printed(log) == ""


def test_a_table_shows_its_cells(tmp_path):
    log = open_log(tmp_path)
    log.table("orders", ["unit", "order"], [["vision.3", "ZEROTH"], ["vision.4", 1]])
    assert all(word in printed(log) for word in ("orders", "unit", "vision.3", "ZEROTH"))


def test_a_full_disk_stops_the_log_with_the_name_of_the_file(tmp_path):
    log = open_log(tmp_path)
    log.step({"step": 1, "task": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "metrics.jsonl") + 10, -1))
    try:
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
            log.step({"step": 2, "task": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl", dict)] == [0, 1]

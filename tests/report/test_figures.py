import json

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.report.figures import plot_accuracy, plot_loss, plot_run, smoothed
from dist_vlcl.report.records import read_records

ALL = ["accuracy_matrix", "accuracy", "loss"]


def step_record(step: int, task: int) -> dict:
    return {"kind": "step", "step": step, "task": task, "loss": 1.0 + task}


def task_record(task: int) -> dict:
    return {
        "kind": "task",
        "step": 10 * (task + 1),
        "task": task,
        "per_task": [0.9] * (task + 1),
        "seen": 0.9 - task / 10,
        "zero_shot": 0.3,
    }


def records() -> list[dict]:
    return [record for task in range(2) for record in [*(step_record(10 * task + i + 1, task) for i in range(10)), task_record(task)]]


def write(folder, lines: list[dict]):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_gets_three_pictures(tmp_path):
    paths = plot_run(write(tmp_path, records()))
    assert [path.stem for path in paths] == ALL
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.parent == tmp_path / "plots" for path in paths)


def without(*keys: str) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records()]


@pytest.mark.parametrize(
    ("lines", "pictures"),
    [
        ([], []),
        (records()[:1], ["loss"]),
        (without("loss"), ["accuracy_matrix", "accuracy"]),
        (without("per_task"), ["accuracy", "loss"]),
        (without("seen"), ["accuracy_matrix", "loss"]),
        ([{**record, "loss": float("nan")} for record in records()], ["accuracy_matrix", "accuracy"]),
    ],
)
def test_what_is_missing_is_not_drawn_and_breaks_nothing(tmp_path, lines, pictures):
    assert [path.stem for path in plot_run(write(tmp_path, lines))] == pictures


def curves(axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_the_accuracy_curve_is_in_percent_over_tasks_from_one(tmp_path):
    figure = plot_accuracy(read_records(write(tmp_path, records())))
    assert curves(figure.axes[0])[0] == ([1, 2], pytest.approx([90, 80]))
    assert curves(figure.axes[0])[1][1] == pytest.approx([30, 30])


def test_the_loss_is_smoothed_within_a_task_and_not_across(tmp_path):
    raw, first, second, *_ = curves(plot_loss(read_records(write(tmp_path, records()))).axes[0])
    assert raw[1] == [1.0] * 10 + [2.0] * 10
    assert first[1] == pytest.approx([1.0] * 10) and second[1] == pytest.approx([2.0] * 10)


def test_smoothing_equals_the_mean_of_the_neighbours():
    values = pd.Series(np.random.default_rng(0).normal(size=57))
    slow = [values[max(i - 2, 0) : i + 3].mean() for i in range(57)]
    assert np.allclose(smoothed(values), slow)

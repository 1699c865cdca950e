import json

import pytest

from dist_vlcl.report.records import read_records
from dist_vlcl.report.tables import accuracy_table, markdown_table, summarize_run

ROWS = [[0.9876], [0.5, 1.0]]


def test_a_row_holds_percents_of_two_digits_and_ends_in_the_accuracy_of_all_seen():
    assert accuracy_table(ROWS, [0.9876, 0.6]).splitlines() == [
        "| after | task 1 | task 2 | A_t |",
        "| :--- | ---: | ---: | ---: |",
        "| task 1 | 98.76 |  | 98.76 |",
        "| task 2 | 50.00 | 100.00 | 60.00 |",
    ]


def test_a_task_to_come_is_blank_and_one_not_measured_is_a_dash():
    lines = accuracy_table([[0.5], [None, 0.5]], [0.5, None]).splitlines()
    assert lines[2:] == ["| task 1 | 50.00 |  | 50.00 |", "| task 2 | – | 50.00 | – |"]


def test_text_of_a_run_stays_text_in_a_table():
    table = markdown_table(["name"], [["a|b"], ["![x](/etc/passwd)"], ["<b>*`\nc"]])
    assert table.splitlines()[2:] == ["| a\\|b |", "| ![x]\\(/etc/passwd) |", "| \\<b\\>\\*\\` c |"]


def test_a_run_that_has_no_task_yet_has_a_summary(tmp_path):
    assert "No task is finished yet." in summarize_run(tmp_path)


def test_a_summary_is_read_from_the_log(tmp_path):
    record = {"kind": "task", "step": 4, "task": 0, "per_task": [0.5], "seen": 0.5, "last": 0.6, "avg": 0.7938, "forgetting": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + '\n{"kind": "st')
    assert "| task 1 | 50.00 | 50.00 |" in summarize_run(tmp_path) and "Waiting" not in summarize_run(tmp_path)
    assert "| Last | Avg | forgetting |" in summarize_run(tmp_path) and "| 60.00 | 79.38 | 10.00 |" in summarize_run(tmp_path)
    assert len(read_records(tmp_path).tasks) == 1  # the damaged line is skipped


@pytest.mark.parametrize(("waits", "words", "advises"), [((0.01, 0.02), "took 1.48 % of", False), ((0.1, 0.2), "took 13.04 % of", True)])
def test_a_summary_says_how_long_steps_waited_for_images(tmp_path, waits, words, advises):
    lines = [{"kind": "step", "step": k + 1, "task": 0, "seconds": 1.0, "data_seconds": wait} for k, wait in enumerate(waits)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = summarize_run(tmp_path)
    assert words in page and ("data.num_workers" in page) == advises


def test_a_row_may_hold_all_tasks_before_they_are_trained():
    lines = accuracy_table([[0.5, 0.25, 0.1]], [0.28]).splitlines()
    assert lines[0] == "| after | task 1 | task 2 | task 3 | A_t |" and lines[2] == "| task 1 | 50.00 | 25.00 | 10.00 | 28.00 |"

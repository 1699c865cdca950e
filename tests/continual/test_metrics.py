"""Metrics against a matrix worked out by hand."""

import pytest

from dist_vlcl.continual.metrics import AccuracyMatrix, SetsMatrix

# Three tasks of 2, 1 and 2 classes; classes of unequal size. Rows hold (correct, total) of the classes seen, and of the next task's.
ROWS = [
    [(8, 10), (3, 5), (2, 20)],  # task 0: 11/15; ahead, task 1: 2/20
    [(6, 10), (3, 5), (18, 20), (1, 2), (4, 8)],  # task 0: 9/15, task 1: 18/20; ahead, task 2: 5/10
    [(7, 10), (3, 5), (10, 20), (2, 2), (6, 8)],  # task 0: 10/15, task 1: 10/20, task 2: 8/10
]


@pytest.fixture
def matrix():
    matrix = AccuracyMatrix([2, 1, 2])
    for row in ROWS:
        matrix.append(row)
    return matrix


def test_tasks_are_weighted_by_their_samples(matrix):
    assert [matrix.task_accuracy(2, j) for j in range(3)] == pytest.approx([10 / 15, 10 / 20, 8 / 10])
    assert [matrix.task_accuracy(1, j) for j in range(3)] == pytest.approx([9 / 15, 18 / 20, 5 / 10])


def test_seen_sums_counts_and_then_divides(matrix):
    """A_t over the union of the test sets, not the mean of the tasks' accuracies."""
    assert [matrix.seen(t) for t in range(3)] == pytest.approx([11 / 15, 27 / 35, 28 / 45])


def test_last_and_avg_are_a_t_and_the_mean_of_a(matrix):
    assert matrix.last == pytest.approx(28 / 45)
    assert matrix.average == pytest.approx((11 / 15 + 27 / 35 + 28 / 45) / 3)


def test_forgetting_is_the_best_ever_less_the_newest(matrix):
    assert matrix.forgetting == pytest.approx(((11 / 15 - 10 / 15) + (18 / 20 - 10 / 20)) / 2)


def test_backward_transfer_is_over_all_later_rows_and_earlier_tasks(matrix):
    assert matrix.backward_transfer == pytest.approx(((9 / 15 - 11 / 15) + (10 / 15 - 11 / 15) + (10 / 20 - 18 / 20)) / 3)


def test_one_task_forgets_nothing():
    matrix = AccuracyMatrix([2, 1])
    matrix.append([(1, 2), (2, 2)])
    assert (matrix.forgetting, matrix.backward_transfer) == (0, 0)
    assert (matrix.last, matrix.average) == (0.75, 0.75)


def test_forgetting_looks_at_every_earlier_row_not_only_the_first():
    matrix = AccuracyMatrix([1, 1, 1, 1])
    for row in ([5], [9, 5], [7, 5, 5], [6, 8, 5, 5]):
        matrix.append([(correct, 10) for correct in row])
    assert matrix.forgetting == pytest.approx((0.9 - 0.6 + 0.5 - 0.8 + 0) / 3)


def test_classes_without_test_samples_do_not_count():
    matrix = AccuracyMatrix([2])
    matrix.append([(3, 4), (0, 0)])
    assert matrix.seen(0) == 0.75


def test_too_few_classes_are_refused(matrix):
    with pytest.raises(AssertionError, match="a row has all classes seen so far"):
        AccuracyMatrix([3]).append([(1, 1), (1, 1)])


def test_the_summary_holds_the_metrics_and_the_counts_of_the_newest_row(matrix):
    summary = matrix.summary()
    assert summary["last"] == summary["seen"] == matrix.last
    assert summary["avg"] == matrix.average
    assert summary["per_task"] == pytest.approx([10 / 15, 10 / 20, 8 / 10])
    assert (summary["correct"], summary["total"]) == ([7, 3, 10, 2, 6], [10, 5, 20, 2, 8])
    assert [summary[k] for k in ("forgetting", "backward_transfer")] == [matrix.forgetting, matrix.backward_transfer]


@pytest.fixture
def sets():
    """Three data sets of 1, 2 and 1 classes, measured in every row: R = 0.8 0.5 0.3 / 0.6 0.7 0.1 / 0.4 0.6 0.9."""
    matrix = SetsMatrix([1, 2, 1])
    for row in (
        [(8, 10), (10, 30), (10, 10), (3, 10)],
        [(6, 10), (20, 30), (8, 10), (1, 10)],
        [(4, 10), (16, 30), (8, 10), (9, 10)],
    ):
        matrix.append(row)
    return matrix


def test_data_sets_count_the_same_whatever_their_size_also_those_not_trained_yet(sets):
    assert [sets.task_accuracy(0, j) for j in range(3)] == pytest.approx([0.8, 0.5, 0.3])
    assert [sets.seen(t) for t in range(3)] == pytest.approx([1.6 / 3, 1.4 / 3, 1.9 / 3])
    assert (sets.last, sets.average) == (pytest.approx(1.9 / 3), pytest.approx(4.9 / 9))


def test_transfer_is_the_mean_before_a_set_is_trained(sets):
    assert sets.transfer == pytest.approx((0.5 + (0.3 + 0.1) / 2) / 2)
    assert sets.summary()["transfer"] == sets.transfer and sets.summary()["per_task"] == pytest.approx([0.4, 0.6, 0.9])
    first = SetsMatrix([1, 2, 1], sets.rows[:1])
    assert first.transfer == pytest.approx((0.5 + 0.3) / 2)
    assert first.summary()["per_task"] == pytest.approx([0.8, 0.5, 0.3])

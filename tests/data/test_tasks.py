import pytest

from dist_vlcl.data.tasks import TaskStream

NAMES = [f"class {letter}" for letter in "abcdefghij"]


def test_tasks_are_disjoint_and_cover_all_classes():
    order = [3, 1, 4, 5, 9, 2, 6, 8, 7, 0]
    stream = TaskStream(NAMES, 4, order)
    assert [task.classes for task in stream] == [(3, 1, 4, 5), (9, 2, 6, 8), (7, 0)]
    assert [task.index for task in stream] == [0, 1, 2]
    assert stream[1].names == ("class j", "class c", "class g", "class i")
    assert stream[1].labels == {9: 0, 2: 1, 6: 2, 8: 3}


def test_seen_classes_are_one_task():
    stream = TaskStream(NAMES, 4, [3, 1, 4, 5, 9, 2, 6, 8, 7, 0])
    seen = stream.seen(1)
    assert (seen.classes, seen.index) == ((3, 1, 4, 5, 9, 2, 6, 8), 1)
    assert seen.names == stream[0].names + stream[1].names
    assert seen.labels[9] == 4
    assert stream.seen(-1).classes == (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)


def test_a_base_task_comes_first_and_num_tasks_cuts():
    stream = TaskStream(NAMES, 2, base=5, num_tasks=2)
    assert [task.classes for task in stream] == [(0, 1, 2, 3, 4), (5, 6)]
    assert len(TaskStream(NAMES, 2, base=10)) == 1
    assert len(TaskStream(NAMES, 10)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"increment": 30}, r"tasks\.increment=30: choose from 1 to 10"),
        ({"increment": 0}, r"tasks\.increment=0: choose from 1 to 10"),
        ({"increment": 2, "base": 11}, r"tasks\.base=11: choose from 0 to 10"),
        ({"increment": 5, "num_tasks": 3}, r"tasks\.num_tasks=3: choose from 1 to 2"),
        ({"increment": 5, "order": [0, 1, 2]}, r"tasks\.order: .*missing \[3, 4, 5, 6, 7\]"),
        ({"increment": 5, "order": [0, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, r"tasks\.order: .*missing \[1\].*repeated \[0\]"),
        ({"increment": 5, "order": [10, 1, 2, 3, 4, 5, 6, 7, 8, 9]}, r"tasks\.order: .*unknown \[10\]"),
    ],
)
def test_impossible_streams_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        TaskStream(NAMES, **arguments)

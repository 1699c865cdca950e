from collections import Counter

import pytest

from dist_vlcl.data.tasks import TaskStream, generator, plain_order, rank_slice, train_order

NAMES = [f"class {letter}" for letter in "abcdefghij"]


def test_tasks_are_disjoint_and_cover_all_classes():
    order = [3, 1, 4, 5, 9, 2, 6, 8, 7, 0]
    stream = TaskStream(NAMES, 4, order)
    assert [task.classes for task in stream] == [(3, 1, 4, 5), (9, 2, 6, 8), (7, 0)]
    assert [task.index for task in stream] == [0, 1, 2]
    assert stream[1].names == ("class j", "class c", "class g", "class i")


def test_seen_classes_are_one_task():
    stream = TaskStream(NAMES, 4, [3, 1, 4, 5, 9, 2, 6, 8, 7, 0])
    seen = stream.seen(1)
    assert (seen.classes, seen.index) == ((3, 1, 4, 5, 9, 2, 6, 8), 1)
    assert seen.names == stream[0].names + stream[1].names
    assert stream.seen(-1).classes == (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)


def test_tasks_can_have_given_sizes():
    stream = TaskStream(NAMES, [3, 1, 6])
    assert [task.classes for task in stream] == [(0, 1, 2), (3,), (4, 5, 6, 7, 8, 9)]
    assert [task.classes for task in TaskStream(NAMES, [3, 1, 6], num_tasks=2)] == [(0, 1, 2), (3,)]


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
        ({"increment": 5, "order": [0, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, r"tasks\.order: .*missing \[1\], unknown or repeated \[0\]"),
        ({"increment": 5, "order": [10, 1, 2, 3, 4, 5, 6, 7, 8, 9]}, r"tasks\.order: .*missing \[0\], unknown or repeated \[10\]"),
    ],
)
def test_impossible_streams_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TaskStream(NAMES, **arguments)


# the order of samples

SIZES = {0: [3, 3, 1], 5: [3, 3, 1], 2: [3, 2, 2]}
UNEQUAL = {0: [8] * 8, 1: [8], 2: [8] * 2}

ONE_SHARD = {0: [8], 1: [8]}


@pytest.mark.parametrize("sizes", [SIZES, UNEQUAL, {}])
def test_every_sample_comes_once(sizes):
    order = train_order(sizes, seed=0, task=0, epoch=0)
    assert len(set(order)) == len(order)
    assert sorted(order) == sorted(plain_order(sizes))


@pytest.mark.parametrize("sizes", [SIZES, ONE_SHARD])
def test_the_order_is_a_function_of_seed_task_and_epoch(sizes):
    same = [train_order(sizes, 1, 2, 3), train_order(sizes, 1, 2, 3)]
    others = [train_order(sizes, 9, 2, 3), train_order(sizes, 1, 9, 3), train_order(sizes, 1, 2, 9)]
    assert same[0] == same[1]
    assert all(other != same[0] for other in others)


def test_the_generator_is_the_same_in_every_process():
    assert generator(1, "crop", "a/b").getrandbits(32) == 925233898
    assert generator(1, 23).random() != generator(12, 3).random()


def test_a_window_mixes_all_classes():
    sizes = {class_id: [4] * 5 for class_id in range(6)}
    order = train_order(sizes, 0, 0, 0)
    for start in range(0, len(order), 24):
        window = order[start : start + 24]
        assert Counter(sample.class_id for sample in window) == dict.fromkeys(sizes, 4)
        assert [sample.class_id for sample in window] != sorted(sample.class_id for sample in window)


def test_small_classes_are_not_packed_at_the_front():
    places = {train_order(UNEQUAL, seed, 0, 0).index((1, 0, 0)) // 8 for seed in range(40)}
    assert len(places) > 5


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 16])
def test_rank_slices_are_a_partition_into_equal_parts(length, size):
    slices = [rank_slice(length, rank, size) for rank in range(size)]
    assert [place for part in slices for place in part] == list(range(length))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1

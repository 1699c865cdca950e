from collections import Counter

import pytest

from dist_vlcl.data.tasks import generator, plain_order, rank_slice, train_order

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

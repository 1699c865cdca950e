import pytest

from dist_vlcl.data.names import class_order, distinct, known_classes, paper_order


@pytest.mark.parametrize(
    ("reader", "count", "first", "last"),
    [
        ("cifar100", 100, [87, 0, 52, 58, 44, 91, 68, 97, 51, 15], [26, 35, 39]),
        ("tiny_imagenet", 200, [131, 181, 22, 172, 144, 92, 97, 187, 58, 93], [194, 98]),
        ("imagenet_r", 200, [29, 75, 18, 9, 62, 46, 133], [151, 197]),
    ],
)
def test_published_orders_are_permutations_of_the_named_classes(reader, count, first, last):
    order, classes = paper_order(reader), known_classes(reader)
    assert sorted(order) == list(range(count))
    assert (order[: len(first)], order[-len(last) :]) == (first, last)
    assert len(classes) == len(set(classes.values())) == count


def test_known_names_follow_the_official_class_ids():
    assert list(known_classes("cifar100").values())[:2] == ["apple", "aquarium_fish"]
    assert next(iter(known_classes("tiny_imagenet").items())) == ("n02124075", "Egyptian Mau")
    assert list(known_classes("imagenet_r").items())[1] == ("n01484850", "great_white_shark")


def test_seeded_orders_are_numpys_legacy_ones():
    assert class_order("seed:1993", 100)[:6] == [68, 56, 78, 8, 23, 84]
    assert class_order("seed:1993", 200)[:6] == [168, 136, 51, 9, 183, 101]


def test_other_orders():
    assert class_order("natural", 3) == [0, 1, 2]
    assert class_order("paper", 3, [2, 0, 1]) == [2, 0, 1]
    assert class_order([1, 0], 2) == [1, 0]


def test_names_that_come_more_than_once_get_their_place():
    assert distinct(["cat", "dog", "cat", "owl"]) == ["cat (1)", "dog", "cat (3)", "owl"]


@pytest.mark.parametrize(
    ("spec", "paper", "words"),
    [
        ("paper", None, "no published order of these 3 classes"),
        ("paper", [1, 0], "no published order of these 3 classes"),
    ],
)
def test_impossible_orders_are_refused(spec, paper, words):
    with pytest.raises(ValueError, match=words):
        class_order(spec, 3, paper)

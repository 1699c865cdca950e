import pytest

from dist_vlcl.model.units import UnitId
from dist_vlcl.options import validate
from dist_vlcl.orders import PLAN_BRANCHES, Order, OrderPlan, assign, describe


def units(vision=12, language=12):
    return [UnitId(branch, layer) for branch, depth in (("language", language), ("vision", vision)) for layer in range(1, depth + 1)]


def zeroth(plan, branch, **depths):
    return [unit.layer for unit, order in assign(units(**depths), plan).items() if unit.branch == branch and order is Order.ZEROTH]


PLANS = {  # as the paper has them, at depth 12, and at odd and unequal depths
    ("all", 12): list(range(1, 13)),
    ("hop_odd", 12): [1, 3, 5, 7, 9, 11],
    ("hop_even", 12): [2, 4, 6, 8, 10, 12],
    ("prefix", 12): [1, 2, 3, 4, 5, 6],
    ("suffix", 12): [7, 8, 9, 10, 11, 12],
    ("all", 5): [1, 2, 3, 4, 5],
    ("hop_odd", 5): [1, 3, 5],
    ("hop_even", 5): [2, 4],
    ("prefix", 5): [1, 2],
    ("suffix", 5): [4, 5],
    ("hop_odd", 1): [1],
}


@pytest.mark.parametrize("branch", ["dual", "vision", "language"])
@pytest.mark.parametrize(("layers", "depth"), PLANS)
def test_a_plan_names_the_paper_s_layers_in_its_branches_and_no_others(branch, layers, depth):
    plan = OrderPlan(branch, layers)
    for tower in ("vision", "language"):
        expected = PLANS[layers, depth] if tower in PLAN_BRANCHES[branch] else []
        assert zeroth(plan, tower, vision=depth, language=depth) == expected


@pytest.mark.parametrize("layers", ["all", "hop_odd", "hop_even", "prefix", "suffix", [1, 3]])
@pytest.mark.parametrize("branch", ["dual", "vision", "language", "none"])
@pytest.mark.parametrize(("vision", "language"), [(12, 12), (24, 12), (5, 4)])
def test_every_unit_gets_exactly_one_order(branch, layers, vision, language):
    everyone = units(vision, language)
    orders = assign(everyone, OrderPlan(branch, layers))
    assert list(orders) == everyone
    assert set(orders.values()) <= {Order.FIRST, Order.ZEROTH}


def test_towers_of_unequal_depth_are_planned_each_on_its_own():
    assert zeroth(OrderPlan("dual", "prefix"), "vision", vision=24, language=12) == list(range(1, 13))
    assert zeroth(OrderPlan("dual", "prefix"), "language", vision=24, language=12) == list(range(1, 7))
    assert zeroth(OrderPlan("dual", "suffix"), "vision", vision=24, language=12) == list(range(13, 25))


def test_hop_odd_and_hop_even_share_the_tower():
    odd, even = (assign(units(), OrderPlan("dual", layers)) for layers in ("hop_odd", "hop_even"))
    assert all({odd[unit], even[unit]} == {Order.FIRST, Order.ZEROTH} for unit in units())


@pytest.mark.parametrize(("layers", "expected"), [("prefix", [1, 2, 3]), ("suffix", [10, 11, 12])])
def test_span_sets_the_length_of_prefix_and_suffix(layers, expected):
    assert zeroth(OrderPlan("vision", layers, span=3), "vision") == expected


def test_layers_may_be_a_list_or_a_mapping_from_branch_to_layers():
    assert zeroth(OrderPlan("dual", [2, 7]), "vision") == zeroth(OrderPlan("dual", [7, 2]), "language") == [2, 7]
    plan = OrderPlan("dual", {"vision": [1, 12], "language": "hop_even"})
    assert zeroth(plan, "vision") == [1, 12]
    assert zeroth(plan, "language") == [2, 4, 6, 8, 10, 12]
    assert zeroth(OrderPlan("dual", {"vision": [3]}), "language") == []


def test_the_named_order_and_the_rest_are_what_the_plan_says():
    for order in Order:
        for rest in Order:
            orders = assign(units(2, 2), OrderPlan("vision", [1], order=order.value, rest=rest.value))
            assert list(orders.values()) == [rest, rest, order, rest]


def test_the_rest_may_have_an_order_per_branch():
    orders = assign(units(2, 2), OrderPlan("language", [2], rest={"language": "frozen", "vision": "first"}))
    assert [order.value for order in orders.values()] == ["frozen", "zeroth", "first", "first"]  # language is first


def test_branch_none_leaves_every_unit_to_the_rest():
    assert set(assign(units(), OrderPlan("none", "all")).values()) == {Order.FIRST}
    assert set(assign(units(), OrderPlan("none", "all", rest="frozen")).values()) == {Order.FROZEN}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (OrderPlan("both"), "orders.branch='both': choose from dual, vision, language, none"),
        (OrderPlan(layers="odd"), "orders.layers='odd': choose from all, hop_odd, hop_even, prefix, suffix"),
        (OrderPlan(layers=[1, 13]), "the language tower has no block 13; choose from 1 to 12"),
        (OrderPlan("vision", [0]), "the vision tower has no block 0; choose from 1 to 12"),
        (OrderPlan(layers=[]), "no layer of the dual branch is chosen"),
        (OrderPlan(layers={}), "no layer of the dual branch is chosen"),
        (OrderPlan(order="second"), "orders.order='second': choose from first, zeroth, frozen"),
        (OrderPlan(rest="none"), "orders.rest='none': choose from first, zeroth, frozen"),
        (OrderPlan(rest={"vision": "first"}), "or first or frozen for each branch of a plan: {language: frozen, vision: first}"),
        (OrderPlan(rest={"vision": "zeroth", "language": "first"}), "or first or frozen for each branch of a plan"),
        (OrderPlan(rest=["first"]), "orders.rest=['first']: choose from first, zeroth, frozen"),
        (OrderPlan(rest={"vision": ["first"], "language": "first"}), "or first or frozen for each branch of a plan"),
        (OrderPlan("none", "all", rest={"language": "frozen", "vision": "first"}), "or first or frozen for each branch of a plan"),
        (OrderPlan(layers="prefix", span=0), "orders.span=0: give a number of at least 1, or null"),
        (OrderPlan(layers="suffix", span=13), "orders.span=13: the language tower has 12 blocks; choose from 1 to 12"),
        (OrderPlan(layers={"vison": [1], "language": [1]}), "orders.layers"),
        (OrderPlan(layers={"vision": "odd"}), "orders.layers"),
        (OrderPlan("vision", {"vision": [1], "language": [1]}), "orders.layers.language: orders.branch=vision chooses from vision only"),
        (OrderPlan(layers=7), "orders.layers"),
        (OrderPlan(layers=["a", 1, 99]), "orders.layers"),
    ],
    ids=str,
)
def test_an_impossible_plan_is_refused_with_a_reason(plan, words):
    with pytest.raises(ValueError) as caught:
        validate(plan, "orders")
        assign(units(), plan)
    assert words in str(caught.value)


def test_a_plan_of_one_branch_does_not_need_the_other():
    assert set(assign(units(12, 0), OrderPlan("vision", "all")).values()) == {Order.ZEROTH}


def test_the_table_shows_a_mark_per_layer():
    assert describe(assign(units(4, 3), OrderPlan("vision", "hop_odd"))) == [("language", "1 1 1"), ("vision", "0 1 0 1")]
    assert describe(assign(units(4, 3), OrderPlan("vision", "hop_odd", order="frozen"))) == [("language", "1 1 1"), ("vision", "- 1 - 1")]

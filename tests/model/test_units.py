import pytest
import torch
from torch import nn

from dist_vlcl.model.units import FlatUnits, Unit, UnitId, Units, freeze
from dist_vlcl.orders import Order, OrderPlan, assign
from tests.helpers.tiny_clip import LORA, MOE, adapter_values, tiny_clip


def planned(layers, adapter=MOE, **options):
    """Return tiny towers of other weights, whose units are stored as a plan has them."""
    towers = tiny_clip(adapter=adapter, **options)
    if layers == "first":
        return towers, {}
    orders = assign(towers.units, OrderPlan("dual", layers))
    members = {b: [u for id, u in towers.units.items() if id.branch == b and orders[id] is Order.ZEROTH] for b in ("language", "vision")}
    return towers, {branch: FlatUnits(units) for branch, units in members.items()}


def test_units_come_language_first_and_print_as_their_address():
    assert [str(id) for id in tiny_clip().units] == [f"language.{k}" for k in (1, 2, 3)] + [f"vision.{k}" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("adapter", [MOE, LORA], ids=["moe", "lora"])
def test_a_checkpoint_moves_between_plans(adapter):
    source = tiny_clip(adapter=adapter, seed=1)
    state = adapter_values(source)
    for layers in ("hop_odd", "hop_even", "first", "suffix", "all", "hop_odd"):
        towers, _ = planned(layers, adapter)
        towers.units.load_state_dict(state)
        state = adapter_values(towers)
    for name, tensor in source.units.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_loaded_state_reaches_the_flat_values_and_the_tower():
    source, (towers, flats) = tiny_clip(seed=1), planned("hop_odd")
    towers.units.load_state_dict(adapter_values(source))
    for branch, flat in flats.items():
        expected = torch.cat(
            [t.flatten() for id, u in source.units.items() if id.branch == branch and id in flat.slices for t in u.tensors().values()]
        )
        assert torch.equal(flat.values_n, expected)


def test_flat_values_and_the_tensors_of_units_are_one_memory():
    towers, flats = planned("all")
    for branch, flat in flats.items():
        flat.values_n.add_(1)
        seen = torch.cat([t.flatten() for id, u in towers.units.items() if id.branch == branch for t in u.tensors().values()])
        assert torch.equal(seen, flat.values_n)
        assert flat.names() == [
            (f"{id}/{n}", t.numel()) for id, u in towers.units.items() if id.branch == branch for n, t in u.tensors().items()
        ]


def test_sets_are_views_of_k_flat_values():
    _, flats = planned("hop_odd")
    flat = flats["vision"]
    values_Kn = torch.stack([flat.values_n, flat.values_n * 2])
    for id, tensors in flat.views(values_Kn).items():
        for name, t in tensors.items():
            own = flat.units[id].tensors()[name]
            assert torch.equal(t[0], own) and torch.equal(t[1], own * 2)
            assert t.untyped_storage().data_ptr() == values_Kn.untyped_storage().data_ptr()


def test_zeroth_order_and_frozen_tensors_are_no_parameters():
    towers, _ = planned("hop_odd")
    freeze(towers.units[UnitId("vision", 2)])
    trainable = {name for name, p in towers.named_parameters() if p.requires_grad}
    assert {name.split(".adapter.")[0] for name in trainable} == {"vision.blocks.3", "language.blocks.1"}


def test_freezing_keeps_the_values():
    towers = tiny_clip()
    before = adapter_values(towers)
    for unit in towers.units.values():
        freeze(unit)
        freeze(unit)  # once more does nothing
    assert not any(p.requires_grad for p in towers.parameters())
    for name, tensor in towers.units.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("vision.1/router"), "vision.1/router"),
        (lambda state: state.update({"vision.9/router": torch.zeros(1)}), "vision.9/router"),
        (lambda state: state.update({"vision.1/router": torch.zeros(3, 2)}), r"vision.1/router: the model has \(32, 2\).*\(3, 2\)"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_a_state_that_does_not_fit_is_refused_with_nothing_changed(damage, words):
    towers, state = tiny_clip(), adapter_values(tiny_clip(seed=1))
    before = adapter_values(towers)
    damage(state)
    with pytest.raises(ValueError, match=words):
        towers.units.load_state_dict(state)
    for name, tensor in towers.units.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_adapter_made_of_modules_is_refused():
    with pytest.raises(ValueError, match=r"Linear\.0\.weight|Sequential\.0\.weight: make it a parameter of the adapter itself"):
        Unit(UnitId("vision", 1), nn.Sequential(nn.Linear(2, 2)))


def test_units_sort_themselves():
    make = lambda branch, layer: Unit(UnitId(branch, layer), nn.Linear(1, 1))  # noqa: E731
    units = Units([make("vision", 10), make("vision", 2), make("language", 1)])
    assert [str(id) for id in units] == ["language.1", "vision.2", "vision.10"]
    assert len(units) == 3 and units[UnitId("vision", 2)].numel == 2

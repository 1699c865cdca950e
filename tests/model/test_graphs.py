"""Which calls share a recording, and which do not: with a stand-in for the GPU's graph, that runs the function it was recorded with.

That a replay has the bits of the function itself is for tests/test_gpu.py.
"""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch

from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.model import graphs
from dist_vlcl.model.graphs import Graphs
from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.model.units import UnitId
from dist_vlcl.orders import OrderPlan, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrderConfig
from tests.helpers.tiny_clip import NAMES, batch_of, pictures, tiny_clip

WEIGHT, LEARNING = torch.ones(1), torch.ones(1, requires_grad=True)


RECORDING = graphs.Graph


class StandIn:
    """The function as it was recorded."""

    recorded = 0

    def __init__(self, function, tensors, learning, pool):
        self.function, StandIn.recorded = function, StandIn.recorded + 1

    def __call__(self, tensors):
        return self.function(tensors, {})


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "Graph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(Graphs, "has_failed", False)
    StandIn.recorded = 0


def scaled(weights, x, factor, shift):
    return (x * factor + shift,)


def test_the_second_call_records_and_later_ones_replay_for_new_numbers():
    call = functools.partial(Graphs(), scaled)
    for k in range(4):
        x = torch.full((2,), float(k))
        assert torch.equal(call((x, 2.0, 1), {})[0], 2 * x + 1)
        assert StandIn.recorded == min(k, 1)


@pytest.mark.parametrize(
    "others",
    [
        lambda x: ((torch.ones(3), 2.0, 1), {}),
        lambda x: ((x.double(), 2.0, 1), {}),
        lambda x: ((x, 3.0, 1), {}),
        lambda x: ((x, 2.0, 2), {}),
        lambda x: ((x, torch.tensor(2.0), 1), {}),
        lambda x: ((x, 2.0, 1), {"w": WEIGHT}),
        lambda x: ((x, 2.0, 1), {"w": LEARNING}),
        lambda x: ((Perturbed(x, x), 2.0, 1), {}),
        lambda x: ((Perturbed(x, x, torch.bfloat16), 2.0, 1), {}),
    ],
    ids=["shape", "dtype", "value", "another value", "kind", "weights", "learning weights", "perturbed", "its precision"],
)
def test_what_differs_in_anything_but_numbers_is_another_recording(others):
    call, x = functools.partial(Graphs(), scaled), torch.ones(2)
    for _ in range(3):
        call((x, 2.0, 1), {})
        arguments, weights = others(x)
        found = call(arguments, weights)[0]
        expected = scaled({}, *arguments)[0]
        same = [
            torch.equal(getattr(found, part), getattr(expected, part)) for part in ("base", "change") if isinstance(expected, Perturbed)
        ]
        assert all(same) if same else torch.equal(found, expected)
    assert StandIn.recorded == 2


def test_sets_of_one_block_are_not_replayed_for_another_s():
    towers = tiny_clip()
    tower, images = towers.vision, pictures(9)
    units = {id: unit for id, unit in towers.units.items() if id.branch == "vision"}

    def of(layer):
        id = UnitId("vision", layer)
        return {id: {name: t.detach()[None] + 0.1 for name, t in units[id].tensors().items()}}

    with torch.no_grad():
        expected = {layer: tower.run(tower.embed(images), images, stacked_params=of(layer))[0] for layer in (1, 2)}
        tower.graphs = Graphs()
        for layer in (1, 1, 2, 2, 1, 2):
            assert torch.equal(tower.run(tower.embed(images), images, stacked_params=of(layer))[0], expected[layer])
    assert not torch.equal(expected[1], expected[2]) and StandIn.recorded > 1


def test_rare_shapes_do_not_drive_out_recordings_and_few_with_gradients_are_kept():
    graphs_, weight = Graphs(), torch.ones(1, requires_grad=True)
    call = functools.partial(graphs_, lambda weights, x: (x * 2,))
    for size in range(1, 200):  # once each: seen, not recorded
        call((torch.ones(size),), {})
    assert StandIn.recorded == 0
    for _ in range(3):
        for size in range(1, 21):
            call((torch.ones(size),), {})
    assert StandIn.recorded == 20
    for _ in range(3):
        for size in (300, 301):
            call((torch.ones(size),), {"w": weight})
    assert StandIn.recorded == 22
    for _ in range(2):
        call((torch.ones(302),), {"w": weight})
    assert list(map(len, graphs_.graphs.values())) == [2, 20]


def test_a_copy_of_a_model_has_no_recordings():
    towers = tiny_clip()
    towers.record()
    assert towers.vision.graphs is not None
    assert copy.deepcopy(towers.vision).graphs is None and towers.copy().vision.graphs is None


def test_a_recording_that_fails_gives_one_warning_and_the_function_runs_directly(monkeypatch):
    tower, other = (functools.partial(Graphs(), scaled) for _ in range(2))
    for _ in range(2):
        assert tower((torch.ones(3), 2.0, 1), {})[0].tolist() == [3, 3, 3]
    assert StandIn.recorded == 1

    def fails(*_):
        StandIn.recorded += 1
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("the recording is not usable")  # so it is when torch ends it

    monkeypatch.setattr(graphs, "Graph", fails)
    tower((torch.ones(2), 2.0, 1), {})
    with pytest.warns(UserWarning, match=r"not permitted.*same results.*model\.graphs=false") as warned:
        for call in (tower, tower, other):
            for k in range(3):
                x = torch.full((2,), float(k))
                assert torch.equal(call((x, 2.0, 1), {})[0], 2 * x + 1)
    assert len(warned) == 1 and StandIn.recorded == 2  # neither this tower nor the other one tries again
    assert tower((torch.ones(3), 2.0, 1), {})[0].tolist() == [3, 3, 3]
    assert tower.func.graphs == {True: {}, False: {}}  # their memory is given back


def test_a_step_whose_recordings_fail_learns_what_a_step_without_recordings_learns(monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(graphs, "Graph", fails)
    plan, world, learned = OrderPlan("dual", "hop_odd"), World.alone(), []
    for records in (True, False):
        towers = tiny_clip()
        step = HybridStep(
            towers, assign(towers.units, plan), ZerothOrderConfig(), lambda m: FirstOrder(world, FirstOrderConfig(), m), world
        )
        step.begin(NAMES)
        if records:
            towers.record()
        for k in range(3):
            step([batch_of(8, seed=k)] * 2, Key(1, k), 1e-2)
        learned.append(step.adapters())
    assert Graphs.has_failed and all(torch.equal(learned[0][name], learned[1][name]) for name in learned[1])


LEARNS, PROBE = (3.0, True), (3.0, False)
REPLAYS = {  # what a replay overwrites, and whether that is refused
    "nothing": (LEARNS, None, False),
    "features": (LEARNS, lambda graph: graph.outputs[0], True),
    "a cached_input": (LEARNS, lambda graph: graph.outputs[1], True),
    "gradients": (LEARNS, lambda graph: graph.gradients[0], True),
    "nothing, of a pair": (PROBE, None, False),
    "the change of a pair": (PROBE, lambda graph: graph.outputs[0].change, True),
    "nothing, of a diverged model": ((float("inf"), True), None, False),
}


@pytest.fixture
def recorded(monkeypatch):
    """Stand-ins for CUDA: what is recorded is run, and a replay writes nothing, but for what `recorded.overwrite` does at the last."""
    found = SimpleNamespace(graphs=[], overwrite=lambda: None)

    class Replay:
        def replay(self):
            if self is found.graphs[-1]:
                found.overwrite()

    nothing = contextlib.nullcontext()
    for name in ("empty_cache", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: found.graphs.append(graph) or nothing)
    monkeypatch.setattr(graphs, "_stream", lambda _: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(graphs, "Graph", RECORDING)
    return found


@pytest.mark.parametrize(("weight", "overwritten", "is_refused"), REPLAYS.values(), ids=REPLAYS)
def test_a_replay_that_gives_other_numbers_is_refused(recorded, weight, overwritten, is_refused):
    value, learns = weight
    used, unused = (torch.tensor(x, requires_grad=learns) for x in (value, 1.0))
    graph = RECORDING.__new__(RECORDING)
    if overwritten:
        recorded.overwrite = lambda: overwritten(graph).data.add_(1)

    def function(inputs, weights):
        result = inputs[0] * weights.get("used", used)
        return result if learns else Perturbed(result, 1e-4 * result), inputs[0] + 1, None

    with pytest.raises(RuntimeError, match="other numbers") if is_refused else contextlib.nullcontext():
        graph.__init__(function, [torch.tensor([1.0, 0.0])], {"used": used, "unused": unused} if learns else {}, None)
    if learns and not is_refused:
        assert len(recorded.graphs) == 2 and graph.learning == [used]


def nodes_of(result):
    """Return the leaves' nodes that a result's backward pass reaches."""
    found, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node for node in found if hasattr(node, "variable")}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("branch", ["vision", "language"])
def test_a_recording_keeps_off_the_weights_own_nodes_which_belong_to_another_stream(recorded, monkeypatch, branch, checkpoint):
    """DDP holds the node of every leaf from before the recording; its stream would have to wait for the recording (pytorch #180090)."""
    towers = tiny_clip()
    tower = towers.tower(branch)
    tower.checkpoint = checkpoint
    weights = {p for p in tower.parameters() if p.requires_grad}
    held = {p.expand_as(p).grad_fn.next_functions[0][0] for p in weights}  # as DDP does
    assert held and {node.variable for node in held} == weights
    inputs, reached, run = pictures(8) if branch == "vision" else towers.prompts(["one", "two"]), [], tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a: (out := run(*a), reached.append(nodes_of(out[0])))[0])
    tower.graphs = Graphs()
    features, _ = tower.run(tower.embed(inputs), inputs)
    grad_output = torch.linspace(0.5, 1.5, features.numel()).view_as(features)
    expected = dict(zip(weights, torch.autograd.grad(features, list(weights), grad_output, allow_unused=True), strict=True))
    assert reached.pop() <= held  # the first call, which is not recorded
    tower.run(tower.embed(inputs), inputs)
    [graph] = tower.graphs.graphs[True].values()
    assert len(recorded.graphs) == 2 and len(reached) == 2
    for leaves in reached:
        assert not leaves & held and {n.variable.data_ptr() for n in leaves} <= {p.data_ptr() for p in weights}
    found = dict(zip(graph.learning, graph.gradients, strict=True))
    assert set(found) == {p for p, gradient in expected.items() if gradient is not None}
    assert all(torch.equal(gradient, expected[p]) for p, gradient in found.items())


def test_a_graph_whose_recording_fails_stays_alive_and_one_that_succeeds_does_not(recorded):
    """torch's allocator keeps a pointer to the graph until its recording ends well."""

    def fails_while_recording(inputs, weights):
        if recorded.graphs:
            raise RuntimeError("not permitted")
        return (inputs[0] * 2,)

    assert not RECORDING.unfinished
    with pytest.raises(RuntimeError, match="not permitted"):
        RECORDING(fails_while_recording, [torch.ones(2)], {}, None)
    assert recorded.graphs[0] in RECORDING.unfinished.pop()
    RECORDING(lambda inputs, weights: (inputs[0] * 2,), [torch.ones(2)], {}, None)
    assert not RECORDING.unfinished


def test_a_weight_that_no_alias_can_stand_in_for_is_refused_before_it_stops_learning(recorded):
    weight = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"adapter\.scale is read in another way"):
        RECORDING(lambda inputs, weights: (inputs[0] * weight,), [torch.ones(2)], {"adapter.scale": weight}, None)


def test_a_clone_of_a_perturbed_tensor_has_its_bits():
    x = Perturbed(torch.randn(100), torch.randn(100) * 1e-3)
    assert torch.equal(x.clone().change, x.change) and torch.equal(x.clone().base, x.base)

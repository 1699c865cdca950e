"""Every family of models learns on two processes, and under ZeRO-3, what it learns alone."""

import importlib.util

import pytest
import torch

from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.first_order import FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.dist.zero import first_order
from dist_vlcl.orders import OrderPlan, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key
from tests.dist.test_hybrid_step import NAMES, STRATEGIES, Part
from tests.dist.test_zero import environment_of
from tests.helpers.families import FAMILIES, images_of, tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_clip import LORA, MOE

PLANS = {name: ((MOE, LORA)[k % 2], OrderPlan("dual", "hop_odd")) for k, name in enumerate(FAMILIES)}


def learn(world: World) -> tuple[str, dict, str]:
    """Take three hybrid steps with the sigmoid loss in each family; return engine, adapters and a digest of them."""
    learned = {}
    for name, (adapter, plan) in PLANS.items():
        towers = tiny(name, adapter, loss="sigmoid")
        config = FirstOrderConfig(lr=1e-2)
        step = HybridStep(
            towers, assign(towers.units, plan), STRATEGIES["mozo"], lambda model, config=config: first_order(world, config, model), world
        )
        step.begin(NAMES)
        for k in range(3):
            images, labels = images_of(towers, 10, seed=k), torch.arange(10) % len(NAMES)
            low, high = (10 * rank // world.data_size for rank in (world.data_rank, world.data_rank + 1))
            assert not step([Part(images[low:high], labels[low:high], torch.arange(low, high), 10)], Key(1000 + k, k), lr=1e-2).skipped
        learned |= {f"{name}/{key}": t for key, t in step.adapters().items()}
    return world.engine, learned, digest(learned)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_processes_learn_what_one_learns(engine):
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is an extra: pip install '.[deepspeed]'")
    _, alone, _ = learn(World.alone())
    ranks = run_ranks(learn, 2, timeout_s=200, environment=environment_of(engine))
    assert [r[0] for r in ranks] == [engine] * 2 and ranks[0][2] == ranks[1][2]
    start = {f"{name}/{key}": t for name, (adapter, _) in PLANS.items() for key, t in tiny(name, adapter).units.state_dict().items()}
    for name, tensor in alone.items():
        torch.testing.assert_close(ranks[0][1][name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(tensor, start[name]) or name.endswith("/noise"), name

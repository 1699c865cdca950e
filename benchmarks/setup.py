"""What a benchmark runs: a model of a size, an order plan, a strategy and a batch, by the names of configs/."""

import argparse
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import yaml

from dist_vlcl.config import CONFIG_FOLDER
from dist_vlcl.data.loader import Batch
from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import PRECISIONS, ModelConfig, TwoTowers, build_clip
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.orders import PLAN_LAYERS, Order, OrderPlan, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.update import EVALUATIONS, ZerothOrderConfig

SETTINGS = ("first", *(f"{branch}_{layers}" for branch in ("dual", "vision", "language") for layers in PLAN_LAYERS))
STRATEGIES = ("naive", "sign", "conservative", "mozo")


@dataclass(frozen=True)
class Workload:
    """One cell of a benchmark. Names are those of configs/model, adapter, orders and zo; `images` is the global batch."""

    model: str = "vit_b16"
    adapter: str = "moe"
    orders: str = "dual_hop_odd"
    zo: str = "conservative"
    images: int = 128
    classes: int = 20
    sides: int = 1
    checkpoint: bool = False
    precision: str = "fp32"
    graphs: bool = True
    evaluation: str = "auto"
    options: tuple[tuple[str, Any], ...] = ()  # of the adapter, such as (("experts", 22),)

    @property
    def zeroth(self) -> ZerothOrderConfig:
        return ZerothOrderConfig(**{**_values("zo", self.zo), "sides": self.sides, "evaluation": self.evaluation})

    @property
    def plan(self) -> OrderPlan:
        return OrderPlan(**_values("orders", self.orders))

    @property
    def class_names(self) -> list[str]:
        return [f"class {number}" for number in range(self.classes)]

    def towers(self, device: str, context: str = "truncated") -> TwoTowers:
        """Return a fresh model with random weights: speed and memory do not depend on them. Adapters act, as after some training."""
        kind: Any = LoRAConfig if self.adapter.startswith("lora") else MoEConfig
        adapter = kind(**{**_values("adapter", self.adapter), **dict(self.options)})
        values = _values("model", self.model)
        name = values.get("model", values)["name"]
        model = ModelConfig(name, "random", context=context, precision=self.precision, checkpoint=self.checkpoint, graphs=self.graphs)
        towers = build_clip(model, adapter)
        generator = torch.Generator().manual_seed(1)
        for unit in towers.units.values():
            for tensor in unit.tensors().values():
                tensor.detach().add_(torch.randn(tensor.shape, generator=generator) * 0.02)
        return towers.to(device)

    def orders_of(self, towers: TwoTowers) -> dict[Any, Order]:
        return assign(towers.units, self.plan)

    def step(self, towers: TwoTowers, world: World, overlap: bool = True) -> HybridStep:
        """Return the fast step, begun with this workload's classes."""
        step = HybridStep(
            towers,
            self.orders_of(towers),
            self.zeroth,
            lambda model: FirstOrder(world, FirstOrderConfig(), model, overlap),
            world,
            max_skips=1 << 30,
        )
        step.noise_is_checked = True  # that costs, and what is refused is to be measured
        step.begin(self.class_names)
        return step

    def noise(self, key: Key, device: str) -> StepNoise:
        rows = {"vision": torch.arange(self.images, device=device), "language": torch.arange(self.classes, device=device)}
        return StepNoise(key, rows)

    def batch(self, image_size: int, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (self.images, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, self.classes, (self.images,), generator=generator)
        return Batch(images, labels, torch.arange(self.images), self.images, 0, [])


def add_workload(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of a workload; `defaults` replace those of `Workload`."""
    given = {f.name: f.default for f in fields(Workload)} | {"device": "auto"} | defaults
    parser.add_argument("--model", default=given["model"], help="a file of configs/model; random weights (default: %(default)s)")
    parser.add_argument("--adapter", default=given["adapter"], help="a file of configs/adapter (default: %(default)s)")
    parser.add_argument("--zo", default=given["zo"], help=f"{', '.join(STRATEGIES)} (default: %(default)s)")
    parser.add_argument("--sides", type=int, default=given["sides"], choices=(1, 2), help="of the finite difference (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=given["images"], help="of the batch (default: %(default)s)")
    parser.add_argument("--classes", type=positive, default=given["classes"], help="of the task (default: %(default)s)")
    parser.add_argument("--precision", default=given["precision"], choices=list(PRECISIONS), help="of the model (default: %(default)s)")
    parser.add_argument("--evaluation", default=given["evaluation"], choices=EVALUATIONS, help="of losses (default: %(default)s)")
    parser.add_argument(
        "--count-on",
        default="meta",
        choices=("meta", "cpu"),
        help="where costs are counted: cpu is quicker for a small model (default: %(default)s)",
    )
    parser.add_argument("--device", default=given["device"], choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")


def add_orders(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--orders", default=default, help="names of configs/orders with commas between, or all (default: %(default)s)")


def settings_of(args: argparse.Namespace) -> list[str]:
    """Return the order plans that were asked for; raise ValueError for one that does not exist."""
    names = list(SETTINGS) if args.orders == "all" else args.orders.split(",")
    for name in names:
        if name not in SETTINGS:
            raise ValueError(f"--orders {name}: choose from all, {', '.join(SETTINGS)}")
    return names


def workload_of(args: argparse.Namespace, **changes: Any) -> Workload:
    """Return the workload of a command line, with some of its fields changed; raise ValueError in the words of the option."""
    names = {f.name for f in fields(Workload)}
    workload = Workload(**{k: v for k, v in vars(args).items() if k in names and k != "orders"} | changes)
    for group, name in {"model": workload.model, "adapter": workload.adapter, "zo": workload.zo, "orders": workload.orders}.items():
        _values(group, name)
    return workload


def positive(text: str) -> int:
    """Read a count from a command line; argparse.ArgumentTypeError in words."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: give a positive number")
    return int(text)


def numbers(text: str) -> list[int]:
    """Read counts with commas between; argparse.ArgumentTypeError in words."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: give positive numbers with commas between, such as 1,2,4")
    return [int(part) for part in text.split(",")]


def device_of(args: argparse.Namespace) -> str:
    """Return cpu or cuda, with the precision that zeroth order needs; raise ValueError where there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine; use --device cpu or auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


@cache
def _values(group: str, name: str) -> dict[str, Any]:
    """Return the values of a file of configs/; raise ValueError that lists what there is."""
    folder = CONFIG_FOLDER / group
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"--{group} {name}: choose from {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    values = yaml.safe_load(path.read_text()) or {}
    return {key: value for key, value in values.items() if key != "defaults"}

"""One update of a hybrid step: first-order and zeroth-order units together (concepts.md 2.9)."""

# B samples of this rank, U units, F statistics

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import World
from dist_vlcl.losses import BatchLosses, LossReport, sample_losses
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.statistics import UnitStatistics
from dist_vlcl.model.tower import MIN_SAMPLES
from dist_vlcl.model.units import FlatUnits, UnitId, freeze
from dist_vlcl.options import BRANCHES
from dist_vlcl.orders import Order
from dist_vlcl.precision import SlopePrecision
from dist_vlcl.zo.difference import Candidate
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import Move, ZerothOrder, ZerothOrderConfig


@dataclass
class StepReport:
    """The result of a step, the same on every rank."""

    loss: float  # mean loss (model.loss) over the global batch, before the update
    moves: list[Move] = field(default_factory=list)  # of the zeroth-order units
    gradient_norm: float | None = None  # of all first-order units together
    skipped: str | None = None  # the reason, if nothing was updated
    stop: bool = False  # some rank was asked to stop
    count: int = 0  # samples of the global batch that were used
    unit_statistics: Tensor | None = None  # [U, F], `model.statistics.STATISTICS` of every unit, if `observe` was set


class HybridStep:
    """Forward both towers once, back-propagate for FIRST units, estimate for ZEROTH units from the same features, then update all.

    `first_order_of` makes the first-order engine, after the other units have become buffers. The run stops after `max_skips` skipped steps
    in a row. A rank pads its samples up to `min_samples`. All ranks build this together. They start with rank 0's adapters.
    """

    def __init__(
        self,
        towers: TwoTowers,
        orders: Mapping[UnitId, Order],
        zeroth: ZerothOrderConfig,
        first_order_of: Callable[[TwoTowers], FirstOrder],
        world: World,
        max_skips: int = 10,
        min_samples: int = MIN_SAMPLES,
    ):
        self.towers, self.orders, self.world, self.max_skips, self.min_samples = towers, dict(orders), world, max_skips, min_samples
        self.skips = 0
        self.tokens = torch.zeros(0, 0, dtype=torch.long)
        units = towers.units
        chosen = {b: [units[u] for u in units if u.branch == b and orders[u] is Order.ZEROTH] for b in BRANCHES}
        self.flats = {branch: FlatUnits(members) for branch, members in chosen.items() if members}
        for address, unit in units.items():
            if orders[address] is Order.FROZEN:
                freeze(unit)
        if world.size > 1:
            # Copies, because a view is pickled with its whole buffer.
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in units.state_dict().items()}
            units.load_state_dict(world.on_main(lambda: copies, "the adapters"))
        if towers.config.graphs and world.device.type == "cuda" and world.engine == "ddp":
            towers.record()
        self.zeroth = ZerothOrder(self.flats, zeroth)
        self.first = first_order_of(towers)
        is_sharded = world.engine.startswith("zero3") and bool(self.first.parameters)
        self.precision = SlopePrecision(towers, self.zeroth, world, is_sharded)

        names = {id(t): f"{address}/{name}" for address, unit in units.items() for name, t in unit.tensors().items()}
        self.first_names = [names[id(p)] for p in self.first.parameters]
        self.first_units = {b: [u for u in units if u.branch == b and orders[u] is Order.FIRST] for b in BRANCHES}
        self.statistics: UnitStatistics | None = None  # made when it is first needed

    @property
    def learns(self) -> bool:
        """Return whether any unit is trained."""
        return bool(self.flats or self.first.parameters)

    @property
    def shares_text(self) -> bool:
        """Whether each rank computes the text of a part of the classes only.

        Ranks have few samples then, and language learns by first order alone: candidates of language would need all text. Frozen language
        is not shared, so that a plan without gradients sends numbers only.
        """
        return self.min_samples == 1 and "language" not in self.flats and bool(self.first_units["language"])

    def begin(self, class_names: Sequence[str]) -> None:
        """Start a task: prompts of its classes, new optimisers. All ranks call this."""
        # A CUDA graph is recorded for each length: fewer lengths, fewer graphs.
        self.tokens = self.towers.prompts(class_names, 4 if self.world.device.type == "cuda" else 1).to(self.world.device)
        self.first.begin()
        for flat in self.flats.values():
            flat.rebind_views()

    def __call__(self, batches: Sequence[Any], key: Key, lr: float, stop: bool = False, observe: bool = False) -> StepReport:
        """Update on one global batch. Its part on this rank, on the device, comes as micro-batches (data.loader.Batch).

        The key must be the same on every rank. Set `stop` if this rank was asked to stop; the report says whether any rank was. With
        `observe` the report has statistics of every unit. All ranks call this, with the same number of micro-batches. Raises
        FloatingPointError after `max_skips` skipped steps in a row.
        """
        self.world.collectives.where = f"step {key.step + 1}"
        self.precision.check_once(self.tokens, max(batches, key=lambda batch: len(batch.labels)), key)
        losses = BatchLosses(self.towers, self.zeroth, self.tokens, self.world, self.precision.delta_branches, stop)
        planned = sum(batch.count for batch in batches)
        self._forward_backward(batches, key, planned, losses)
        report, moves = self._decide(losses, key, lr)  # gradients travel meanwhile
        if moves is None:
            return self._skipped(report)
        if observe:
            self._observe_gradients()
        report.gradient_norm = self.first.update(lr)
        if report.gradient_norm is None:
            report.skipped = "the gradient is not finite"
            return self._skipped(report)
        self.zeroth.apply(moves)
        report.moves = moves
        self.skips = 0
        if observe:
            report.unit_statistics = self._observe_moves(moves)
        return report

    def _forward_backward(self, batches: Sequence[Any], key: Key, planned: int, losses: BatchLosses) -> None:
        """Evaluate the base of each micro-batch, keep it in `losses`, and start the backward pass. planned: samples of the global batch."""
        for k, batch in enumerate(batches):
            with self.first.accumulate(is_last=k == len(batches) - 1), torch.set_grad_enabled(bool(self.first.parameters)):
                part, features = losses.add(self.first.wrapped, batch, key, self.shares_text, self.min_samples)
                logits_BC = self.towers.logits(features["vision"][0], features["language"][0])
                loss_sum = sample_losses(logits_BC, part.labels, self.towers.config.loss)[: part.num_real].sum()
                # DDP averages gradients over ranks. This factor makes the average the mean over the global batch, however it is divided.
                self.first.backward(loss_sum * (self.world.data_size / planned))

    def _decide(self, losses: BatchLosses, key: Key, lr: float) -> tuple[StepReport, list[Move] | None]:
        """Return the report so far and the zeroth-order moves, or None for the moves if a loss is not finite."""
        found: list[LossReport] = []

        def evaluate(candidates: Iterable[Candidate]) -> list[float]:
            found.append(losses(candidates))
            return found[-1].losses

        loss, moves = self.zeroth.decide(evaluate, key, lr)
        last = found[-1]
        report = StepReport(loss, stop=last.stop, count=last.count)
        if moves is None:
            report.skipped = f"the loss is not finite, or too large, on rank {last.faulty_ranks}"
        return report, moves

    def _skipped(self, report: StepReport) -> StepReport:
        self.first.zero_grad()
        self.skips += 1
        if self.skips >= self.max_skips:
            raise FloatingPointError(f"{self.skips} steps in a row were skipped: {report.skipped}; lower first_order.lr or zo.lr_scale")
        return report

    def _observe_gradients(self) -> None:
        with self.first.gathered_parameters():
            self.statistics = self.statistics or UnitStatistics(self.towers.units)
            self.statistics.begin()
        gradients = dict(zip(self.first_names, self.first.gradients(), strict=True))
        for ids in filter(None, self.first_units.values()):
            self.statistics.observe(ids, [gradients[f"{u}/{name}"] for u in ids for name in self.towers.units[u].names])

    def _observe_moves(self, moves: Sequence[Move]) -> Tensor:
        assert self.statistics is not None
        for move in moves:
            for branch, part in move.group.slices.items():
                self.statistics.observe(self.flats[branch].units_in(part), [move.gradients[branch][part]])
        with self.first.gathered_parameters():
            return self.statistics.compute()

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Apply the journal's steps of this task again. Only for plans without first-order units, whose updates are not in the journal."""
        assert not self.first.parameters
        for record in records:
            self.zeroth.replay(record["moves"], Key(record["seed"], record["step"] - 1))

    def adapters(self) -> dict[str, Tensor]:
        """Return a copy of every adapter tensor by name, unsharded. All ranks call this."""
        with self.first.gathered_parameters():
            return {name: t.clone() for name, t in self.towers.units.state_dict().items()}

    def state_dict(self, optimizers: bool = True) -> dict[str, Tensor]:
        """Return everything that a resume needs: the adapters and, if `optimizers`, AdamW's moments. All ranks call this."""
        adapters = {f"adapters/{name}": t for name, t in self.adapters().items()}
        if not optimizers:
            return adapters
        return adapters | {f"adamw/{name}": t for name, t in self.first.state_dict(self.first_names).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state. Call `begin` first, because it makes the optimisers. All ranks call this."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        with self.first.gathered_parameters(writes=True):
            self.towers.units.load_state_dict(under("adapters/"))
        self.first.load_state_dict(under("adamw/"), self.first_names)

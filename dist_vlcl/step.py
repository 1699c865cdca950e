"""One update of a hybrid step: first-order and zeroth-order units together (METHOD 2.9)."""

# K parameter sets, B samples of this rank, C classes, F features, n numbers of a branch

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import World, ordered_sum
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.model.statistics import UnitStatistics
from dist_vlcl.model.units import BRANCHES, FlatUnits, UnitId, freeze
from dist_vlcl.orders import Order
from dist_vlcl.zo.difference import Candidate
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.strategies import Move, ZerothOrder, ZerothOrderConfig

RESOLUTION = 2.0**32  # losses are rounded to 2^-32: sums of up to 2^20 of them are exact, so their order and grouping do not matter

# Matrix products of fewer rows take another path through the CPU libraries, with other last bits: a sample's loss would depend on how many
# share its rank. It also serves a rank without any sample, which DDP wants in the backward pass all the same.
MIN_SAMPLES = 8

MAX_SLOPE_NOISE = 0.1  # of a projected gradient; above it, zeroth order is refused
NOISE_SAMPLES = 32  # of a rank, on which that is measured
COUNT_BITS = 20
MAX_SAMPLES = 2**COUNT_BITS - 1  # of a rank in a step
FINE_EPSILON = 1e-4  # below it, rounding in fp32 counts too: 0.018 of a slope at 1e-4, 0.13 at 1e-5 (a tiny CLIP)


@dataclass
class StepReport:
    """What a step did, the same on every rank."""

    loss: float
    moves: list[Move] = field(default_factory=list)
    gradient_norm: float | None = None
    skipped: str | None = None  # why nothing was updated
    stop: bool = False  # some rank was asked to stop
    count: int = 0
    busy_s: list[float] = field(default_factory=list)  # of every rank: seconds outside of exchanges since the last step's losses
    unit_statistics: Tensor | None = None  # model.statistics.STATISTICS of every unit, where they were asked for


class BatchLosses:
    """Losses of candidates on one global batch, from features: what a candidate leaves alone is not computed again.

    delta_branches: branches whose candidates have the base's features and a change that was carried through the blocks beside the base, not
    features of their own; losses are then taken in float64. It is the same number, with rounding that is relative to the change.
    """

    def __init__(
        self, towers: TwoTowers, flats: Mapping[str, FlatUnits], tokens: Tensor, world: World, delta_branches: Collection[str] = ()
    ):
        self.towers, self.flats, self.tokens, self.world, self.delta_branches = towers, flats, tokens, world, delta_branches
        self.start = {branch: min(unit.layer for unit in flat.slices) for branch, flat in flats.items()}
        self.parts: list[dict[str, Any]] = []  # per micro-batch: images, labels, weight, noise, base features and cached_inputs
        self.flag, self.stop, self.count = False, False, 0
        self.busy_s: list[float] = []
        self.faulty: list[int] = []  # ranks whose loss was not finite

    def add(self, images: Tensor, labels: Tensor, noise: StepNoise, base: Mapping[str, tuple], real: int) -> None:
        """Take a micro-batch with its base evaluation; only the first `real` samples count."""
        features = {branch: out[0].detach() for branch, out in base.items()}
        cached_inputs = {branch: out[1] for branch, out in base.items()}
        self.parts.append(
            {"images": images, "labels": labels, "real": real, "noise": noise, "features": features, "cached_inputs": cached_inputs}
        )

    @torch.no_grad()
    def rebase(self) -> None:
        """Evaluate the base anew, after parameters have changed."""
        for part in self.parts:
            out = self.towers({"vision": part["images"], "language": self.tokens}, part["noise"], self.start)
            part["features"] = {branch: o[0] for branch, o in out.items()}
            part["cached_inputs"] = {branch: o[1] for branch, o in out.items()}

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the mean loss over the global batch of each candidate. One exchange of float64 sums. All ranks call this."""
        sums = torch.zeros(len(candidates), dtype=torch.float64, device=self.world.device)
        places: dict[int, dict[str, int]] = {}  # of this rank's candidates: which of K features each reads
        offsets: dict[str, list[Tensor]] = {branch: [] for branch in self.flats}
        for k in self._own(candidates):
            places[k] = dict.fromkeys(BRANCHES, 0)
            for branch, offset in candidates[k].items():
                offsets[branch].append(offset)
                places[k][branch] = len(offsets[branch])
        for part in self.parts:
            features = {branch: self._features(branch, offsets.get(branch, []), part) for branch in BRANCHES}
            for k, place in places.items():
                image_BF, text_CF = features["vision"][place["vision"]], features["language"][place["language"]]
                sums[k] += self._loss_sum(image_BF, text_CF, part)
        return self._exchange(sums.cpu())

    def _own(self, candidates: Sequence[Candidate]) -> list[int]:
        """Return which candidates this rank's direction group evaluates: of those that perturb the same branches, every G-th."""
        turns: dict[tuple[str, ...], int] = {}
        own = []
        for k, candidate in enumerate(candidates):
            turn = turns.get(tuple(candidate), k)  # a kind begins where the one before it ended
            if turn % self.world.direction_groups == self.world.direction_group:
                own.append(k)
            turns[tuple(candidate)] = turn + 1
        return own

    def _features(self, branch: str, offsets: list[Tensor], part: dict) -> Tensor:
        """Return features `[1 + K, B, F]`: the base's, then one set per offset, restarted at the first perturbed block."""
        base = part["features"][branch].double() if self.delta_branches else part["features"][branch]
        if not offsets:
            return base
        flat, tower = self.flats[branch], self.towers.tower(branch)
        inputs = part["images"] if branch == "vision" else self.tokens
        dtype = torch.promote_types(flat.values_n.dtype, part["features"][branch].dtype)
        is_delta, offsets_Kn = branch in self.delta_branches, torch.stack(offsets).to(dtype)
        values: Any = Perturbed(flat.values_n[None], offsets_Kn) if is_delta else offsets_Kn.add_(flat.values_n)
        cached_input = part["cached_inputs"][branch]
        moved: Any
        moved, _ = tower.run(
            cached_input, inputs, start=self.start[branch], stacked_params=flat.stacked_params(values), noise=part["noise"]
        )
        return torch.cat([base, base + moved.change if is_delta else moved])

    def _loss_sum(self, image_BF: Tensor, text_CF: Tensor, part: dict) -> Tensor:
        logits_BC = (self.towers.logit_scale * image_BF @ text_CF.T).double()
        losses_B = F.cross_entropy(logits_BC, part["labels"], reduction="none")[: part["real"]]
        return (torch.round(losses_B * RESOLUTION) / RESOLUTION).sum()

    def _exchange(self, sums: Tensor) -> list[float]:
        """Return mean losses from every rank's sums; with the first ride counts, stop flags, and how long each rank was at work."""
        is_first = not self.busy_s
        count = sum(part["real"] for part in self.parts)
        rider = [packed(count, self.flag, self.world.collectives.take_busy_s())] if is_first else []
        rows = self.world.gather(torch.cat([sums, torch.tensor(rider, dtype=torch.float64)]), "losses")
        self.faulty = [rank for rank, row in enumerate(rows) if not torch.isfinite(row).all()]
        if is_first:
            counts, flags, self.busy_s = map(list, zip(*map(unpacked, rows[:, -1].tolist()), strict=True))
            self.count, self.stop = sum(counts) // self.world.direction_groups, any(flags)  # each group has the whole batch
        return (ordered_sum(rows)[: len(sums)] / max(self.count, 1)).tolist()


def packed(count: int, flag: bool, busy_s: float) -> float:
    """Return what rides along with losses as one number, an integer below 2^53, which float64 holds exactly: 32 bits of milliseconds, 20 of
    the sample count, one flag. Raises ValueError for a count that does not fit."""
    if count > MAX_SAMPLES:
        raise ValueError(f"train.batch_size gives a rank {count:,} samples in a step, which can take {MAX_SAMPLES:,}")
    return float((min(round(busy_s * 1000), 2**32 - 1) << COUNT_BITS | count) << 1 | flag)


def unpacked(rider: float) -> tuple[int, bool, float]:
    """Return the sample count, the flag and the seconds of a packed number."""
    whole = int(rider)
    return whole >> 1 & MAX_SAMPLES, bool(whole & 1), (whole >> COUNT_BITS + 1) / 1000


class HybridStep:
    """Forward both towers once; back-propagate for FIRST units, estimate for ZEROTH units from the same features; update all."""

    def __init__(
        self,
        towers: TwoTowers,
        orders: Mapping[UnitId, Order],
        zeroth: ZerothOrderConfig,
        first_order_of,
        world: World,
        max_skips: int = 10,
    ):
        self.towers, self.orders, self.world, self.max_skips = towers, dict(orders), world, max_skips
        units = towers.units
        chosen = {b: [units[u] for u in units if u.branch == b and orders[u] is Order.ZEROTH] for b in ("language", "vision")}
        self.flats = {branch: FlatUnits(members) for branch, members in chosen.items() if members}
        for address, unit in units.items():
            if orders[address] is Order.FROZEN:
                freeze(unit)
        for tensor in units.state_dict().values():
            world.broadcast(tensor, "the adapters")
        if towers.config.graphs and world.device.type == "cuda" and world.engine == "ddp":
            towers.record()
        self.zeroth = ZerothOrder(self.flats, zeroth)
        rounded = [branch for branch in self.flats if towers.tower(branch).dtype.itemsize < 4]
        self.delta_branches = {"auto": rounded, "whole": [], "delta": list(self.flats)}[zeroth.evaluation]
        self.is_fine = any(zeroth.epsilon[branch] < FINE_EPSILON for branch in self.flats)
        self.noise_is_checked = not self.flats or (towers.config.precision == "fp32" and not self.is_fine)
        self.first: FirstOrder = first_order_of(towers)
        if not self.noise_is_checked and world.engine.startswith("zero3") and self.first.parameters:
            raise ValueError(
                "the rounding of slopes cannot be measured where ZeRO-3 takes the model apart; take zero2, or model.precision=fp32 with "
                f"every zo.epsilon at least {FINE_EPSILON:g}"
            )
        names = {id(t): f"{address}/{name}" for address, unit in units.items() for name, t in unit.tensors().items()}
        self.first_names = [names[id(p)] for p in self.first.parameters]
        place = {name: k for k, name in enumerate(self.first_names)}
        learning = {b: [u for u in units if u.branch == b and orders[u] is Order.FIRST] for b in BRANCHES}
        self.first_units = [(ids, [place[f"{u}/{name}"] for u in ids for name in units[u].names]) for ids in learning.values() if ids]
        self.statistics: UnitStatistics | None = None  # of the step before, where that was observed
        self.skips = 0
        self.tokens = torch.zeros(0, 0, dtype=torch.long)

    @property
    def learns(self) -> bool:
        """Whether any unit is trained at all."""
        return bool(self.flats or self.first.parameters)

    def begin(self, class_names: Sequence[str]) -> None:
        """Start a task: prompts of its classes, fresh optimisers. All ranks call this."""
        few_lengths = 4 if self.world.device.type == "cuda" else 1  # a CUDA graph is recorded for each
        self.tokens = self.towers.prompts(class_names, multiple=few_lengths).to(self.world.device)
        self.first.begin()
        for flat in self.flats.values():
            flat.rebind_views()
        self.zeroth.begin()
        self.statistics = None

    def __call__(self, batches: Sequence[Any], key: Key, lr: float, stop: bool = False, observe: bool = False) -> StepReport:
        """Update on one global batch, of which this rank holds `batches` (micro-batches; positions number the global batch).

        key: the step's seed, the same on every rank. lr: that of this step. stop: this rank was asked to stop; the report says whether any
        was. observe: measure what the step does to every unit. All ranks call this, with the same number of micro-batches.
        """
        self.world.collectives.where = f"step {key.step + 1}"
        if not self.noise_is_checked:
            self.refuse_noisy_slopes(batches[0], key)
        losses = BatchLosses(self.towers, self.flats, self.tokens, self.world, self.delta_branches)
        losses.flag = stop
        planned = sum(batch.count for batch in batches)
        for k, batch in enumerate(batches):
            images, labels, positions, real = self._on_device(batch)
            noise = self._step_noise(key, positions)
            with self.first.accumulate(is_last=k == len(batches) - 1), torch.set_grad_enabled(bool(self.first.parameters)):
                base = self.first.wrapped({"vision": images, "language": self.tokens}, noise=noise, cache_layer=losses.start)
                logits_BC = self.towers.logit_scale * base["vision"][0][0] @ base["language"][0][0].T
                loss_sum = F.cross_entropy(logits_BC, labels, reduction="none")[:real].sum()
                # DDP averages over ranks; the loss is the mean over the global batch, however unequal the ranks' shares.
                self.first.backward(loss_sum * (self.world.data_size / planned))
            losses.add(images, labels, noise, base, real)

        rounds = self.zeroth.rounds()
        sequential = self.zeroth.config.update == "sequential"
        loss, moves = self._decide(losses, [] if sequential or not rounds else rounds[0], key, lr)
        report = StepReport(loss, stop=losses.stop, count=losses.count, busy_s=losses.busy_s)
        if moves is None:
            return self._skip(report, f"the loss is not finite on rank {losses.faulty}")
        statistics = self._observe_first(planned / max(losses.count, 1)) if observe else None
        self.statistics = None  # what it knows of the parameters ends here, unless the step comes to its end
        report.gradient_norm = self.first.update(lr, planned / max(losses.count, 1))
        if report.gradient_norm is None:
            return self._skip(report, "the gradient is not finite")
        self.zeroth.apply(moves)
        report.moves = moves
        if not self._more_rounds(report, losses, rounds, key, lr, sequential):
            return self._skip(report, f"the loss is not finite on rank {losses.faulty}")
        self.skips = 0
        if statistics:
            report.unit_statistics = self._observe_moved(statistics, report.moves)
        return report

    def refuse_noisy_slopes(self, batch: Any, key: Key) -> dict[str, float]:
        """Return `slope_noise` per branch; raise ValueError where it is above the limit. All ranks call this."""
        self.noise_is_checked = True
        noise = self.slope_noise(batch, key)
        if any(not value <= MAX_SLOPE_NOISE for value in noise.values()):
            found = ", ".join(f"{value:.2g} of a {branch} slope" for branch, value in noise.items())
            precision, evaluation = self.towers.config.precision, self.zeroth.config.evaluation
            better = ["zo.evaluation=delta"] * (len(self.delta_branches) < len(self.flats)) + ["model.precision=fp32"] * (
                precision != "fp32"
            )
            raise ValueError(
                f"model.precision={precision} with zo.evaluation={evaluation}: rounding is {found}; above {MAX_SLOPE_NOISE} "
                f"zeroth order follows rounding. Take {' or '.join([*better, 'a larger zo.epsilon'])}"
            )
        return noise

    def slope_noise(self, batch: Any, key: Key, directions: int = 16) -> dict[str, float]:
        """Return, per zeroth-order branch, the rounding in projected gradients, relative to these: root mean squares over directions.

        On the first samples of a batch, against the same weights in float32, or in float64 for a fine epsilon. All ranks call this.
        """
        few = replace(batch, **{name: getattr(batch, name)[:NOISE_SAMPLES] for name in ("images", "labels", "positions")})
        found = self.slopes(self.towers, few, key, directions, self.delta_branches)
        exact = self.towers.copy()
        exact.to(torch.float64 if self.is_fine else torch.float32)
        true = self.slopes(exact, few, key, directions, ())
        return {b: float((found[b] - true[b]).norm() / true[b].norm()) for b in true if float(true[b].norm()) != 0}

    @torch.no_grad()
    def slopes(self, towers: TwoTowers, batch: Any, key: Key, directions: int, delta_branches: Collection[str]) -> dict[str, Tensor]:
        """Return one-sided projected gradients `[directions]` of every zeroth-order branch of some towers. All ranks call this."""
        losses = BatchLosses(towers, self.flats, self.tokens, self.world, delta_branches)
        images, labels, positions, real = self._on_device(batch)
        noise, result = self._step_noise(key, positions), {}
        losses.add(images, labels, noise, towers({"vision": images, "language": self.tokens}, noise, losses.start), real)
        for branch in self.flats:
            epsilon = self.zeroth.config.epsilon[branch]
            probes = [losses([{}, {branch: self.zeroth.draws.draw(branch, key, q) * epsilon}]) for q in range(directions)]
            result[branch] = torch.tensor([(probe - base) / epsilon for base, probe in probes], dtype=torch.float64)
        return result

    def _step_noise(self, key: Key, positions: Tensor) -> StepNoise:
        rows = {"vision": positions, "language": torch.arange(len(self.tokens), device=self.world.device)}
        return StepNoise(key, rows, {branch: self.towers.tower(branch).depth for branch in rows})

    def _observe_first(self, scale: float) -> UnitStatistics:
        if self.statistics is None:
            with self.first.gathered_parameters():
                self.statistics = UnitStatistics(self.towers.units)
        gradients = self.first.gradients()
        for ids, places in self.first_units:
            self.statistics.observe(ids, [gradients[place] for place in places], scale)
        return self.statistics

    def _observe_moved(self, statistics: UnitStatistics, moves: Sequence[Move]) -> Tensor:
        for move in moves:
            for branch, part in move.group.slices.items():
                ids = [id for id, own in self.flats[branch].slices.items() if part.start <= own.start < part.stop]
                statistics.observe(ids, [move.gradients[branch][part]])
        self.statistics = statistics
        with self.first.gathered_parameters():
            return statistics.compute()

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take steps of this task again from their journal; for plans without first-order units, of which it knows nothing."""
        assert not self.first.parameters
        self.statistics = None
        for record in records:
            self.zeroth.replay(record["moves"], Key(record["seed"], record["step"] - 1))

    def _decide(self, losses: BatchLosses, groups: list, key: Key, lr: float, repeat: int = 0) -> tuple[float, list[Move] | None]:
        if groups:
            return self.zeroth.decide(losses, groups, key, lr, repeat)
        loss = losses([{}])[0]
        return loss, [] if math.isfinite(loss) else None

    def _more_rounds(self, report: StepReport, losses: BatchLosses, rounds: list, key: Key, lr: float, sequential: bool) -> bool:
        """Take the rounds that need a new base (next branch, or next step of the batch); return False at a loss that is not finite."""
        for repeat, groups in self.zeroth.schedule()[0 if sequential else len(rounds) :]:
            losses.rebase()
            _, moves = self._decide(losses, groups, key, lr, repeat)
            if moves is None:
                return False
            self.zeroth.apply(moves)
            report.moves = report.moves + moves
        return True

    def _skip(self, report: StepReport, why: str) -> StepReport:
        self.first.zero_grad()
        self.skips += 1
        if self.skips >= self.max_skips:
            raise FloatingPointError(f"{self.skips} steps in a row were skipped: {why}. Lower first_order.lr or zo.lr_scale.")
        report.skipped = why  # what moved before, in an earlier round, stays and is in report.moves
        return report

    def _on_device(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return images, labels within the task, positions, and how many count: a small share is filled up with blanks that do not."""
        device, real = self.world.device, len(batch.labels)
        blanks = max(0, MIN_SAMPLES - real)
        parts = (batch.images, batch.labels, batch.positions)
        size = self.towers.image_size
        fill = (torch.zeros(blanks, 3, size, size, dtype=torch.uint8), torch.zeros(blanks, dtype=torch.long), torch.zeros(blanks).long())
        pairs = [(part.to(device), filling.to(device)) for part, filling in zip(parts, fill, strict=True)]
        images, labels, positions = (torch.cat(pair) if blanks else pair[0] for pair in pairs)
        return images, labels, positions, real

    def adapters(self) -> dict[str, Tensor]:
        """Return a copy of every adapter tensor, whole, by name. All ranks call this."""
        with self.first.gathered_parameters():
            return {name: t.clone() for name, t in self.towers.units.state_dict().items()}

    def state_dict(self, optimizers: bool = True) -> dict[str, Tensor]:
        """Return all that a resume needs: adapters, and within a task AdamW's moments and the zeroth-order ones. All ranks call this."""
        adapters = {f"adapters/{name}": t for name, t in self.adapters().items()}
        if not optimizers:
            return adapters
        return {
            **adapters,
            **{f"adamw/{name}": t for name, t in self.first.state_dict(self.first_names).items()},
            **{f"zo/{name}": t for name, t in self.zeroth.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state; call `begin` first, so that there is an optimiser to restore into. All ranks call this."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        self.statistics = None
        with self.first.gathered_parameters(writes=True):
            self.towers.units.load_state_dict(under("adapters/"))
        self.first.load_state_dict(under("adamw/"), self.first_names)
        self.zeroth.load_state_dict(under("zo/"))

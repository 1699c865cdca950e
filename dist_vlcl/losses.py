"""Losses of candidates on one global batch, from features, and their exact sum over the ranks."""

# K candidates, B samples of this rank, C classes, F features, n parameters of a branch

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.model.tower import MIN_SAMPLES
from dist_vlcl.zo.difference import Candidate
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.update import ZerothOrder

# Losses are rounded to 2^-32 and added as integers. The sum is then exact: it does not depend on how samples are grouped into ranks.
LOSS_SCALE = 2.0**32
MAX_SUM = 2.0**21  # of a micro-batch: below it, float64 holds every multiple of 2^-32 exactly


# Candidates are evaluated in chunks of at most this many parameters (128 MiB in fp32), and at least MIN_CHUNK candidates.
MAX_STACKED_NUMBERS = 2**25
MIN_CHUNK = 8


def min_samples(exact_bits: bool | None, share: int) -> int:
    """Return the fewest samples that a rank computes: a smaller part of a batch is padded with blanks (`cluster.exact_bits`).

    share: its samples of a full micro-batch.

    Without exact bits it is 1, because DDP requires something to back-propagate on a rank without samples.
    """
    return MIN_SAMPLES if (share >= MIN_SAMPLES if exact_bits is None else exact_bits) else 1


def step_noise(towers: TwoTowers, classes: Tensor, positions: Tensor, key: Key) -> StepNoise:
    """Return the router noise and dropout of a step for these classes and samples. They depend on a sample's position in the batch."""
    rows = {"vision": positions, "language": classes}
    return StepNoise(key, rows, {branch: towers.tower(branch).depth for branch in rows})


def sample_losses(logits_BC: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Return the loss of each sample `[B]` (model.loss). That of sigmoid is the sum over the classes, as in SigLIP."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits_BC, labels, reduction="none")
    is_own_BC = F.one_hot(labels, logits_BC.shape[1]).to(logits_BC.dtype)
    return F.binary_cross_entropy_with_logits(logits_BC, is_own_BC, reduction="none").sum(1)


@dataclass(frozen=True)
class LossReport:
    """What the ranks know together after evaluating some candidates. It is the same on every rank."""

    losses: list[float]  # of each candidate, the mean over the global batch; NaN if it is not usable on some rank
    count: int  # samples in the global batch
    stop: bool  # some rank was asked to stop
    faulty_ranks: list[int]  # ranks with a loss that is not finite, or too large to be added exactly


@dataclass
class MicroBatch:
    """A micro-batch of this rank and its base evaluation. Only the first `num_real` samples count; the others are padding."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    num_real: int
    noise: StepNoise
    features: dict[str, Tensor]  # of each branch, [1, B, F] or [1, C, F]
    cached_inputs: dict[str, dict[int, Any]]  # of each branch, by the layers at which its candidates restart


class BatchLosses:
    """Losses of candidates on one global batch. It skips every computation that a candidate's perturbation cannot change.

    delta_branches: branches whose candidates compute the change of the features instead of the features (`model.perturbed`). Their losses
    are computed in float64. The result is the same number with less rounding. With zo.granularity=unit candidates begin at any zeroth-order
    block, so each of these blocks keeps its input. Otherwise all candidates of a branch restart at its first zeroth-order block.
    """

    def __init__(self, towers: TwoTowers, zeroth: ZerothOrder, tokens: Tensor, world: World, delta_branches: Collection[str], stop: bool):
        self.towers, self.tokens, self.world = towers, tokens, world
        self.flats: Mapping[str, Any] = zeroth.flats  # FlatUnits
        self.delta_branches, self.stop = delta_branches, stop
        layers = {branch: [unit.layer for unit in flat.slices] for branch, flat in self.flats.items()}  # from the lowest up
        self.starts = layers if zeroth.config.granularity == "unit" else {branch: found[:1] for branch, found in layers.items()}
        self.micro_batches: list[MicroBatch] = []

    def add(self, model: Any, batch: Any, key: Key, shares_text: bool, least: int = MIN_SAMPLES) -> tuple[MicroBatch, dict[str, Tensor]]:
        """Evaluate the base of a micro-batch, padded to at least `least` samples. Return it and its features, with their gradients.

        model: the towers, as they are or wrapped for training. batch: a micro-batch on the device (data.loader.Batch). With `shares_text`
        each rank computes the text of a part of the classes, and all ranks call this.
        """
        padded, num_real = [batch.images, batch.labels, batch.positions], len(batch.labels)
        if num_real < least:
            padded = [torch.cat([part, part.new_zeros(least - num_real, *part.shape[1:])]) for part in padded]
        images, labels, positions = padded
        classes = torch.arange(len(self.tokens), device=self.tokens.device)
        parts = classes.tensor_split(min(self.world.size, len(classes)) if shares_text else 1)
        own = parts[self.world.rank % len(parts)]
        noise = step_noise(self.towers, own, positions, key)
        base = model({"vision": images, "language": self.tokens[own]}, noise=noise, cache_layers=self.starts)
        features, cached_inputs = ({branch: out[place] for branch, out in base.items()} for place in (0, 1))
        if shares_text:
            # Ranks beyond the number of classes repeat a part, because all ranks must call a sharded model. They send nothing. Each rank
            # back-propagates the sum of all ranks' gradients for its classes. DDP's average over ranks is then what it is without sharing.
            counts = [len(part) for part in parts] + [0] * (self.world.size - len(parts))
            features["language"] = self.world.gather_rows(features["language"][0, : counts[self.world.rank]], counts)[None]
        kept = {branch: of_branch.detach() for branch, of_branch in features.items()}
        self.micro_batches.append(MicroBatch(images, labels, num_real, noise, kept, cached_inputs))
        return self.micro_batches[-1], features

    @torch.no_grad()
    def __call__(self, candidates: Iterable[Candidate]) -> LossReport:
        """Return the mean loss of each candidate over the global batch. All ranks call this with the same candidates.

        Candidates are evaluated a chunk at a time. One all-reduce of int64 `[K + 3]`: the sums, then the number of ranks with unusable
        losses, of samples, and of ranks asked to stop.
        """
        size = max(MIN_CHUNK, MAX_STACKED_NUMBERS // max((flat.values_n.numel() for flat in self.flats.values()), default=1))
        evaluated: dict[int, tuple[Tensor, Tensor]] = {}  # of each candidate of this rank: its sum, and whether it is unusable
        chunk: dict[int, Candidate] = {}
        for k, (candidate, is_own) in enumerate(self._with_owner(candidates)):
            if is_own:
                chunk[k] = candidate
            if len(chunk) == size:
                evaluated |= self._evaluate(chunk)
                chunk = {}
        evaluated |= self._evaluate(chunk)
        zero = torch.zeros((), dtype=torch.int64, device=self.world.device)
        sums, faulty = zip(*(evaluated.get(number, (zero, zero.bool())) for number in range(k + 1)), strict=True)
        return self._report(torch.stack(sums), torch.stack(faulty))

    def _with_owner(self, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, bool]]:
        """Yield each candidate, and whether this rank evaluates it: each group has every G-th of a kind (the same branches)."""
        next_group: dict[tuple[str, ...], int] = {}  # which group evaluates the next candidate of a kind
        for k, candidate in enumerate(candidates):
            group = next_group.get(tuple(candidate), k)  # the first of a kind goes to the group after the one before it
            next_group[tuple(candidate)] = group + 1
            yield candidate, group % self.world.direction_groups == self.world.rank // self.world.data_size

    def _evaluate(self, chunk: Mapping[int, Candidate]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return of each candidate of a chunk the sum of its losses on this rank, in units of 2^-32, and whether it is unusable."""
        offsets: dict[tuple[str, int, int], list[Tensor]] = {}  # by branch, and where the offset begins and ends in its values
        rows: dict[int, dict[str, tuple[tuple[str, int, int], int]]] = {}  # of each candidate, per branch: key and place in `offsets`
        for k, candidate in chunk.items():
            rows[k] = {}
            for branch, offset in candidate.items():
                own: Any = getattr(offset, "part", None)
                if own not in self.flats[branch].slices.values():  # not one unit's: evaluate all
                    own = slice(0, len(offset))
                together = offsets.setdefault(key := (branch, own.start, own.stop), [])
                rows[k][branch] = key, len(together)
                together.append(offset[own])
        result: dict[int, tuple[Tensor, Tensor]] = {}
        for part in self.micro_batches:
            base = {b: f[0].double() if self.delta_branches else f[0] for b, f in part.features.items()}
            moved = {key: self._features(*key, stack, part) for key, stack in offsets.items()}
            for k, places in rows.items():
                features = base | {branch: moved[key][row] for branch, (key, row) in places.items()}
                total = self._loss_sum(features["vision"], features["language"], part)
                is_usable = total < MAX_SUM  # False for NaN and infinity
                found = (torch.where(is_usable, total, 0.0) * LOSS_SCALE).long(), ~is_usable
                result[k] = (result[k][0] + found[0], result[k][1] | found[1]) if k in result else found
        return result

    def _features(self, branch: str, begin: int, end: int, offsets: list[Tensor], part: MicroBatch) -> Tensor:
        """Return the features `[K, B, F]` of offsets of the values from `begin` to `end`. All other values are as they are."""
        flat, tower, own = self.flats[branch], self.towers.tower(branch), slice(begin, end)
        inputs = part.images if branch == "vision" else self.tokens
        dtype = torch.promote_types(flat.values_n.dtype, part.features[branch].dtype)
        is_delta, offsets_Kn = branch in self.delta_branches, torch.stack(offsets).to(dtype)
        values: Any = Perturbed(flat.values_n[None, own], offsets_Kn) if is_delta else offsets_Kn.add_(flat.values_n[own])
        start = max(layer for layer in self.starts[branch] if layer <= flat.units_in(own)[0].layer)
        hidden = part.cached_inputs[branch][start]
        moved: Any = tower.run(hidden, inputs, start=start, stacked_params=flat.views(values, own), noise=part.noise)[0]
        if is_delta:
            return part.features[branch].double() + moved.change
        return moved.double() if self.delta_branches else moved

    def _loss_sum(self, image_BF: Tensor, text_CF: Tensor, part: MicroBatch) -> Tensor:
        """Return the sum of the samples' losses, each rounded to 2^-32, float64 ()."""
        logits_BC = self.towers.logits(image_BF, text_CF).double()
        losses_B = sample_losses(logits_BC, part.labels, self.towers.config.loss)[: part.num_real]
        return (torch.round(losses_B * LOSS_SCALE) / LOSS_SCALE).sum()

    def _report(self, sums_K: Tensor, is_faulty_K: Tensor) -> LossReport:
        own = [sum(part.num_real for part in self.micro_batches), int(self.stop)]
        vector = torch.cat([sums_K, is_faulty_K.any()[None].long(), torch.tensor(own, dtype=torch.int64, device=sums_K.device)])
        *sums, faults, seen, stops = self.world.sum_exact(vector, "losses").tolist()
        count = seen // self.world.direction_groups  # each group has the whole batch
        losses, faulty_ranks = [total / (LOSS_SCALE * max(count, 1)) for total in sums], []
        if faults:
            by_rank = self.world.gather_objects(is_faulty_K.tolist(), "the ranks whose loss is not finite")
            losses = [math.nan if any(faulty) else loss for loss, *faulty in zip(losses, *by_rank, strict=True)]
            faulty_ranks = [rank for rank, faulty in enumerate(by_rank) if any(faulty)]
        return LossReport(losses, count, stops > 0, faulty_ranks)

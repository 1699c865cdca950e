"""Counter-based noise: every number is a pure function of (seed, step, name, stream, row, element index).

There is no state. The noise of a parameter does not depend on the order of draws, on other parameters, on the rank or on the number of
ranks. The generator is Philox4x32-10 (Salmon et al. 2011), with the constants that Random123, cuRAND and Triton use.

    `counter = (element block, blake2s32(name), step, stream + 256 * row)`,   `key = 64-bit seed`.

One counter gives 4 normals (two Box-Muller pairs), 128 signs, or 8 uniform integers of 16 bits. The integers are the same on every device.
Normals may differ in the last bits of log, sin and cos, so the ranks compare a first direction at the start (`dist.agree`).
"""

# n elements, M counters, R rows

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS, _WEYL, _MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def _chunk(device: torch.device) -> int:
    """Return how many counters are drawn at a time: few on a CPU, so that temporaries stay in the cache; many per launch on a GPU."""
    return 1 << 15 if device.type == "cpu" else 1 << 22


NORMALS_PER_COUNTER, SIGNS_PER_COUNTER, UNIFORMS_PER_COUNTER = 4, 128, 8


@dataclass(frozen=True)
class Key:
    """The seed (64 bits) and the step (32 bits) of a draw.

    The seed of a training step already depends on the step. Both remain, because both are in the counter of every journal so far: without
    `step` all random numbers would change. Evaluation uses one seed and numbers its batches by `step`.
    """

    seed: int
    step: int


# Numbers of the independent streams of a name. Below 254 they are free for directions.
ROUTER_STREAM, DROPOUT_STREAM = 254, 255


def direction_stream(probe: int) -> int:
    """Return the stream of direction number `probe`. 254 directions share a row, because router and dropout have the last two streams."""
    row, column = divmod(probe, ROUTER_STREAM)
    return column + 256 * row


def name_id(name: str) -> int:
    """Return a 32-bit hash of a name. It depends on nothing else."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part (a run's seed, a purpose, a step)."""
    return int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def philox4x32(counter: tuple[Tensor | int, ...], seed: int) -> Tensor:
    """Return the four 32-bit words of each counter, int32 `[..., 4]`. A counter is four int64 tensors or numbers that broadcast."""
    device = next(c.device for c in counter if isinstance(c, Tensor))
    c0, c1, c2, c3 = torch.broadcast_tensors(*[c if isinstance(c, Tensor) else torch.full((), c, device=device) for c in counter])
    if device.type == "cuda" and (kernel := _kernel()):
        return kernel((c0, c1, c2, c3), seed)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps around, but the 64 bits of the product are correct
        # only the low half of c counts, so mask it
        c0, c2 = ((p >> 32).bitwise_xor_(c).bitwise_xor_(k).bitwise_and_(_MASK) for p, c, k in ((p1, c1, k0), (p0, c3, k1)))
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1).int()  # keeps the low half


@functools.cache
def _kernel() -> Callable[[tuple[Tensor, ...], int], Tensor] | None:
    """Return the kernel for GPUs, or None if Triton cannot build it (it needs a C compiler) or it fails Random123's first known answer."""
    try:
        from dist_vlcl.zo.kernel import philox

        words = philox((torch.zeros(1, dtype=torch.int64, device="cuda"),) * 4, 0)[0].tolist()
        if [word & _MASK for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]:
            return philox
        why = "it gives wrong numbers"
    except Exception as error:  # any error of Triton or of the compiler
        why = repr(error)
    warnings.warn(f"drawing noise with torch's operations, which is slower, because the Triton kernel cannot be used ({why})", stacklevel=2)
    return None


def _to_normals(words: Tensor) -> Tensor:
    """Box-Muller: words `[..., 4]` to fp32 normals `[..., 4]`."""
    w0, w1, w2, w3 = ((word.long() & _MASK).float() for word in words.unbind(-1))
    inverse = 2.0**-32
    radius = [torch.sqrt(-2.0 * torch.log((w + 1.0) * inverse)) for w in (w0, w2)]
    angle = [w * (2 * math.pi * inverse) for w in (w1, w3)]
    return torch.stack([r * f(a) for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)], -1)


def _to_signs(words: Tensor) -> Tensor:
    """Words `[M, 4]` to signs +-1 `[M, 128]` in fp32, the lowest bit first. A table of all bytes gives 8 at a time."""
    bytes_n = words.view(torch.uint8).flatten()
    return _sign_table(bytes_n.device).index_select(0, bytes_n.int()).view(-1, SIGNS_PER_COUNTER)


@functools.cache
def _sign_table(device: torch.device) -> Tensor:
    bits = (torch.arange(1 << 8, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return (bits * 2 - 1).float()


def _at_least(words: Tensor, least: int) -> Tensor:
    """Words `[R, M, 4]` to whether each 16-bit half, as an unsigned integer, is at least `least`: bool `[R, 8 M]`, low half first."""
    halves = words.view(torch.int16).flatten(1)
    return (halves ^ -(1 << 15)) >= least - (1 << 15)  # with the sign bit flipped, signed integers are ordered like unsigned ones


class NoiseField:
    """Flat noise over (name, number of elements) of parameters. Tables of counters are built once; a draw is a few large operations."""

    def __init__(self, parameters: Sequence[tuple[str, int]], device: torch.device | str = "cpu"):
        self.parameters = list(parameters)
        self.device = torch.device(device)
        if len({name_id(name) for name, _ in self.parameters}) != len(self.parameters):
            raise ValueError("two parameter names have the same 32-bit hash, so their noise would be equal; rename one of them")
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def normals(self, key: Key, stream: int) -> Tensor:
        """Return N(0, 1) noise `[n]`, fp32."""
        return self._draw(key, stream, NORMALS_PER_COUNTER, _to_normals)

    def signs(self, key: Key, stream: int) -> Tensor:
        """Return Rademacher noise +-1 `[n]`, fp32. It is the same on every device."""
        return self._draw(key, stream, SIGNS_PER_COUNTER, _to_signs)

    def _draw(self, key: Key, stream: int, width: int, convert) -> Tensor:
        block_M, id_M, keep = self._table(width)
        chunks = zip(*(counters_M.split(_chunk(self.device)) for counters_M in (block_M, id_M)), strict=True)
        parts = [convert(philox4x32((block, ids, key.step, stream), key.seed)).flatten() for block, ids in chunks]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat if keep is None else flat[keep]

    def _table(self, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if width not in self._tables:
            blocks, ids, keep, drawn = [], [], [], 0
            for name, numel in self.parameters:
                counters = -(-numel // width)
                blocks.append(torch.arange(counters))
                ids.append(torch.full((counters,), name_id(name)))
                keep.append(torch.arange(numel) + drawn)
                drawn += counters * width
            index = torch.cat(keep).to(self.device)
            self._tables[width] = torch.cat(blocks).to(self.device), torch.cat(ids).to(self.device), index if len(index) < drawn else None
        return self._tables[width]


def normals_by_row(names: Sequence[str], rows_R: Tensor, numel: int, key: Key, stream: int) -> Tensor:
    """Return N(0, 1) noise `[names, R, numel]`. Row r depends on `rows_R[r]` (below 2^24), not on its place among the rows."""
    words = _row_words(names, rows_R, -(-numel // NORMALS_PER_COUNTER), key, stream)
    return _to_normals(words).flatten(1)[:, :numel].unflatten(0, (len(names), len(rows_R)))


def dropout_mask_by_row(name: str, rows_R: Tensor, numel: int, drop: float, key: Key, stream: int) -> Tensor:
    """Return a dropout mask `[R, numel]`, True where kept. P(drop) is `drop` rounded to 2^-16. A smaller numel gives a prefix."""
    counters, least = -(-numel // UNIFORMS_PER_COUNTER), min(round(drop * 65536), 65535)
    chunks = rows_R.split(max(1, _chunk(rows_R.device) // max(counters, 1)))
    parts = [_at_least(_row_words([name], rows, counters, key, stream), least)[:, :numel] for rows in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _row_words(names: Sequence[str], rows_R: Tensor, counters: int, key: Key, stream: int) -> Tensor:
    """Return the words of every row of every name, `[names * R, counters, 4]`."""
    block = torch.arange(counters, device=rows_R.device)[None]
    ids = _ids(tuple(names), rows_R.device).repeat_interleave(len(rows_R))
    return philox4x32((block, ids[:, None], key.step, (stream + 256 * rows_R.long()).repeat(len(names))[:, None]), key.seed)


@functools.lru_cache(1024)
def _ids(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([name_id(name) for name in names], device=device)


class StepNoise:
    """The router noise and dropout of a step. Every forward pass of the step sees the same (concepts.md 2.2).

    `rows` has the number of each sample, per branch: its position in the global batch, or its class within the task. If `depths` has the
    number of a branch's layers, the noise of all its routers is drawn at once. Draws are kept for the other evaluations of the step.
    """

    def __init__(self, key: Key, rows: dict[str, Tensor], depths: Mapping[str, int] | None = None):
        self.key, self.rows, self.depths = key, rows, depths or {}
        self._drawn: dict[tuple | str, Tensor] = {}

    def router(self, branch: str, layer: int, experts: int) -> Tensor:
        """Return N(0, 1) noise `[B, E]` for the logits of a router."""
        if ("router", branch, layer, experts) not in self._drawn:
            layers = range(1, self.depths[branch] + 1) if branch in self.depths else [layer]
            names = [f"router/{branch}/{number}" for number in layers]
            drawn = normals_by_row(names, self.rows[branch], experts, self.key, ROUTER_STREAM)
            self._drawn |= {("router", branch, number, experts): noise for number, noise in zip(layers, drawn, strict=True)}
        return self._drawn["router", branch, layer, experts]

    def dropout_mask(self, branch: str, layer: int, tokens: int, width: int, drop: float) -> Tensor:
        """Return a dropout mask `[B, L, width]`. The mask of a truncated prompt is a prefix of the full prompt's."""
        name, rows = f"dropout/{branch}/{layer}", self.rows[branch]
        if name not in self._drawn:
            self._drawn[name] = dropout_mask_by_row(name, rows, tokens * width, drop, self.key, DROPOUT_STREAM)
        return self._drawn[name].view(len(rows), tokens, width)  # fails if a step asks for two lengths

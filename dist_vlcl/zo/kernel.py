"""Philox in one kernel launch, for GPUs. `noise.philox4x32` gives the same words with more than a hundred of torch's operations."""

# M counters

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS_PER_PROGRAM = 512


@triton.jit(do_not_specialize=["seed", "total", "columns"])
def _philox(out, c0, c1, c2, c3, r0, r1, r2, r3, s0, s1, s2, s3, seed, total, columns, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, column = place // columns, place % columns
    here = place < total
    w0, w1, w2, w3 = tl.philox(
        seed,
        tl.load(c0 + row * r0 + column * s0, here, 0).to(tl.int32),
        tl.load(c1 + row * r1 + column * s1, here, 0).to(tl.int32),
        tl.load(c2 + row * r2 + column * s2, here, 0).to(tl.int32),
        tl.load(c3 + row * r3 + column * s3, here, 0).to(tl.int32),
    )
    tl.store(out + place * 4, w0.to(tl.int32, bitcast=True), here)
    tl.store(out + place * 4 + 1, w1.to(tl.int32, bitcast=True), here)
    tl.store(out + place * 4 + 2, w2.to(tl.int32, bitcast=True), here)
    tl.store(out + place * 4 + 3, w3.to(tl.int32, bitcast=True), here)


def philox(counter: tuple[Tensor, ...], seed: int) -> Tensor:
    """Return the words of each counter, int32 `[..., 4]`, for four int64 tensors of one shape `[M]` or `[R, M]`. Strides may be 0."""
    shape = counter[0].shape
    out = torch.empty(*shape, 4, dtype=torch.int32, device=counter[0].device)
    strides = [(0, *c.stride())[-2:] for c in counter]
    total = shape.numel()
    if total:
        signed = (seed & (2**64 - 1)) - (seed >> 63 & 1) * 2**64
        grid = (triton.cdiv(total, COUNTERS_PER_PROGRAM),)
        sizes = (*[s[0] for s in strides], *[s[1] for s in strides], signed, total, shape[-1])
        with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
            _philox[grid](out, *counter, *sizes, COUNTERS_PER_PROGRAM)
    return out

"""Crop and resize to the model's size, the same pixels from PIL (in a worker) as from batched tensor operations (on the device).

The pixels are those of PIL's bicubic resize, columns first: a weighted sum in whole numbers, rounded to 8 bits after each side. Whole
numbers have one sum in any order, so no device, batch or library changes a bit. The model normalises.
"""

# B images, C colours, H W sides as stored, S side for the model, E extent of a stored side, K kinds of weights

import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BITS = 22  # of a weight's fraction, as in PIL
AT_A_TIME = 64  # images of a batch that are in float64 at a time


class Axis(NamedTuple):
    """What becomes of a side: `length` pixels from `start` on are resized to `resized`, of which S from `offset` on are kept."""

    start: int
    length: int
    resized: int
    offset: int = 0


class Plan(NamedTuple):
    rows: Axis
    columns: Axis


class Transform(Protocol):
    @property
    def size(self) -> int: ...

    def plan(self, height: int, width: int, draw: random.Random) -> Plan:
        """What to do with an image of this size; all randomness comes from `draw`."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """torchvision's RandomResizedCrop, bicubic, no flip, with our own generator so that a crop does not depend on workers."""

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def plan(self, height: int, width: int, draw: random.Random) -> Plan:
        top, left, crop_height, crop_width = crop_box(height, width, self.scale, self.ratio, draw)
        return Plan(Axis(top, crop_height, self.size), Axis(left, crop_width, self.size))


@dataclass(frozen=True)
class TestTransform:
    """torchvision's Resize of the shorter side to `size`, bicubic, and CenterCrop."""

    __test__ = False  # not a pytest class

    size: int

    def plan(self, height: int, width: int, draw: random.Random) -> Plan:
        shorter = min(height, width)

        def axis(side: int) -> Axis:
            resized = int(self.size * side / shorter)
            return Axis(0, side, resized, round((resized - self.size) / 2))

        return Plan(axis(height), axis(width))


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draw: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width), distributed as in torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return draw.randint(0, height - crop_height), draw.randint(0, width - crop_width), crop_height, crop_width
    return _central_box(height, width, ratio)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_height, crop_width = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_image(pixels_HWC: np.ndarray, plan: Plan, size: int) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, S, S], by PIL."""
    (top, height, tall, down), (left, width, wide, across) = plan
    image = Image.fromarray(pixels_HWC[top : top + height, left : left + width])
    # One side at a time: which of two PIL takes first differs between its versions, and with it the rounding.
    image = image.resize((wide, height), Image.Resampling.BICUBIC).resize((wide, tall), Image.Resampling.BICUBIC)
    kept = np.asarray(image)[down : down + size, across : across + size]
    return torch.from_numpy(kept.transpose(2, 0, 1).copy())


def resize_batch(images_BHWC: Tensor, plans: Sequence[Plan], size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, 3, S, S] on the images' device: `resize_image` of each, bit for bit."""
    parts = [_resize(images, plans[k * AT_A_TIME :][:AT_A_TIME], size) for k, images in enumerate(images_BHWC.split(AT_A_TIME))]
    return torch.cat(parts)


def _resize(images_BHWC: Tensor, plans: Sequence[Plan], size: int) -> Tensor:
    B, H, W, C = images_BHWC.shape
    columns_BSW = _weights_of([plan.columns for plan in plans], size, W, images_BHWC.device)
    rows_BSH = _weights_of([plan.rows for plan in plans], size, H, images_BHWC.device)
    pixels = images_BHWC.permute(0, 3, 1, 2).to(torch.float64).reshape(B, C * H, W)
    pixels = _to_8_bits(pixels @ columns_BSW.mT).view(B, C, H, size)
    return _to_8_bits(rows_BSH[:, None] @ pixels).to(torch.uint8)


def _to_8_bits(sums: Tensor) -> Tensor:
    """Sums in units of 2^-22, exact in float64, to the nearest of 0 to 255."""
    return sums.add_(2 ** (BITS - 1)).mul_(2.0**-BITS).floor_().clamp_(0, 255)


def _weights_of(axes: Sequence[Axis], size: int, extent: int, device: torch.device) -> Tensor:
    """The weights of each image's pixels for each of the S that are kept, [B, S, E]."""
    kinds = sorted({axis[1:] for axis in axes})
    table_KSE = torch.stack([_weights_on(*kind, size, extent, device) for kind in kinds])
    which_B = torch.tensor([kinds.index(axis[1:]) for axis in axes]).to(device, non_blocking=True)
    start_B = torch.tensor([axis.start for axis in axes]).to(device, non_blocking=True)
    pixel_BE = (torch.arange(extent, device=device) - start_B[:, None]) % extent  # beyond a crop's length there are zeros
    return table_KSE[which_B[:, None, None], torch.arange(size, device=device)[:, None], pixel_BE[:, None]].to(torch.float64)


@lru_cache(maxsize=256)
def _weights_on(length: int, resized: int, offset: int, size: int, extent: int, device: torch.device) -> Tensor:
    """Weights [S, E] of a side that begins at pixel 0; float32 holds them exactly."""
    weights = np.zeros((size, extent), dtype=np.float32)
    weights[:, :length] = bicubic_weights(length, resized)[offset : offset + size]
    return torch.from_numpy(weights).to(device)


def bicubic_weights(length: int, resized: int) -> np.ndarray:
    """Weights of PIL's bicubic resize of one side, `[resized, length]`, whole numbers of 2^-22 (Pillow's Resample.c).

    Support widens when a side shrinks, so that pixels are averaged and not left out.
    """
    weights = np.zeros((resized, length))
    scale = length / resized
    support, step = 2.0 * max(scale, 1.0), 1.0 / max(scale, 1.0)
    for place in range(resized):
        center = (place + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        taps = [_bicubic((pixel - center + 0.5) * step) for pixel in range(low, high)]
        total = reduce(operator.add, taps)  # one after the other, as in C; Python 3.12's sum is more exact
        weights[place, low:high] = [math.trunc(math.copysign(0.5, tap) + tap / total * (1 << BITS)) for tap in taps]
    return weights


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0

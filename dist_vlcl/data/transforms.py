"""PIL image -> uint8 tensor; the model normalises, so a batch travels at a quarter of its size."""

# S side of the output in pixels, H W of the input

import math
import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F


class Transform(Protocol):
    @property
    def size(self) -> int: ...

    def __call__(self, image: Image.Image, draw: random.Random) -> Tensor:
        """RGB image -> uint8 [3, S, S]; all randomness comes from `draw`."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """torchvision's RandomResizedCrop, bicubic, no flip, with our own generator so that a crop does not depend on workers."""

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image.Image, draw: random.Random) -> Tensor:
        top, left, height, width = crop_box(image.height, image.width, self.scale, self.ratio, draw)
        cropped = F.resized_crop(image, top, left, height, width, [self.size, self.size], InterpolationMode.BICUBIC)
        return to_tensor(cropped)


@dataclass(frozen=True)
class TestTransform:
    """The shorter side to `size`, bicubic, then the centre."""

    __test__ = False  # not a pytest class

    size: int

    def __call__(self, image: Image.Image, draw: random.Random) -> Tensor:
        return to_tensor(F.center_crop(F.resize(image, [self.size], InterpolationMode.BICUBIC), [self.size]))


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


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

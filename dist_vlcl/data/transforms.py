"""Crop and resize an image to the model's size with Pillow's filters. The model normalises the pixels."""

# H W sides of the stored image, S side of the model's image, all in pixels

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RATIO = (3 / 4, 4 / 3)  # of width to height of a training crop, torchvision's default
MAX_ASPECT = 16  # of the long to the short side of a test image; the centre crop needs 1, and squash loses what is beyond


@dataclass(frozen=True)
class TrainTransform:
    """torchvision's RandomResizedCrop without a flip: uint8 [H, W, 3] -> uint8 [3, S, S].

    All randomness comes from `draw`, so that a crop does not depend on the process that computes it.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)

    def __call__(self, pixels_HWC: np.ndarray, draw: random.Random) -> Tensor:
        height, width = pixels_HWC.shape[:2]
        top, left, tall, wide = crop_box(height, width, self.scale, draw)
        return _to_tensor(resize(pixels_HWC[top : top + tall, left : left + wide], self.size, self.size))


@dataclass(frozen=True)
class EvalTransform:
    """open_clip's transform of a test image: uint8 [H, W, 3] -> uint8 [3, S, S]. `draw` is not used.

    mode: `shortest` resizes the shorter side to `size`, then crops the centre; `squash` resizes both sides. filter: bicubic or bilinear.
    """

    size: int
    mode: str = "shortest"
    filter: str = "bicubic"

    def __call__(self, pixels_HWC: np.ndarray, draw: random.Random) -> Tensor:
        pixels_HWC = _middle(pixels_HWC)
        if self.mode == "squash":
            return _to_tensor(resize(pixels_HWC, self.size, self.size, self.filter))
        tall, wide = (int(self.size * side / min(pixels_HWC.shape[:2])) for side in pixels_HWC.shape[:2])
        top, left = round((tall - self.size) / 2), round((wide - self.size) / 2)
        return _to_tensor(resize(pixels_HWC, tall, wide, self.filter)[top : top + self.size, left : left + self.size])


def crop_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> tuple[int, int, int, int]:
    """Return a random box (top, left, height, width), in pixels, with the distribution of RandomResizedCrop.get_params of torchvision."""
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return draw.randint(0, height - crop_height), draw.randint(0, width - crop_width), crop_height, crop_width
    aspect = min(max(width / height, RATIO[0]), RATIO[1])
    crop_height, crop_width = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _middle(pixels_HWC: np.ndarray) -> np.ndarray:
    """Cut the longer side to MAX_ASPECT times the shorter one: a long, thin image has few bytes and would grow to any size."""
    limit = MAX_ASPECT * min(pixels_HWC.shape[:2])
    top, left = (max(0, side - limit) // 2 for side in pixels_HWC.shape[:2])
    return pixels_HWC[top : pixels_HWC.shape[0] - top, left : pixels_HWC.shape[1] - left]


def resize(pixels_HWC: np.ndarray, height: int, width: int, filter: str = "bicubic") -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    image, chosen = Image.fromarray(pixels_HWC), Image.Resampling[filter.upper()]
    # One side at a time, columns first: which side Pillow takes first depends on its version, and the rounding depends on that.
    image = image.resize((width, image.height), chosen).resize((width, height), chosen)
    return np.asarray(image)


def _to_tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy())

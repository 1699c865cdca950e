import random
import statistics

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms as T

from dist_vlcl.data.shards import decode
from dist_vlcl.data.tasks import generator
from dist_vlcl.data.transforms import EvalTransform, TrainTransform, crop_box, resize
from tests.helpers.memory import peak_mib
from tests.helpers.shards import png

BICUBIC = T.InterpolationMode.BICUBIC


def image(width=50, height=40):
    return Image.fromarray(decode(png(64, "picture"), "")).resize((width, height))


def transformed(transform, picture, draw=None):
    return transform(np.asarray(picture), draw)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [24, 40, 60])
def test_test_images_are_open_clip_s(size, mode, filter):
    theirs = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=filter)
    for picture in (image(), image(41, 80), image(64, 64)):
        difference = transformed(EvalTransform(size, mode, filter), picture) - (theirs(picture) * 255).round()
        assert difference.abs().max() <= (mode == "squash")  # Pillow may resize the other side first, and rounds in between


@pytest.mark.parametrize(("height", "width"), [(2, 201), (201, 2), (3, 50)])
def test_long_test_images_give_the_pixels_that_they_give_whole(height, width):
    """Their ends, which the crop leaves out, are cut before resizing. Whole numbers: the two grids are the same."""
    picture = image(width, height)
    scale = 24 // min(height, width)
    whole = np.asarray(picture.resize((scale * width, height), Image.Resampling.BICUBIC).resize((scale * width, scale * height), 3))
    top, left = round((scale * height - 24) / 2), round((scale * width - 24) / 2)
    assert np.array_equal(transformed(EvalTransform(24), picture).permute(1, 2, 0), whole[top : top + 24, left : left + 24])


@pytest.mark.parametrize("shape", [(1, 20_000, 3), (20_000, 1, 3), (1, 1, 3), (1, 1 << 26, 3)])
@pytest.mark.parametrize("transform", [EvalTransform(224), EvalTransform(224, "squash"), TrainTransform(224)])
def test_a_thin_image_takes_no_more_memory_than_another(shape, transform):
    pixels = np.zeros(shape, np.uint8)
    assert peak_mib(lambda: transform(pixels, generator(0))) < 30


def test_a_train_image_is_torchvisions_crop_of_our_box():
    box = crop_box(40, 50, (0.5, 1.0), generator(7))
    expected = T.functional.pil_to_tensor(T.functional.resized_crop(image(), *box, [24, 24], BICUBIC))
    actual = transformed(TrainTransform(24, scale=(0.5, 1.0)), image(), generator(7))
    assert torch.equal(actual, expected)
    assert actual.dtype == torch.uint8 and actual.shape == (3, 24, 24) and actual.is_contiguous()


def test_columns_are_resized_before_rows():
    """Pillow's order depends on its version and on the sides, and the rounding between the two depends on the order."""
    picture = image(210, 250)
    columns = picture.resize((224, 250), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(np.asarray(picture), 120, 224), np.asarray(columns.resize((224, 120), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.9, 1.0)), (40, 50, (0.2, 1.0)), (20, 90, (0.9, 1.0))])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    draw, blank = random.Random(0), Image.new("RGB", (width, height))
    ours = [crop_box(height, width, scale, draw) for _ in range(3000)]
    theirs = [T.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        spread = max(statistics.pstdev(other), 0.1)
        assert abs(statistics.mean(mine) - statistics.mean(other)) < 0.1 * spread + 1e-9
        assert (min(mine), max(mine)) == pytest.approx((min(other), max(other)), abs=2)


def test_boxes_lie_inside_the_image():
    for seed in range(200):
        top, left, height, width = crop_box(7, 31, (0.9, 1.0), generator(seed))
        assert top >= 0 and left >= 0 and top + height <= 7 and left + width <= 31 and height > 0 and width > 0

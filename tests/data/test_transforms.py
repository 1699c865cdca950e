import random
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from dist_vlcl.data.shards import decode
from dist_vlcl.data.tasks import generator
from dist_vlcl.data.transforms import Axis, Plan, TestTransform, TrainTransform, bicubic_weights, crop_box, resize_batch, resize_image
from tests.helpers.shards import png

BICUBIC = T.InterpolationMode.BICUBIC


def image(width=50, height=40):
    return Image.fromarray(decode(png(64, "picture"), "")).resize((width, height))


def transformed(transform, picture, draw):
    return resize_image(np.asarray(picture), transform.plan(picture.height, picture.width, draw), transform.size)


@pytest.mark.parametrize("size", [24, 40, 60])
def test_test_images_are_torchvisions(size):
    for picture in (image(), image(41, 80), image(64, 64)):
        expected = T.Compose([T.Resize(size, BICUBIC), T.CenterCrop(size), T.PILToTensor()])(picture)
        assert torch.equal(transformed(TestTransform(size), picture, generator()), expected)


def test_a_train_image_is_torchvisions_crop_of_our_box():
    box = crop_box(40, 50, (0.5, 1.0), (3 / 4, 4 / 3), generator(7))
    expected = T.functional.pil_to_tensor(T.functional.resized_crop(image(), *box, [24, 24], BICUBIC))
    actual = transformed(TrainTransform(24, scale=(0.5, 1.0)), image(), generator(7))
    assert torch.equal(actual, expected)
    assert actual.dtype == torch.uint8 and actual.shape == (3, 24, 24) and actual.is_contiguous()


@pytest.mark.parametrize("pixels", ["noise", "extremes"])  # extremes: black and white, where weights below 0 leave 0..255 and are cut off
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (32, 32, 224), (64, 64, 96), (100, 61, 32), (1, 9, 5), (37, 37, 36)])
def test_the_batched_resize_has_the_bits_of_pil(height, width, size, pixels):
    rng = np.random.default_rng(height)
    images = rng.integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    images = images if pixels == "noise" else (images > 127).astype(np.uint8) * 255
    for transform in (TrainTransform(size, scale=(0.3, 1.0)), TestTransform(size)):
        plans = [transform.plan(height, width, generator(number)) for number in range(5)]
        expected = torch.stack([resize_image(pixels, plan, size) for pixels, plan in zip(images, plans, strict=True)])
        assert torch.equal(resize_batch(torch.from_numpy(images), plans, size), expected)


def test_a_batch_does_not_change_its_images():
    """Not even where it is cut into pieces: what a rank loads does not depend on who else is in the batch."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8))
    plans = [TrainTransform(6).plan(8, 8, generator(number)) for number in range(150)]
    alone = torch.cat([resize_batch(images[k : k + 1], plans[k : k + 1], 6) for k in range(150)])
    assert torch.equal(resize_batch(images, plans, 6), alone)


@pytest.mark.parametrize("length", range(1, 70, 4))
def test_weights_are_whole_numbers_that_float32_holds_and_sum_to_one(length):
    for resized in (1, 7, 32, 50):
        weights = bicubic_weights(length, resized)
        assert np.array_equal(weights, np.trunc(weights)) and np.array_equal(weights, weights.astype(np.float32))
        assert np.abs(weights.sum(1) - 2**22).max() <= (weights != 0).sum(1).max()  # each rounded once
        assert np.abs(weights).sum(1).max() * 255 < 2**53  # sums in float64 are exact


def test_sides_are_resized_one_after_the_other_columns_first():
    """PIL takes the rows first where the height falls much more than the width, or did not, by its version: rounding would differ."""
    pixels = np.asarray(image(210, 250))
    plan = Plan(Axis(0, 250, 224), Axis(0, 210, 224))
    columns = np.clip((np.einsum("hwc,sw->hsc", pixels, bicubic_weights(210, 224)) + 2**21) // 2**22, 0, 255)
    both = np.clip((np.einsum("hsc,th->tsc", columns, bicubic_weights(250, 224)) + 2**21) // 2**22, 0, 255)
    assert np.array_equal(resize_image(pixels, plan, 224).permute(1, 2, 0).numpy(), both)


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.9, 1.0)), (40, 50, (0.2, 1.0)), (20, 90, (0.9, 1.0))])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    draw, blank = random.Random(0), Image.new("RGB", (width, height))
    ours = [crop_box(height, width, scale, (3 / 4, 4 / 3), draw) for _ in range(3000)]
    theirs = [T.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        spread = max(statistics.pstdev(other), 0.1)
        assert abs(statistics.mean(mine) - statistics.mean(other)) < 0.1 * spread + 1e-9
        assert (min(mine), max(mine)) == pytest.approx((min(other), max(other)), abs=2)


def test_boxes_lie_inside_the_image():
    for seed in range(200):
        top, left, height, width = crop_box(7, 31, (0.9, 1.0), (3 / 4, 4 / 3), generator(seed))
        assert top >= 0 and left >= 0 and top + height <= 7 and left + width <= 31 and height > 0 and width > 0

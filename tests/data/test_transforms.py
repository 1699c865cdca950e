import random
import statistics

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from dist_vlcl.data.loader import decode
from dist_vlcl.data.order import generator
from dist_vlcl.data.transforms import TestTransform, TrainTransform, crop_box
from tests.helpers.shards import png

BICUBIC = T.InterpolationMode.BICUBIC


def image(width=50, height=40):
    return decode(png(64, "picture"), "").resize((width, height))


def test_test_images_are_torchvisions():
    expected = T.Compose([T.Resize(24, BICUBIC), T.CenterCrop(24), T.PILToTensor()])(image())
    assert torch.equal(TestTransform(24)(image(), generator()), expected)


def test_a_train_image_is_torchvisions_crop_of_our_box():
    box = crop_box(40, 50, (0.5, 1.0), (3 / 4, 4 / 3), generator(7))
    expected = T.functional.pil_to_tensor(T.functional.resized_crop(image(), *box, [24, 24], BICUBIC))
    actual = TrainTransform(24, scale=(0.5, 1.0))(image(), generator(7))
    assert torch.equal(actual, expected)
    assert actual.dtype == torch.uint8 and actual.shape == (3, 24, 24) and actual.is_contiguous()


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

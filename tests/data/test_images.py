"""Images that may be damaged or hostile, and kinds of images that Pillow alone would open otherwise than a viewer shows them."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from dist_vlcl.data import images
from dist_vlcl.data.images import open_image
from tests.helpers import mutate
from tests.helpers.memory import peak_mib
from tests.helpers.shards import png

NOISE = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


MODES = {"PNG": ("RGB", "L", "P", "1", "RGBA", "LA"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_ordinary_images_have_pillows_pixels(format, mode):
    data = saved(Image.fromarray(NOISE).convert(mode), format)
    assert np.array_equal(open_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_is_scaled():
    """Pillow's own conversion made everything above 255 white."""
    ramp = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    pixels = open_image(saved(Image.fromarray(ramp), "PNG"))
    assert pixels.shape == (256, 256, 3) and np.array_equal(pixels, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_turns_the_image_upright(orientation, format):
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    data = saved(Image.fromarray(NOISE), format, exif=exif)
    assert np.array_equal(open_image(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    assert open_image(data).shape == ((31, 20, 3) if orientation > 4 else (20, 31, 3))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_does_not_cost_the_image(exif, format):
    data = saved(Image.fromarray(NOISE), format, exif=exif)
    assert np.array_equal(open_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_refused_whatever_their_name(format):
    with pytest.raises(ValueError, match="no image: neither PNG, JPEG, WebP nor PPM"):
        open_image(saved(Image.fromarray(NOISE), format))


def test_a_png_has_the_right_pixels_or_is_refused():
    """Every bit flipped once, every length: a PNG has checksums."""
    whole = png(8, "bits")
    right = open_image(whole)
    for number in range(8 * len(whole)):
        try:
            assert np.array_equal(open_image(mutate.flip_bit(whole, number)), right), number
        except ValueError as error:
            assert str(error).startswith("no image: ")
    for length in range(len(whole) - 4):  # but the checksum of the empty last part
        with pytest.raises(ValueError, match="no image"):
            open_image(whole[:length])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "PPM"])
def test_mutated_images_give_pixels_or_one_kind_of_error(format):
    whole = images.ppm(NOISE) if format == "PPM" else saved(Image.fromarray(NOISE), format)
    for seed in range(200):
        try:
            pixels = open_image(mutate.mutated(whole, random.Random(seed)))
        except ValueError as error:
            assert str(error).startswith("no image: ")
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size <= 3 * images.MAX_PIXELS


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_cut_image_is_refused(format):
    whole = saved(Image.fromarray(NOISE), format)
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 12):
        with pytest.raises(ValueError, match="no image"):
            open_image(whole[:length])


def test_what_can_be_opened_can_be_stored_as_pixels_and_opened_again():
    """A picture of 8 x 100,008 pixels was built, and stopped the training (found by tools/fuzz.py, input 1203)."""
    pixels = open_image(saved(Image.new("RGB", (8, 100_008)), "PNG"))
    assert np.array_equal(open_image(images.ppm(pixels)), pixels)


def test_a_bomb_is_refused_before_it_is_decoded():
    """9,000 x 8,000 pixels in few bytes. PNG headers that claim more are in test_loader."""
    bombs = [saved(Image.new("1", (9_000, 8_000)), "PNG"), saved(Image.new("L", (9_000, 8_000)), "JPEG")]

    def refused():
        for bomb in bombs:
            with pytest.raises(ValueError, match=r"no image: 9000 x 8000 pixels are more than 67,108,864"):
                open_image(bomb)

    assert peak_mib(refused) < 30

"""Draw digits and letters from the fonts that come with matplotlib, bent, thickened and blurred, as training images of the small CLIP.

    python tools/rendered_characters.py characters.png     # look at 200 of them

No data set is read. Six of ten images are shrunk to 8x8 pixels and enlarged again, as scikit-learn's digits are.
"""

# N images, G glyphs of all fonts, S side of a glyph

import string
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "Mono", "Mono-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmss10", "cmtt10", "cmti10", "cmb10"),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = (*DIGITS, *string.ascii_lowercase)  # a letter is one class in both cases
DIGIT_SHARE = 2 / 3
S = 64


def glyphs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return every character in every font `[G, 1, S, S]`, white on black, as high as the image, and its class `[G]`."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 96)
        for character in string.digits + string.ascii_letters:
            left, top, right, bottom = font.getbbox(character)
            canvas = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
            width = min(S, max(10, round(S * canvas.width / canvas.height)))
            glyph = Image.new("L", (S, S))
            glyph.paste(canvas.resize((width, S)), ((S - width) // 2, 0))
            images.append(np.asarray(glyph))
            labels.append(int(character) if character.isdigit() else 10 + string.ascii_lowercase.index(character.lower()))
    return torch.from_numpy(np.stack(images))[:, None].float() / 255, torch.tensor(labels)


class Characters:
    """Draws batches of warped characters. All random numbers come from the caller's generator."""

    def __init__(self) -> None:
        self.images, self.labels = glyphs()
        self.by_class = [torch.nonzero(self.labels == c).flatten() for c in range(len(CLASSES))]

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images `[count, 3, 32, 32]` as uint8 and their classes `[count]`, indices of CLASSES."""

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        digit = torch.rand(count, generator=generator) < DIGIT_SHARE
        labels = torch.where(
            digit, torch.randint(0, 10, (count,), generator=generator), torch.randint(10, 36, (count,), generator=generator)
        )
        chosen = torch.stack(
            [ids[torch.randint(0, len(ids), (), generator=generator)] for ids in (self.by_class[c] for c in labels.tolist())]
        )
        strokes = self._warp(self.images[chosen], uniform, generator)
        shrunk = F.avg_pool2d(strokes, S // 8).mul(16).round().div(16)
        shrunk = F.interpolate(shrunk, size=32, mode="bicubic").clamp(0, 1)
        fine = F.avg_pool2d(strokes, S // 32)
        # The shrunk ones are white on black; the others have two colours at a distance.
        ink, paper = torch.rand(2, count, 3, 1, 1, generator=generator)
        ink = torch.where((ink - paper).abs().mean(1, keepdim=True) < 0.3, (paper + 0.5) % 1, ink)
        coloured = paper + fine * (ink - paper)
        return torch.where(uniform(0, 1, 1, 1, 1) < 0.6, shrunk.expand(-1, 3, -1, -1), coloured).mul(255).round().byte(), labels

    def _warp(self, images: torch.Tensor, uniform, generator: torch.Generator) -> torch.Tensor:
        """Rotate, shear, scale and bend; then blur and cut at a level, which makes strokes thicker or thinner."""
        count = len(images)
        angle, shear = 0.15 * torch.randn(count, generator=generator), 0.25 * torch.randn(count, generator=generator)
        wide, high = 1 / uniform(0.55, 1.05), 1 / uniform(0.9, 1.05)
        rows = [torch.stack([wide * angle.cos(), wide * (shear - angle.sin()), uniform(-0.12, 0.12)], 1)]
        rows.append(torch.stack([high * angle.sin(), high * angle.cos(), uniform(-0.06, 0.06)], 1))
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, S, S], align_corners=False)
        bends = torch.randn(count, 2, 4, 4, generator=generator) * uniform(0.04, 0.16, 1, 1, 1)
        grid = grid + F.interpolate(bends, size=S, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        bent = F.grid_sample(images, grid, align_corners=False)
        taps = torch.arange(-6.0, 7.0)
        blur = torch.exp(-0.5 * (taps / 2.5) ** 2)
        blur /= blur.sum()
        bent = F.conv2d(F.conv2d(bent, blur[None, None, :, None], padding=(6, 0)), blur[None, None, None, :], padding=(0, 6))
        return torch.sigmoid((bent - uniform(0.1, 0.5, 1, 1, 1)) * 25)


def main() -> None:
    images, _ = Characters().draw(200, torch.Generator().manual_seed(0))
    sheet = images.view(10, 20, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(320, 640, 3)
    Image.fromarray(sheet.numpy()).resize((1280, 640), Image.Resampling.NEAREST).save(sys.argv[1])


if __name__ == "__main__":
    main()

"""Boxes and words on images, and regions made unrecognisable: pure functions over one image as a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate, max_pool2d

from t2i_spo_plugin.errors import ConfigError

from .overlay import Box, boxes


Hiding = Literal["blur", "pixelate"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELLS_ACROSS = 6
"""A hidden region keeps at most so many cells of detail along its longer side."""

_SMALLEST_FONT, _LARGEST_FONT = 8, 40
_LINE_HEIGHT = 1.25
_INK, _OUTLINE, _GROUND = (255, 255, 255, 255), (0, 0, 0, 255), 0.12


def annotate(pixels: Tensor, marked: Sequence[Box] = (), label: str = "") -> Tensor:
    """The image with boxes around `marked` and a label; every other pixel stays as it is.

    The label stands above the first box where there is room, otherwise at that box's or the image's top left, and
    shrinks or breaks to fit the width. Boxes and words are white with a black outline, to be seen on any ground.

    Args:
        pixels: `[3, H, W]` in [0, 1].
        marked: x0, y0, x1, y1 in pixels, as `overlay.boxes` gives them.
        label: a short text; empty draws none.
    """
    height, width = pixels.shape[-2:]
    layer = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(layer)
    line = max(1, round(min(height, width) / 200))
    for x0, y0, x1, y1 in marked:
        for inset, thickness, ink in ((0, 3 * line, _OUTLINE), (line, line, _INK)):
            if x1 - x0 > 2 * inset and y1 - y0 > 2 * inset:
                corners = (x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset)
                pen.rectangle(corners, outline=ink, width=thickness)
    if label:
        margin = max(1, min(height, width) // 64)
        font, size, lines = _fitting(label, width - 2 * margin, min(height, width) // 16)
        tall = math.ceil(size * _LINE_HEIGHT) * len(lines)
        x, y = margin, margin
        if marked:
            x0, y0, _, _ = marked[0]
            longest = max(font.getlength(text) for text in lines)
            x = int(max(margin, min(x0, width - margin - longest)))
            y = y0 - tall if y0 >= tall else min(y0 + 3 * line + margin, max(0, height - tall))
        _write(pen, (x, y), lines, font, size)
    return _laid_over(pixels, layer)


def message_image(message: str, size: tuple[int, int]) -> Tensor:
    """A dark image `[3, H, W]` of the given height and width that says `message` in its middle."""
    height, width = size
    ground = torch.full((3, height, width), _GROUND)
    if not message.strip():
        return ground
    layer = Image.new("RGBA", (width, height))
    margin = max(1, min(height, width) // 16)
    font, text_size, lines = _fitting(message, width - 2 * margin, min(height, width) // 12)
    tall = math.ceil(text_size * _LINE_HEIGHT) * len(lines)
    longest = max(font.getlength(text) for text in lines)
    _write(
        ImageDraw.Draw(layer),
        (max(0, int(width - longest) // 2), max(0, (height - tall) // 2)),
        lines,
        font,
        text_size,
    )
    return _laid_over(ground, layer)


def hide(pixels: Tensor, region: Tensor, how: Hiding = "blur") -> Tensor:
    """The image with a region blurred or pixelated beyond recognition, and a margin of one cell around it.

    The cells are as large as leaves at most six across the region's longest part, whatever the image's size: a fixed
    blur would leave a large thing recognisable. Outside region and margin every pixel stays as it is.

    Args:
        pixels: `[C, H, W]`.
        region: bool `[H, W]`.
        how: `blur` fades at the edge of the margin; `pixelate` ends at whole cells.

    Raises:
        ConfigError: another `how`, or a region of another size.
    """
    if how not in ("blur", "pixelate"):
        raise ConfigError(f"how must be blur or pixelate, got {how!r}")
    height, width = pixels.shape[-2:]
    if region.shape != (height, width):
        raise ConfigError(f"expected a region [{height}, {width}], got {list(region.shape)}")
    parts = boxes(region.cpu().numpy())
    if not parts:
        return pixels
    longest = max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in parts)
    cell = math.ceil(longest / CELLS_ACROSS)
    grid = (math.ceil(height / cell), math.ceil(width / cell))
    whole = pixels[None].float()
    coarse = adaptive_avg_pool2d(whole, grid)
    touched = adaptive_max_pool2d(region.to(whole)[None, None], grid)
    touched = max_pool2d(touched, 3, stride=1, padding=1)
    if how == "blur":
        hidden = interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        weight = interpolate(touched, (height, width), mode="bilinear", align_corners=False)
        weight = torch.where(region.to(weight.device), 1.0, weight)
    else:
        hidden = interpolate(coarse, (height, width), mode="nearest")
        weight = interpolate(touched, (height, width), mode="nearest")
    mixed = (weight * hidden + (1.0 - weight) * whole)[0].to(pixels.dtype)
    return torch.where(weight[0] > 0.0, mixed, pixels)


def _fitting(text: str, width: int, largest: int) -> tuple[Font, int, list[str]]:
    """Font, its size, and `text` in lines: the largest size at which every word fits, on one line where that fits."""
    size = max(_SMALLEST_FONT, min(largest, _LARGEST_FONT))
    while size > _SMALLEST_FONT:
        font = ImageFont.load_default(size=size)
        if max(font.getlength(word) for word in text.split() or [text]) <= width:
            break
        size -= 1
    font = ImageFont.load_default(size=size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            joined = f"{current} {word}".strip()
            if current and font.getlength(joined) > width:
                lines.append(current)
                joined = word
            current = joined
        lines.append(current)
    return font, size, lines


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font, size: int) -> None:
    x, y = place
    for number, text in enumerate(lines):
        at = (x, y + number * math.ceil(size * _LINE_HEIGHT))
        pen.text(at, text, fill=_INK, font=font, stroke_width=max(1, size // 9), stroke_fill=_OUTLINE)


def _laid_over(pixels: Tensor, layer: Image.Image) -> Tensor:
    drawn = torch.from_numpy(np.array(layer)).to(pixels.device).permute(2, 0, 1).to(pixels.dtype) / 255.0
    return torch.where(drawn[3:] > 0.0, (1.0 - drawn[3:]) * pixels + drawn[3:] * drawn[:3], pixels)

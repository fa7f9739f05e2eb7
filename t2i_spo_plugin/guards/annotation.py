"""Boxes and words on images: pure functions over one image as a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .overlay import Box


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

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
    return _laid_over(pixels, _marks((height, width), marked, label))


def marks(size: tuple[int, int], marked: Sequence[Box] = (), label: str = "") -> Tensor:
    """What `annotate` lays over an image of the given height and width, alone: `[4, H, W]` in [0, 1], with alpha."""
    drawn = np.asarray(_marks(size, marked, label), dtype=np.float32) / 255.0
    return torch.from_numpy(drawn).movedim(-1, 0)


def _marks(size: tuple[int, int], marked: Sequence[Box], label: str) -> Image.Image:
    height, width = size
    layer = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(layer)
    line = max(1, round(min(height, width) / 200))
    for x0, y0, x1, y1 in marked:
        for inset, thickness, ink in ((0, 3 * line, _OUTLINE), (line, line, _INK)):
            if x1 - x0 > 2 * inset and y1 - y0 > 2 * inset:
                corners = (x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset)
                pen.rectangle(corners, outline=ink, width=thickness)
    if label.strip():
        margin = max(1, min(height, width) // 64)
        font, font_size, lines = _fitting(label, width - 2 * margin, min(height, width) // 16)
        tall = math.ceil(font_size * _LINE_HEIGHT) * len(lines)
        x, y = margin, margin
        if marked:
            x0, y0, _, _ = marked[0]
            longest = max(font.getlength(text) for text in lines)
            x = int(max(margin, min(x0, width - margin - longest)))
            y = y0 - tall if y0 >= tall else min(y0 + 3 * line + margin, max(0, height - tall))
        _write(pen, (x, y), lines, font, font_size)
    return layer


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


def wrap_text(text: str, width: int, font: Font) -> list[str]:
    """`text` in lines of at most `width` pixels; its own line breaks stay, and a word that is too long is cut.

    There is no line when there is no word.
    """
    if not text.strip():
        return []
    lines: list[str] = []
    for paragraph in text.strip("\n").split("\n"):
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width and len(word) > 1:
                cut = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
                lines += ([line] if line else []) + [word[:cut]]
                line, word = "", word[cut:]
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _fitting(text: str, width: int, largest: int) -> tuple[Font, int, list[str]]:
    """Font, its size, and `text` in lines: the largest size at which every word fits, or the smallest there is."""
    size = max(_SMALLEST_FONT, min(largest, _LARGEST_FONT))
    while size > _SMALLEST_FONT:
        font = ImageFont.load_default(size=size)
        if max(font.getlength(word) for word in text.split()) <= width - 2 * _outline_width(size):
            break
        size -= 1
    font = ImageFont.load_default(size=size)
    return font, size, wrap_text(text, width - 2 * _outline_width(size), font)


def _outline_width(size: int) -> int:
    """Pixels of the black outline around letters of a font's size."""
    return max(1, size // 9)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font, size: int) -> None:
    x, y = place
    for number, text in enumerate(lines):
        at = (x, y + number * math.ceil(size * _LINE_HEIGHT))
        pen.text(at, text, fill=_INK, font=font, stroke_width=_outline_width(size), stroke_fill=_OUTLINE)


def _laid_over(pixels: Tensor, layer: Image.Image) -> Tensor:
    over = torch.from_numpy(np.array(layer)).to(pixels.device).permute(2, 0, 1).to(pixels.dtype) / 255.0
    return torch.where(over[3:] > 0.0, (1.0 - over[3:]) * pixels + over[3:] * over[:3], pixels)

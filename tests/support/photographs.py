"""Harmless images drawn here, with the smooth shades, edges and grain that a photograph has."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def landscape(size: tuple[int, int] = (320, 240), seed: int = 0) -> Image.Image:
    """Sky, hills, a sun and grain."""
    width, height = size
    rng = np.random.default_rng(seed)
    shade = np.linspace(0.0, 1.0, height)[:, None, None] * np.array([60.0, -20.0, -120.0]) + np.array([90, 140, 220])
    image = Image.fromarray(np.broadcast_to(shade, (height, width, 3)).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for depth, colour in enumerate([(70, 110, 70), (50, 90, 45), (30, 60, 30)]):
        line = (0.45 + 0.17 * depth) * height + np.cumsum(rng.normal(0, 0.006 * height, width))
        pen.polygon([(0, height), *enumerate(line.tolist()), (width, height)], fill=colour)
    pen.ellipse((0.7 * width, 0.1 * height, 0.7 * width + 0.15 * height, 0.25 * height), fill=(255, 240, 190))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64) + rng.normal(
        0, 4, (height, width, 3)
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def table(size: tuple[int, int] = (256, 256), seed: int = 1) -> Image.Image:
    """A cup on a wooden table, from above."""
    width, height = size
    rng = np.random.default_rng(seed)
    wood = 120 + 25 * np.sin(np.arange(height)[:, None] / 7 + np.cumsum(rng.normal(0, 0.05, width))[None, :])
    pixels = (wood[..., None] * np.array([1.2, 0.8, 0.5])).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    for share, colour in ((0.36, (235, 235, 230)), (0.26, (200, 200, 195)), (0.23, (60, 35, 20))):
        radius = share * min(size)
        pen.ellipse((width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(1))


HARMLESS = {
    "landscape": landscape(),
    "portrait format": landscape((180, 300), seed=3),
    "table": table(),
    "small": table((96, 64), seed=2),
}

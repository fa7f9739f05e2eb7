"""The fixed views in which a judge looks at an image when results are reported.

A judge that looks once is fooled by turning the image over, by noise, or by an inset. None of the views changes what a
person would say of the image; colours stay, for they decide between blood and water.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize


NAMES = (
    "whole",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "centre",
    "upside down",
    "mirrored",
    "median",
)


def views(pixels: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] -> `[9, B, 3, H, W]`, in the order of `NAMES`.

    The whole image; its four quadrants and its centre, enlarged twice; upside down; mirrored; and filtered by the
    median of 3 x 3 pixels.
    """
    height, width = pixels.shape[-2:]
    tops, lefts = (height - height // 2, (height - height // 2) // 2), (width - width // 2, (width - width // 2) // 2)
    corners = [(0, 0), (0, lefts[0]), (tops[0], 0), (tops[0], lefts[0]), (tops[1], lefts[1])]
    parts = [
        resize(pixels[..., top : top + height // 2, left : left + width // 2], (height, width))
        for top, left in corners
    ]
    return torch.stack([pixels, *parts, pixels.flip(2, 3), pixels.flip(3), median(pixels)])


def median(pixels: Tensor) -> Tensor:
    """Median of the 3 x 3 pixels around each pixel, per channel; at the rim the image is continued by its edge."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]] for y in range(3) for x in range(3)]
    return torch.stack(around).median(0).values

"""The fixed views in which a judge looks at an image when results are reported.

A judge that looks once is fooled by turning the image over, by noise, or by an inset. None of the views changes what a
person would say of the image; colours stay, for they decide between blood and water.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize


VIEW_NAMES = (
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


BLANK = 0.05
"""How far a pixel of a blank image may lie from its plane, in [0, 1]."""


def fixed_views(pixels: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] -> `[9, B, 3, H, W]`, in the order of `VIEW_NAMES`.

    The whole image; its four quadrants and its centre, enlarged twice; upside down; mirrored; and filtered by the
    median of 3 x 3 pixels.
    """
    height, width = pixels.shape[-2:]
    down, across = max(1, height // 2), max(1, width // 2)
    bottom, right = height - down, width - across
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    parts = [resize(pixels[..., top : top + down, left : left + across], (height, width)) for top, left in corners]
    return torch.stack([pixels, *parts, pixels.flip(2, 3), pixels.flip(3), median(pixels)])


def median(pixels: Tensor) -> Tensor:
    """Median of the 3 x 3 pixels around each pixel, per channel; at the rim the image is continued by its edge."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]] for y in range(3) for x in range(3)]
    return torch.stack(around).median(0).values


def is_blank(pixels: Tensor) -> Tensor:
    """Bool `[B]`: images `[B, 3, H, W]` in [0, 1] of one colour or of one soft gradient.

    Of 100 pixels 99 differ by less than `BLANK` from the plane that fits them best.
    """
    height, width = pixels.shape[-2:]
    u = torch.linspace(-1, 1, width, device=pixels.device) if width > 1 else pixels.new_zeros(1)
    v = torch.linspace(-1, 1, height, device=pixels.device)[:, None] if height > 1 else pixels.new_zeros(1, 1)
    across = (pixels * u).mean((2, 3), keepdim=True) / u.square().mean().clamp(min=1e-9)
    down = (pixels * v).mean((2, 3), keepdim=True) / v.square().mean().clamp(min=1e-9)
    plane = pixels.mean((2, 3), keepdim=True) + across * u + down * v
    off = (pixels - plane).abs().amax(1).flatten(1)
    allowed = max(1, off.shape[1] - off.shape[1] // 100)
    return off.kthvalue(allowed, dim=1).values < BLANK

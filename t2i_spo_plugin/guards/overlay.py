"""Cost maps as images, masks and boxes: pure functions over one image and one map."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.images import Images, to_pil, to_tensor
from t2i_spo_plugin.metrics import UNSAFE_COST

from .policy import stretch


Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 are the first column and row outside."""

COLOUR_MAPS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "heat": ((1.0, 0.93, 0.55), (1.0, 0.62, 0.12), (0.86, 0.10, 0.10)),
    "viridis": ((0.27, 0.0, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14)),
    "magma": ((0.0, 0.0, 0.01), (0.32, 0.07, 0.49), (0.72, 0.22, 0.47), (0.98, 0.55, 0.38), (0.99, 0.99, 0.75)),
    "red": ((0.90, 0.05, 0.10),),
    "cyan": ((0.0, 0.85, 0.95),),
}
"""Colours from cost 0 to cost 1, evenly spaced. Cost 0 is clear in every one of them: opacity grows with the cost."""

_OPACITY = 0.75


def heat(logit_map: Tensor, size: int | tuple[int, int], temperature: float = 1.0, threshold: float = 0.5) -> Tensor:
    """Cost at every pixel, `[H, W]` in [0, 1]: interpolated logits, calibrated, 0.5 where the threshold is met.

    Args:
        logit_map: `[h, w]`, the map of one category.
        size: edge, or height and width of the image.
        temperature: calibration temperature of the category, positive.
        threshold: the calibrated probability that becomes 0.5, as in a policy's `stretch`.

    Raises:
        ValueError: the map is not two-dimensional, or a number is out of range.
    """
    if logit_map.ndim != 2:
        raise ValueError(f"expected one map [h, w], got shape {tuple(logit_map.shape)}")
    if not temperature > 0.0 or not 0.0 < threshold < 1.0:
        raise ValueError(f"expected temperature > 0 and 0 < threshold < 1, got {temperature} and {threshold}")
    target = (size, size) if isinstance(size, int) else tuple(size)
    logits = torch.nn.functional.interpolate(
        logit_map.detach().float()[None, None], size=target, mode="bilinear", align_corners=False
    )[0, 0]
    return stretch(torch.sigmoid(logits / temperature), threshold)


def overlay(image: Images, heat_map: Tensor, colour_map: str = "heat", opacity: float = _OPACITY) -> Image.Image:
    """The image with its cost drawn over it: clear where the cost is 0; by default yellow, then red where it is 1.

    Args:
        image: one image, in any form that `to_tensor` takes.
        heat_map: `[H, W]` in [0, 1], as `heat` gives it; resampled when its size differs from the image's.
        colour_map: one of `COLOUR_MAPS`.
        opacity: of the colour where the cost is 1, in [0, 1].

    Raises:
        ValueError: not one image, an unknown colour map, or an opacity out of range.
    """
    pixels = to_tensor(image)
    if pixels.shape[0] != 1:
        raise ValueError(f"expected one image, got {pixels.shape[0]}")
    amount = heat_map.detach().float().to(pixels.device)[None, None].clamp(0.0, 1.0)
    if amount.shape[-2:] != pixels.shape[-2:]:
        amount = torch.nn.functional.interpolate(amount, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return to_pil(tint(pixels[0], amount[0, 0], colour_map, opacity))[0]


def tint(pixels: Tensor, heat_map: Tensor, colour_map: str = "heat", opacity: float = _OPACITY) -> Tensor:
    """`overlay` for an image `[3, H, W]` in [0, 1] and a map `[H, W]` of its size, as such an image.

    Raises:
        ConfigError: an unknown colour map, or an opacity outside [0, 1].
    """
    if not 0.0 <= opacity <= 1.0:
        raise ConfigError(f"opacity must lie in [0, 1], got {opacity}")
    colours, weight = layer(heat_map, colour_map).split([3, 1])
    return (1.0 - opacity * weight) * pixels + opacity * weight * colours


def layer(heat_map: Tensor, colour_map: str = "heat") -> Tensor:
    """What `tint` lays over an image at full opacity, alone: `[4, H, W]` in [0, 1], red, green, blue and alpha.

    Args:
        heat_map: `[H, W]` in [0, 1].
        colour_map: one of `COLOUR_MAPS`.

    Raises:
        ConfigError: an unknown colour map.
    """
    if colour_map not in COLOUR_MAPS:
        raise ConfigError(f"colour_map must be one of {', '.join(COLOUR_MAPS)}, got {colour_map!r}")
    return torch.cat([_colour(heat_map, colour_map), heat_map[None]])


def mask(heat_map: Tensor, threshold: float = UNSAFE_COST) -> np.ndarray:
    """Where the cost reaches `threshold`: bool `[H, W]`."""
    return (heat_map.detach() >= threshold).cpu().numpy()


def boxes(region: np.ndarray) -> list[Box]:
    """Bounding boxes of the connected parts of a bool mask `[H, W]`, corners included; the largest part first.

    Raises:
        ValueError: not a two-dimensional bool array.
    """
    if region.ndim != 2 or region.dtype != np.bool_:
        raise ValueError(f"expected a bool array [H, W], got {region.dtype} {region.shape}")
    parts: list[_Part] = []
    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(region):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.view(np.int8), [0]))))
        current = []
        for x0, x1 in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            label = len(parts)
            parts.append(_Part(x0, y, x1, y + 1, x1 - x0, label))
            for left, right, other in above:
                if left <= x1 and x0 <= right:
                    label = _join(parts, label, other)
            current.append((x0, x1, label))
        above = current
    roots = [part for number, part in enumerate(parts) if part.root == number]
    roots.sort(key=lambda part: (-part.area, part.y0, part.x0))
    return [(part.x0, part.y0, part.x1, part.y1) for part in roots]


class _Part:
    """A run of pixels, and the bounds and area of all runs joined to it."""

    __slots__ = ("area", "root", "x0", "x1", "y0", "y1")

    def __init__(self, x0: int, y0: int, x1: int, y1: int, area: int, root: int) -> None:
        self.x0, self.y0, self.x1, self.y1, self.area, self.root = x0, y0, x1, y1, area, root


def _join(parts: list[_Part], first: int, second: int) -> int:
    keep, drop = sorted((_root(parts, first), _root(parts, second)))
    if keep != drop:
        into, gone = parts[keep], parts[drop]
        gone.root = keep
        into.x0, into.y0 = min(into.x0, gone.x0), min(into.y0, gone.y0)
        into.x1, into.y1 = max(into.x1, gone.x1), max(into.y1, gone.y1)
        into.area += gone.area
    return keep


def _root(parts: list[_Part], number: int) -> int:
    while parts[number].root != number:
        parts[number].root = parts[parts[number].root].root
        number = parts[number].root
    return number


def _colour(amount: Tensor, colour_map: str) -> Tensor:
    """Colours `[3, H, W]` along the scale for amounts `[H, W]` in [0, 1]."""
    anchors = COLOUR_MAPS[colour_map]
    colours = torch.tensor(anchors if len(anchors) > 1 else anchors * 2, device=amount.device)
    position = amount * (len(colours) - 1)
    lower = position.floor().long().clamp(0, len(colours) - 2)
    share = (position - lower)[..., None]
    return ((1.0 - share) * colours[lower] + share * colours[lower + 1]).permute(2, 0, 1)

"""Images and regions made unrecognisable: what a guard returns in place of an unsafe image."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d

from t2i_spo_plugin.errors import ConfigError, ImageError
from t2i_spo_plugin.images import image_size, open_image, to_pil, to_tensor, views

from .overlay import boxes


Block = Literal["none", "black", "blur"]
"""What a guard does with unsafe images: nothing, a black image, or a blurred one."""
Hiding = Literal["blur", "pixelate"]
"""How a region is hidden."""

CELLS_ACROSS = 6
"""A hidden region keeps at most so many cells of detail along its longer side."""


def hide(pixels: Tensor, region: Tensor, how: Hiding = "blur") -> Tensor:
    """The image with a region blurred or pixelated beyond recognition, and a margin of one cell around it.

    The cells are so large that at most six lie across the region's longest part, whatever the image's size: a fixed
    blur would leave a large object recognisable. Outside region and margin every pixel stays as it is.

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
    whole = pixels.float()
    hidden = pixelate(whole, grid, smooth=how == "blur")
    touched = adaptive_max_pool2d(region.to(whole)[None, None], grid)
    touched = max_pool2d(touched, 3, stride=1, padding=1)
    if how == "blur":
        weight = interpolate(touched, (height, width), mode="bilinear", align_corners=False)
        weight = torch.where(region.to(weight.device), 1.0, weight)
    else:
        weight = interpolate(touched, (height, width), mode="nearest")
    mixed = (weight[0] * hidden + (1.0 - weight[0]) * whole).to(pixels.dtype)
    return torch.where(weight[0] > 0.0, mixed, pixels)


def pixelate(pixels: Tensor, grid: tuple[int, int], smooth: bool = False) -> Tensor:
    """`[C, H, W]` with no more detail than a grid of cells, each of which has the mean colour of what it covers.

    Args:
        pixels: floating point.
        grid: rows and columns of cells, at most H and W.
        smooth: run from cell to cell without edges, instead of showing the cells.
    """
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels, grid)[None]
    size = pixels.shape[-2:]
    if smooth:
        return torch.nn.functional.interpolate(cells, size, mode="bilinear", align_corners=False)[0]
    return torch.nn.functional.interpolate(cells, size, mode="nearest")[0]


def block_image(image: Any, block: Block) -> Any:
    """One image, in the form it came in, made black or blurred as a whole; `none` returns it as it is.

    What cannot be read is made black, also where it should be blurred. Of a file it is a PIL image.

    Raises:
        ImageError: a file that cannot be read, so that not even its size is known.
    """
    if block == "none":
        return image
    if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
        image = open_image(image)
    height, width = image_size(image)
    pixels = torch.zeros(3, height, width)
    if block == "blur":
        try:
            pixels = hide(to_tensor(next(views(image)).image)[0].cpu(), torch.ones(height, width, dtype=torch.bool))
        except ImageError:
            pixels = torch.zeros(3, height, width)
    if isinstance(image, Image.Image):
        return to_pil(pixels)[0]
    if image.shape[-1 if isinstance(image, np.ndarray) else 0] == 4:
        pixels = torch.cat([pixels, torch.ones(1, height, width)])
    if isinstance(image, np.ndarray):
        scaled = pixels.permute(1, 2, 0).numpy()
        return (scaled * 255.0).round().astype(np.uint8) if image.dtype == np.uint8 else scaled.astype(image.dtype)
    return ((pixels * 255.0).round() if image.dtype == torch.uint8 else pixels).to(image)

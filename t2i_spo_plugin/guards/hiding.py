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
from t2i_spo_plugin.images import image_size, pixelate, to_pil, to_tensor

from .overlay import boxes


Block = Literal["none", "black", "blur"]
Hiding = Literal["blur", "pixelate"]

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


def block_image(image: Any, block: Block) -> Any:
    """One image, in the form it came in, made black or blurred as a whole; `none` returns it as it is.

    What cannot be read is made black, also where it should be blurred.
    """
    if block == "none":
        return image
    height, width = image_size(image)
    pixels = torch.zeros(3, height, width)
    if block == "blur":
        try:
            pixels = hide(to_tensor(image)[0].cpu(), torch.ones(height, width, dtype=torch.bool))
        except ImageError:
            pixels = torch.zeros(3, height, width)
    if isinstance(image, Image.Image):
        return to_pil(pixels)[0]
    if isinstance(image, np.ndarray):
        scaled = pixels.permute(1, 2, 0).numpy()
        return (scaled * 255.0).round().astype(np.uint8) if image.dtype == np.uint8 else scaled.astype(image.dtype)
    return ((pixels * 255.0).round() if image.dtype == torch.uint8 else pixels).to(image)

"""The one place where images become tensors and back.

Resampling is our own (torch, antialiased bicubic): an image processor from elsewhere would change its result with what
else is installed. Every image is converted on its own, so nothing depends on the batch it comes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ImageError


Images = Any
"""A PIL image, a numpy array [H, W, 3] or [B, H, W, 3], a tensor [3, H, W] or [B, 3, H, W], or a sequence of them."""

_RANGE_TOLERANCE = 1e-3


def to_tensor(images: Images, size: int | None = None) -> Tensor:
    """Images as a float32 tensor `[B, 3, H, W]` in [0, 1]; tensors stay on their device.

    Args:
        images: PIL image(s) of any mode (transparency is laid over white), numpy uint8 or float in [0, 1] with the
            channels last, tensors uint8 or float in [0, 1] with the channels first; one, a batch, or a sequence.
        size: edge of the square that the whole image is resampled to; None keeps the size (all must share it).

    Raises:
        ImageError: (a ValueError) wrong type, shape or range, NaN or Inf, an empty list, or sizes that differ.
    """
    if size is not None and size < 1:
        raise ImageError(f"size must be at least 1, got {size}")
    batches = [resize(_one_to_tensor(image), size) for image in _as_sequence(images)]
    if not batches:
        raise ImageError("got an empty list of images")
    sizes = {tuple(batch.shape[-2:]) for batch in batches}
    if len(sizes) > 1:
        raise ImageError(f"images have different sizes {sorted(sizes)}; pass size= to resample them to one")
    return torch.cat(batches)


def batches(images: Images, size: int, device: torch.device, batch_size: int = 64) -> Iterator[Tensor]:
    """Images as `[<= batch_size, 3, size, size]` in [0, 1] on `device`, for a network with inputs of that size."""
    pixels = to_tensor(images, size)
    for start in range(0, len(pixels), batch_size):
        yield pixels[start : start + batch_size].to(device)


def count(images: Images) -> int:
    """How many images `images` holds, without converting them."""
    return sum(_length(image) for image in _as_sequence(images))


def split(images: Images) -> list[Any]:
    """The images one by one, unconverted, so that one bad image does not spoil the batch it came in."""
    parts: list[Any] = []
    for image in _as_sequence(images):
        parts.extend(image if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4 else [image])
    return parts


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of one image, unconverted, whatever its form."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.shape[-2], image.shape[-1]


def resize(
    pixels: Tensor, size: int | tuple[int, int] | None, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Antialiased resampling of `[B, C, H, W]` to `size` (edge, or height and width), kept within [0, 1]."""
    if size is None:
        return pixels
    target = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[-2:]) == target:
        return pixels
    resampled = torch.nn.functional.interpolate(pixels, size=target, mode=mode, antialias=True, align_corners=False)
    return resampled.clamp(0.0, 1.0)


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


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """`[3, H, W]` or `[B, 3, H, W]` in [0, 1] as a list of RGB images.

    Raises:
        ImageError: wrong shape or range, NaN or Inf.
    """
    if pixels.ndim == 3:
        pixels = pixels[None]
    checked = _check_pixels(pixels, "tensor")
    array = (checked * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def channels_first(pixels: Tensor) -> Tensor:
    """Images `[B, H, W, C]` of 1, 3 or 4 channels as `[B, 3, H, W]`, the way a viewer shows them.

    Grey is repeated, transparency is laid over white, and what lies outside [0, 1] is cut off. Images that are RGB
    and in range come back as a view.

    Raises:
        ImageError: another shape.
    """
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4):
        raise ImageError(f"expected images [B, H, W, C] with 1, 3 or 4 channels, got shape {tuple(pixels.shape)}")
    moved = pixels.detach().movedim(-1, 1)
    if moved.numel() and (float(moved.min()) < 0.0 or float(moved.max()) > 1.0):
        moved = moved.clamp(0.0, 1.0)
    if moved.shape[1] == 4:
        return moved[:, :3] * moved[:, 3:] + 1.0 - moved[:, 3:]
    return moved.expand(-1, 3, -1, -1)


def _as_sequence(images: Images) -> Sequence[Any]:
    return images if isinstance(images, (list, tuple)) else [images]


def _length(image: Any) -> int:
    return image.shape[0] if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4 else 1


def _one_to_tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        try:
            return _from_array(np.asarray(_to_rgb(image)))
        except OSError as error:
            raise ImageError(f"the image cannot be decoded: {error}") from error
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        pixels = image[None] if image.ndim == 3 else image
        return _check_pixels(pixels / 255.0 if pixels.dtype == torch.uint8 else pixels, "tensor")
    raise ImageError(f"expected PIL images, numpy arrays or tensors, got {type(image).__name__}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(background, layer).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ImageError(f"expected a numpy array [H, W, 3] or [B, H, W, 3], got shape {array.shape}")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"expected numpy uint8 in [0, 255] or float in [0, 1], got {array.dtype}")
    pixels = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)
    return _check_pixels(pixels / 255.0 if array.dtype == np.uint8 else pixels, "numpy array")


def _check_pixels(pixels: Tensor, kind: str) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.numel() == 0:
        raise ImageError(f"expected a {kind} of RGB images, got shape {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ImageError(f"expected a {kind} of uint8 in [0, 255] or float in [0, 1], got {pixels.dtype}")
    pixels = pixels.detach().to(torch.float32) if not pixels.requires_grad else pixels.to(torch.float32)
    if not torch.isfinite(pixels).all():
        raise ImageError(f"the {kind} holds NaN or Inf")
    low, high = float(pixels.detach().min()), float(pixels.detach().max())
    if low < -_RANGE_TOLERANCE or high > 1.0 + _RANGE_TOLERANCE:
        raise ImageError(f"expected values in [0, 1], got a {kind} in [{low:.3g}, {high:.3g}]")
    return pixels.clamp(0.0, 1.0)

"""What a published vision network wants its images to be, read from its files and done with this package's resampling.

The image processors themselves are never used: what they give changes with what else is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from t2i_spo_plugin.images import Images, resize, split, to_tensor


_BILINEAR = 2
"""The number of bilinear resampling in Pillow, and so in preprocessor files."""


@dataclass(frozen=True)
class Preprocessing:
    """Size, resampling and statistics of a network's input.

    Attributes:
        size: height and width in pixels.
        mean: of each channel, for pixels in [0, 1].
        std: likewise.
        mode: of resampling.
        edge: the shorter edge before the middle is cut out, for `cropped`; None where nothing is cut.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    edge: int | None = None

    def normalised(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] as the network wants them; with gradients."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def whole(self, images: Images) -> Tensor:
        """Images as `[B, 3, *size]` in [0, 1]: all of each image, stretched. Nothing at its edge is overlooked."""
        return torch.cat([resize(to_tensor(image), self.size, self.mode) for image in split(images)])

    def cropped(self, images: Images) -> Tensor:
        """Images as `[B, 3, *size]` in [0, 1]: as published, the shorter edge resampled and the middle cut out."""
        return torch.cat([self._cropped(to_tensor(image)) for image in split(images)])

    def padded(self, images: Images) -> Tensor:
        """Images as `[B, 3, *size]` in [0, 1]: the longer edge resampled, the image in the middle of black."""
        return torch.cat([self._padded(to_tensor(image)) for image in split(images)])

    def _padded(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.size[0] / max(height, width)
        inside = (max(1, round(height * scale)), max(1, round(width * scale)))
        square = torch.zeros(*pixels.shape[:2], *self.size, device=pixels.device)
        top, left = (self.size[0] - inside[0]) // 2, (self.size[1] - inside[1]) // 2
        square[..., top : top + inside[0], left : left + inside[1]] = resize(pixels, inside, self.mode)
        return square

    def _cropped(self, pixels: Tensor) -> Tensor:
        if self.edge is None:
            return resize(pixels, self.size, self.mode)
        height, width = pixels.shape[-2:]
        shorter, longer = min(height, width), max(height, width)
        other = int(self.edge * longer / shorter)
        resized = resize(pixels, (self.edge, other) if height <= width else (other, self.edge), self.mode)
        top, left = (resized.shape[-2] - self.size[0]) // 2, (resized.shape[-1] - self.size[1]) // 2
        return resized[..., top : top + self.size[0], left : left + self.size[1]]


def parts(pixels: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """At most `batch_size` images at a time, on `device`."""
    for start in range(0, len(pixels), batch_size):
        yield pixels[start : start + batch_size].to(device)


def read_preprocessing(
    source: str | Path,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    local_files_only: bool = False,
) -> Preprocessing:
    """What the preprocessor file of `source`, a Hub id or folder, says; the other arguments where it is silent."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        stated, _ = BaseImageProcessor.get_image_processor_dict(source, local_files_only=local_files_only)
    except OSError:
        stated = {}
    stated = stated if isinstance(stated, Mapping) else {}
    crop = stated.get("crop_size") if stated.get("do_center_crop") else None
    asked = stated.get("size")
    shortest = asked.get("shortest_edge") if isinstance(asked, Mapping) else None
    final = _height_width(crop) or _height_width(asked) or _height_width(size)
    assert final is not None, "the caller's size is a number or two"
    plain = stated.get("do_normalize") is False
    return Preprocessing(
        size=final,
        mean=(0.0, 0.0, 0.0) if plain else tuple(stated.get("image_mean") or mean),
        std=(1.0, 1.0, 1.0) if plain else tuple(stated.get("image_std") or std),
        mode="bilinear" if stated.get("resample") == _BILINEAR else "bicubic",
        edge=int(shortest) if crop is not None and shortest else None,
    )


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)

"""The one place where images are opened, and where they become tensors and back.

Every image file is opened by `open_image` or `views`, so that all parts see the same pixels: upright, in 8 bits,
transparency laid over a ground. Resampling is our own (torch, antialiased bicubic): an image processor from elsewhere
would change its result with what else is installed. Every image is converted on its own, so nothing depends on the
batch it comes in.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError
from .files import user_path


Images = Any
"""A PIL image, a numpy array [H, W, 3] or [B, H, W, 3], a tensor [3, H, W] or [B, 3, H, W], or a sequence of them."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image
"""A file's path, its content, or an image that Pillow has opened or made."""

Ground = Literal["white", "black"]
"""What transparency is laid over."""

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""What the names of the image files in a folder end in, in small letters."""

_RANGE_TOLERANCE = 1e-3
_WITH_FRAMES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""Formats whose frames all are shown. Those of others are gain maps, layers or sizes of the one image."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
_BITS_PER_SAMPLE = 258
"""The tag of TIFF."""


@dataclass(frozen=True)
class View:
    """One opaque look at an image: one of its frames, over one ground.

    Attributes:
        image: RGB: a PIL image, or an array or tensor where that is what was given.
        frame: its number, from 1.
        frames: how many there are.
        ground: what transparency was laid over; None where the frame is opaque.
        empty: whether the frame is transparent all over, so that there is nothing to see.
    """

    image: Any
    frame: int = 1
    frames: int = 1
    ground: Ground | None = None
    empty: bool = False

    @property
    def note(self) -> str:
        """In words what the image alone does not say; nothing of an opaque image of one frame."""
        parts = [f"frame {self.frame} of {self.frames}"] if self.frames > 1 else []
        if self.empty:
            parts.append("empty: transparent all over")
        elif self.ground is not None:
            parts.append(f"transparency over {self.ground}")
        return ", ".join(parts)


def open_image(source: ImageSource, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """An image as a viewer shows it: upright by its EXIF, in 8 bits.

    16-bit, float and palette images are scaled by their depth. Of several frames it is the first of a file, and the
    present one of a PIL image.

    Args:
        source: a path, the content of a file, or a PIL image of any mode, which is not changed.
        mode: `RGB` lays transparency over white, `RGBA` keeps it.

    Raises:
        ImageError: missing, no image, too many pixels, cut off or broken; the sentence begins with the path.
    """
    with _opened(source) as image:
        layer = _layer(image)
    return layer.convert("RGBA") if mode == "RGBA" else _over(layer, "white")


def views(source: Any) -> Iterator[View]:
    """Every opaque look at one image: each frame, and over white and over black where a frame is not opaque.

    What is drawn in white on a transparent ground is seen over black alone, so that one of them is not enough. A
    frame that is transparent all over comes once, as `empty`.

    Args:
        source: as for `open_image`; or an array `[H, W, C]` or a tensor `[C, H, W]`, where four channels are RGBA.

    Raises:
        ImageError: as `open_image`.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        yield from _array_views(source)
        return
    with _opened(source) as image:
        count = int(getattr(image, "n_frames", 1)) if image.format in _WITH_FRAMES else 1
        position = image.tell() if count > 1 else 0
        try:
            for number in range(count):
                if count > 1:
                    image.seek(number)
                layer = _layer(image)
                lowest, highest = layer.getchannel("A").getextrema() if layer.mode == "RGBA" else (255, 255)
                grounds: tuple[Ground | None, ...] = (None,) if lowest == 255 or highest == 0 else ("white", "black")
                for ground in grounds:
                    yield View(_over(layer, ground or "white"), number + 1, count, ground, highest == 0)
        finally:
            if count > 1:
                image.seek(position)


def image_files(folder: str | Path) -> list[Path]:
    """The image files in a folder and those below it, in the order of their names.

    Files and folders that begin with a dot are left out: what systems and editors keep there is nobody's image.
    """
    folder = user_path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


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
    """Height and width of one upright image, whatever its form; unconverted unless it is a file."""
    if isinstance(image, Image.Image):
        if image.format == "TIFF":
            with suppress(ImageError), _opened(image):
                image.load()  # Older versions of Pillow turn it, and its size, only then.
        lies = _orientation(image) >= 5
        return (image.width, image.height) if lies else (image.height, image.width)
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image_size(open_image(image))


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


def channels_first(pixels: Tensor, ground: Ground | None = "white") -> Tensor:
    """Images `[B, H, W, C]` of 1, 3 or 4 channels as `[B, 3, H, W]`, the way a viewer shows them.

    Grey is repeated, transparency is laid over `ground` or, without one, stays as a fourth channel, and what lies
    outside [0, 1] is cut off. Images that are RGB and in range come back as a view.

    Raises:
        ImageError: another shape.
    """
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4):
        raise ImageError(f"expected images [B, H, W, C] with 1, 3 or 4 channels, got shape {tuple(pixels.shape)}")
    moved = pixels.detach().movedim(-1, 1)
    if moved.numel() and (float(moved.min()) < 0.0 or float(moved.max()) > 1.0):
        moved = moved.clamp(0.0, 1.0)
    if moved.shape[1] == 4:
        return moved if ground is None else _blend(moved[:, :3], moved[:, 3:], ground)
    return moved.expand(-1, 3, -1, -1)


def _as_sequence(images: Images) -> Sequence[Any]:
    return images if isinstance(images, (list, tuple)) else [images]


def _length(image: Any) -> int:
    return image.shape[0] if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4 else 1


def _one_to_tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        return _from_array(np.asarray(open_image(image)))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        pixels = image[None] if image.ndim == 3 else image
        return _check_pixels(pixels / 255.0 if pixels.dtype == torch.uint8 else pixels, "tensor")
    raise ImageError(f"expected PIL images, numpy arrays or tensors, got {type(image).__name__}")


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The only place that opens an image; whatever fails while it is open is an `ImageError` of it."""
    name = "" if isinstance(source, (bytes, Image.Image)) else f"{os.fspath(source)}: "
    try:
        if isinstance(source, Image.Image):
            yield source
        elif not isinstance(source, bytes) and user_path(source).exists() and not user_path(source).is_file():
            raise ImageError("it is no file")
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else user_path(source)) as image:
                yield image
    except Exception as error:
        # Pillow's decoders raise whatever a broken file leads them to: struct.error, IndexError, zlib.error and more.
        raise ImageError(f"{name}{_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that can be decoded"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} that are read"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read: {error.strerror}"
    return f"it cannot be decoded: {error or type(error).__name__}"


def _layer(image: Image.Image) -> Image.Image:
    """The present frame, upright, as RGB or, where it has any transparency, RGBA."""
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        layer = _eight_bits(image)
    else:
        layer = image.convert("RGBA" if image.has_transparency_data else "RGB")
    turn = _TURNS.get(_orientation(image))
    upright = layer if turn is None else layer.transpose(turn)
    # What was converted carries the metadata on, whose orientation would turn it again.
    upright.info = {}
    return upright


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers or floats, scaled by its depth."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("it holds NaN or Inf")
    black, white = min(float(values.min()), 0.0), _white(image, float(values.max()))
    grey = Image.fromarray(((values - black) / (white - black) * 255.0).round().clip(0.0, 255.0).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _white(image: Image.Image, highest: float) -> float:
    """The value that stands for white: that of the depth which the file states, else of the smallest that fits."""
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if hasattr(image, "tag_v2") else 16
        return float(2**bits - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        # Older versions of Pillow open their 16 bits in this mode.
        return 65535.0
    if image.mode == "F" and 1.0 < highest < 16.0:
        # Linear light with highlights beyond 1; by the scale of bytes it would be all but black.
        return highest
    depths = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in depths if highest <= white), highest)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself.
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1  # EXIF that cannot be read turns nothing, in viewers either.


def _over(layer: Image.Image, ground: Ground) -> Image.Image:
    if layer.mode == "RGB":
        return layer
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("RGB")


def _array_views(image: np.ndarray | Tensor) -> Iterator[View]:
    axis = -1 if isinstance(image, np.ndarray) else 0
    if image.ndim != 3 or image.shape[axis] != 4:
        yield View(image)
        return
    white = 255.0 if image.dtype in (np.uint8, torch.uint8) else 1.0
    scaled = image / white
    colour, alpha = (scaled[..., :3], scaled[..., 3:]) if axis == -1 else (scaled[:3], scaled[3:])
    lowest, highest = (float(alpha.min()), float(alpha.max())) if 0 not in alpha.shape else (1.0, 1.0)
    grounds: tuple[Ground | None, ...] = (None,) if lowest >= 1.0 or highest <= 0.0 else ("white", "black")
    for ground in grounds:
        yield View(_blend(colour, alpha, ground or "white"), ground=ground, empty=highest <= 0.0)


def _blend(colour: Any, alpha: Any, ground: Ground) -> Any:
    return colour * alpha + (1.0 - alpha) if ground == "white" else colour * alpha


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

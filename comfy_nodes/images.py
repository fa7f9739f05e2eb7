"""From ComfyUI's images `[B, H, W, C]` to the core's, scoring with a progress bar, and what the browser shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.v0_0_2 import ui
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, SafetyReport, join_reports, layer
from t2i_spo_plugin.images import channels_first, image_size, resize


BATCH = 8
NOT_SCORED = "not scored"
_FAINT = 0.05
"""Below this cost a map is all but clear."""
_MAP_SIZE = 512
"""Pixels along the longer side of a map in the browser, at most."""


def steps(total: int, size: int = 1, progress: ProgressBar | None = None) -> Iterator[slice]:
    """Slices of at most `size` that cover `total` images; one empty slice when there are none.

    Moves on the progress bar, its own unless it is one part of a longer one. Ends at once when the run is cancelled.
    """
    bar = progress or ProgressBar(total)
    for start in range(0, max(total, 1), size):
        throw_exception_if_processing_interrupted()
        part = slice(start, min(start + size, total))
        yield part
        bar.update(part.stop - part.start)


def score(guard: Guard, image: Tensor, progress: ProgressBar | None = None, in_views: bool = False) -> SafetyReport:
    """What `guard` says about every image of `image` `[B, H, W, C]`; of a transparent one, over white and black.

    With `in_views` it looks at each in the fixed views of evaluation.
    """
    pixels = channels_first(image, ground=None)
    return join_reports([guard(pixels[part], None, in_views) for part in steps(len(pixels), BATCH, progress)])


def report_of(safety: SafetyReport, image: Tensor) -> SafetyReport:
    """`safety` with its maps at the size of `image` `[B, H, W, C]`, which may have been enlarged since it was scored.

    Transparency is laid over the ground on which the image costs most.

    Raises:
        ConfigError: the report is of another number of images.
    """
    if len(safety.images) != len(image):
        raise ConfigError(
            f"the safety report is of {len(safety.images)} images and the image batch has {len(image)}; connect "
            "the images that were scored"
        )
    grounds = [view.ground if (view := safety.view(number)) is not None else None for number in range(len(image))]
    laid = [channels_first(one[None], ground or "white")[0] for one, ground in zip(image, grounds, strict=True)]
    return safety.with_images(laid)


def heat_map(safety: SafetyReport, number: int, category: str | None = None) -> Tensor:
    """Cost over an image `[H, W]`; 1 everywhere in one that was not scored, 0 where the cost model gives no map."""
    if safety.reasons[number] is not None:
        return safety.region(number).float()
    if not safety.has_map(number):
        return torch.zeros(image_size(safety.images[number]))
    return safety.heat_map(number, category)


def stacked(images: Sequence[Tensor], like: Tensor) -> Tensor:
    """Maps `[H, W]` of the images of `like` `[B, H, W, C]` as `[B, H, W]`, also when there are none."""
    return torch.stack(list(images)).to(like.device) if images else torch.zeros(like.shape[:3])


def grey(maps: Tensor) -> Tensor:
    """Maps `[B, H, W]` as grey images `[B, H, W, 3]`."""
    return maps[..., None].repeat(1, 1, 1, 3)


def previews(images: Tensor) -> list[Any]:
    """The images saved in ComfyUI's temporary folder, as its browser side names them."""
    if not len(images):
        return []
    seen = grey(images[..., 0]) if images.shape[-1] == 1 else images
    return list(ui.PreviewImage(seen).as_dict()["images"])


def payload(
    safety: SafetyReport,
    image: Tensor,
    threshold: float,
    progress: ProgressBar,
    category: str | None = None,
    colour_map: str = "heat",
) -> list[dict[str, Any]]:
    """What the widget shows of each image `[B, H, W, C]`: the image, costs, and maps to be laid over it.

    There is a map of each category that a glance could find in the image, and of the one that is asked for; there is
    none of an image that was not scored, nor from a cost model that gives none.
    """
    entries: list[dict[str, Any]] = []
    for part in steps(len(image), progress=progress):
        for number in range(len(image))[part]:
            asked, costs = category_of(safety, number, category), safety.category_costs[number]
            named = [name for name, cost in costs.items() if name == asked or cost >= _FAINT]
            named = named if safety.has_map(number) else []
            files = [_map_preview(safety.heat_map(number, name), colour_map) for name in named]
            entries.append(
                {
                    "image": previews(image[number : number + 1])[0],
                    "maps": dict(zip(named, files, strict=True)),
                    "cost": safety.cost_of(number, category),
                    "category": asked,
                    "categories": dict(costs),
                    "threshold": threshold,
                    "reason": safety.reasons[number],
                    "explanation": safety.explanation(number),
                }
            )
    return entries


def _map_preview(cost_map: Tensor, colour_map: str) -> Any:
    """A cost map as the browser lays it over the image; it is smooth, so that a small one does."""
    height, width = cost_map.shape
    scale = min(1.0, _MAP_SIZE / max(height, width))
    small = resize(cost_map[None, None], (max(1, round(scale * height)), max(1, round(scale * width))))[0, 0]
    return previews(layer(small, colour_map).movedim(0, -1)[None])[0]


def category_of(safety: SafetyReport, number: int, category: str | None = None) -> str:
    """The category asked for, or the one that decided; `not scored` where neither is known."""
    return NOT_SCORED if safety.reasons[number] is not None else category or safety.deciding(number) or NOT_SCORED

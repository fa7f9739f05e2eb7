"""Augmentations of pairs, on cached latents; both images of a pair are transformed alike.

`flip` mirrors, `shift` moves by one latent cell with the border repeated (both near the image's own augmentation, as
far as the autoencoder commutes with them), `noise` draws timestep and noise afresh. Colour, blur and JPEG would need
pixels, and can hide the harmful part; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Batch, Batches
from ..sampling import generator


Augmentation = Literal["flip", "shift", "noise"]


def augmented(name: Augmentation, batch: Batch, batches: Batches) -> Batch:
    """The batch in an augmentation; what is random depends on seed, step and position alone."""
    places = [("view", name, batch.step, position) for position in batch.positions]
    if name == "flip":
        return replace(batch, latents=batches.family.mirrored(batch.latents), weights=_moved(batch.weights, flip))
    if name == "shift":
        moves = [draw_shift(generator(batches.sampling.seed, *place)) for place in places]
        rows = [shift(batch.latents[:, number], *move) for number, move in enumerate(moves)]
        weights = _moved(
            batch.weights, lambda all_: torch.cat([shift(one[None], *to) for one, to in zip(all_, moves, strict=True)])
        )
        return replace(batch, latents=torch.stack(rows, 1), weights=weights)
    draws = [batches.draws(*place) for place in places]
    noise = torch.stack([one.noise for one in draws]).to(batch.noise.device)
    index = torch.tensor([one.index for one in draws]).to(batch.index.device)
    return replace(batch, noise=noise.expand_as(batch.noise), index=index.expand_as(batch.index))


def _moved(weights: Tensor | None, move: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Region weights follow what they weigh."""
    return None if weights is None else move(weights)


def flip(latents: Tensor) -> Tensor:
    """`[..., H, W]` mirrored left to right."""
    return latents.flip(-1)


def shift(latents: Tensor, dy: int, dx: int) -> Tensor:
    """`[B, C, H, W]` moved down by dy and right by dx cells, the border repeated."""
    height, width = latents.shape[-2:]
    pad = F.pad(latents, (abs(dx), abs(dx), abs(dy), abs(dy)), mode="replicate")
    top, left = abs(dy) - dy, abs(dx) - dx
    return pad[..., top : top + height, left : left + width]


def draw_shift(place: torch.Generator) -> tuple[int, int]:
    """One of the eight moves by one cell."""
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return steps[int(torch.randint(len(steps), (1,), generator=place))]

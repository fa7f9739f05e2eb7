"""Pictures for the judges of the sticker world: scenes, what a generator does to them, and the wear of the world."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..world import STYLES, Description, Kind, PlacedObject, Split, describe, render


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures ``[H, W, 3]`` as ``[B, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def draw(
    first_seed: int,
    count: int,
    split: Split = "train",
    kind: Kind = "any",
    styles: Sequence[str] = STYLES,
    concepts: Sequence[str] | None = None,
    n_objects: int | None = None,
) -> tuple[Tensor, list[Description], list[tuple[PlacedObject, ...]]]:
    """``count`` scenes: pictures ``[count, 3, 64, 64]`` in [0, 1], descriptions, objects. One in three is on the
    grid."""
    images, described, objects = [], [], []
    for seed in range(first_seed, first_seed + count):
        d = describe(seed, split, kind, concepts, styles, n_objects)
        image, placed = render(d, seed, aligned=seed % 3 == 0)
        images.append(image)
        described.append(d)
        objects.append(placed)
    return pixels(images), described, objects


def wear(x: Tensor, seed: int, strength: float = 1.0) -> Tensor:
    """Colour shifts, small turns and scalings, blur, noise, and a patch cut out, each on some of ``[B, 3, H, W]``."""
    rng = torch.Generator().manual_seed(seed)
    b, _, h, w = x.shape

    def some(share: float) -> Tensor:
        return (torch.rand(b, generator=rng) < share).view(b, 1, 1, 1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=rng)

    # Colour: gain and shift per channel, and a mixing matrix near the identity.
    mix = torch.eye(3) + 0.15 * strength * torch.randn(b, 3, 3, generator=rng)
    mixed = torch.einsum("bij,bjhw->bihw", mix, x) + 0.06 * strength * torch.randn(b, 3, 1, 1, generator=rng)
    x = torch.where(some(0.6), mixed, x).clamp(0, 1)
    # Place: mirror, turn up to 12 degrees, scale 0.85 to 1.15, a little stretch.
    angle = uniform(-0.2, 0.2, b) * strength
    sx, sy = uniform(0.87, 1.15, b), uniform(0.87, 1.15, b)
    flip = torch.where(torch.rand(b, generator=rng) < 0.3, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * sx * flip, -angle.sin() * sy
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * sx * flip, angle.cos() * sy
    theta[:, :, 2] = uniform(-0.06, 0.06, b, 2)
    grid = F.affine_grid(theta, [b, 3, h, w], align_corners=False)
    turned = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = torch.where(some(0.6), turned, x)
    # Optics: blur, noise.
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(some(0.3), blurred, x)
    x = torch.where(some(0.3), x + 0.06 * strength * torch.randn(x.shape, generator=rng), x)
    # Cut-out: one patch of the picture's own mean colour.
    random_places = random.Random(seed)
    for i in range(b):
        if random_places.random() < 0.15:
            top, left, side = (
                random_places.randrange(h - 10),
                random_places.randrange(w - 10),
                random_places.randint(6, 12),
            )
            x[i, :, top : top + side, left : left + side] = x[i].mean((1, 2), keepdim=True)
    return x.clamp(0, 1)


def ruin(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Spoil half of the pictures as a failed generator would: heavy blur, noise, melted patches, shuffled patches,
    half fades.

    Returns the pictures and which were spoilt, ``[B]`` bool. Used to teach judges that nothing is to be seen there.
    """
    rng = torch.Generator().manual_seed(seed)
    b, _, h, w = x.shape
    kind = torch.randint(0, 8, (b,), generator=rng)
    small = F.interpolate(F.adaptive_avg_pool2d(x, 7), (h, w), mode="bilinear", align_corners=False)
    noise = (0.5 * x + 0.5 * torch.rand(x.shape, generator=rng)).clamp(0, 1)
    cells = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(b, 64, 3, 8, 8)
    order = torch.rand(b, 64, generator=rng).argsort(1)
    shuffled = torch.gather(cells, 1, order[:, :, None, None, None].expand_as(cells))
    shuffled = shuffled.reshape(b, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h, w)
    melted = F.interpolate(F.avg_pool2d(x, 4), (h, w), mode="bilinear", align_corners=False)
    melted = (melted + 0.1 * F.interpolate(torch.randn(b, 3, 8, 8, generator=rng), (h, w), mode="bilinear")).clamp(
        0, 1
    )
    out = x.clone()
    for n, spoilt in enumerate((small, noise, shuffled, melted)):
        out = torch.where((kind == n).view(b, 1, 1, 1), spoilt, out)
    return out, kind < 4

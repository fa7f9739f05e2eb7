"""Images changed without changing what a person sees in them, and images in which nothing is left to be seen.

A judge that has met neither is fooled by both. `DISGUISES` keep what the image shows: harm under noise is harm.
`SPOILINGS` leave nothing that could be recognised. `MALFORMATIONS` lie between: one may guess what was meant, but it
is no good image of it, so quality is low, and judges of safety learn nothing from them. Each is a pure function of its
arguments; images are float tensors `[3, H, W]` in [0, 1], masks `[M, H, W]` move with what they cover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import BACKGROUNDS


COLOUR_DEFINED = frozenset({"drop of blood", "droplet"})
"""Concepts that only their colour tells from their twin: they have no grey disguise, nor one in other hues."""


@dataclass(frozen=True)
class Layers:
    """An image, the masks of what it shows, and another scene that may be used as cover.

    Attributes:
        image: `[3, H, W]` in [0, 1].
        masks: `[M, H, W]` in [0, 1].
        cover: `[3, H, W]`: for a harmful image its safe counterpart, else another safe scene.
    """

    image: Tensor
    masks: Tensor
    cover: Tensor


Disguise = Callable[[Layers, torch.Generator], tuple[Tensor, Tensor]]


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def noise(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of every pixel is noise."""
    return (x.image + torch.rand(x.image.shape, generator=rng)) / 2, x.masks


def black_frame(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The image at 3/4 of its size on black."""
    return _placed(x, torch.zeros_like(x.image), 0.75, 0.5, 0.5)


def upside_down(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turned by 180 degrees."""
    return x.image.flip(1, 2), x.masks.flip(1, 2)


def turned(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turned by 90 degrees, to either side."""
    quarter = 1 if float(torch.rand((), generator=rng)) < 0.5 else 3
    return x.image.rot90(quarter, (1, 2)), x.masks.rot90(quarter, (1, 2))


def low_contrast(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quarter of the contrast, around a light, middle or dark grey."""
    middle = _uniform(rng, 0.3, 0.7)
    return middle + (x.image - 0.5) * 0.25, x.masks


def lines(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight straight lines of random colours over the image, each 1/40 of the side wide."""
    side = x.image.shape[-1]
    across, down = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    out = x.image.clone()
    for _ in range(8):
        angle, middle = torch.rand(2, generator=rng) * torch.tensor([torch.pi, 1.0])
        distance = across * angle.cos() + down * angle.sin()
        place = distance.min() + middle * (distance.max() - distance.min())
        colour = torch.rand(3, 1, 1, generator=rng)
        out = torch.where((distance - place).abs() < side / 80, colour, out)
    return out, x.masks


def grey(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Luminance alone; not for what its colour defines."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (x.image * weights).sum(0, keepdim=True).expand(3, -1, -1), x.masks


def translucent(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half transparent over the cover."""
    return (x.image + x.cover) / 2, x.masks


def inset(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A third of the width, somewhere in the cover."""
    return _placed(x, x.cover, 1 / 3, _uniform(rng, 0, 1), _uniform(rng, 0, 1))


def mirrored(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Left and right exchanged."""
    return x.image.flip(2), x.masks.flip(2)


def tinted(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Under a sheet of one colour that lets half through; not for what its colour defines."""
    return (x.image + torch.rand(3, 1, 1, generator=rng)) / 2, x.masks


def negative(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every colour its opposite; not for what its colour defines."""
    return 1 - x.image, x.masks


def mosaic(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares of 1/32 of the side, each of one colour."""
    side = x.image.shape[-1]
    small = F.adaptive_avg_pool2d(x.image[None], 32)
    return F.interpolate(small, (side, side), mode="nearest")[0], x.masks


def chequered(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every fourth square of 1/16 of the side hidden, in a pattern."""
    side, cell = x.image.shape[-1], x.image.shape[-1] // 16
    across, down = torch.meshgrid(torch.arange(side) // cell, torch.arange(side) // cell, indexing="xy")
    hidden = (across % 2 == 0) & (down % 2 == 0)
    return torch.where(hidden, torch.rand(3, 1, 1, generator=rng), x.image), x.masks


def halves_exchanged(x: Layers, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The left half to the right of the right one."""
    half = x.image.shape[-1] // 2
    return x.image.roll(half, 2), x.masks.roll(half, 2)


STATED: dict[str, Disguise] = {
    "50 % noise": noise,
    "black frame": black_frame,
    "upside down": upside_down,
    "turned by 90 degrees": turned,
    "low contrast": low_contrast,
    "lines": lines,
    "grey": grey,
    "half transparent over its twin": translucent,
    "inset of a third": inset,
}
"""The disguises that the definition of the score names."""
DISGUISES: dict[str, Disguise] = STATED | {
    "mirrored": mirrored,
    "tinted": tinted,
    "negative": negative,
    "mosaic": mosaic,
    "chequered": chequered,
    "halves exchanged": halves_exchanged,
}
OTHER_HUES = frozenset({"grey", "tinted", "negative"})
"""Disguises that are none for the concepts of `COLOUR_DEFINED`."""


def disguises_for(concepts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the disguises under which a scene of these concepts still shows what it shows."""
    return tuple(n for n in DISGUISES if n not in OTHER_HUES or not COLOUR_DEFINED & set(concepts))


def heavy_blur(image: Tensor, rng: torch.Generator) -> Tensor:
    """Averages of squares of 1/6 of the side, joined smoothly."""
    return _enlarged(F.adaptive_avg_pool2d(image[None], 6), image)


def pure_noise(image: Tensor, rng: torch.Generator) -> Tensor:
    """Nine tenths or more of every pixel are noise."""
    share = _uniform(rng, 0.92, 1.0)
    return (1 - share) * image + share * torch.rand(image.shape, generator=rng)


def shuffled(image: Tensor, rng: torch.Generator) -> Tensor:
    """Squares of 1/16 of the side in another order."""
    side, cell = image.shape[-1], image.shape[-1] // 16
    cells = image.unfold(1, cell, cell).unfold(2, cell, cell).reshape(3, 256, cell, cell)
    cells = cells[:, torch.rand(256, generator=rng).argsort()].view(3, 16, 16, cell, cell)
    return cells.permute(0, 1, 3, 2, 4).reshape(3, side, side)


def melted(image: Tensor, rng: torch.Generator) -> Tensor:
    """Blurred blobs of the image's colours with others mixed in: what a generator that has failed draws."""
    blobs = F.adaptive_avg_pool2d(image[None], 8)
    blobs = blobs.flatten(2)[:, :, torch.rand(64, generator=rng).argsort()].view_as(blobs)
    blobs = blobs + 0.15 * torch.randn(blobs.shape, generator=rng)
    return _enlarged(blobs, image).clamp(0, 1)


def smeared(image: Tensor, rng: torch.Generator) -> Tensor:
    """Drawn out over half of the side, along or across."""
    length = image.shape[-1] // 2 + 1
    turned_image = image if float(torch.rand((), generator=rng)) < 0.5 else image.rot90(1, (1, 2))
    padded = F.pad(turned_image[None], (length // 2, length // 2, 0, 0), mode="replicate")
    return F.avg_pool2d(padded, (1, length), 1)[0, :, :, : image.shape[-1]]


SPOILINGS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "heavy blur": heavy_blur,
    "noise": pure_noise,
    "shuffled": shuffled,
    "melted": melted,
    "smeared": smeared,
}
"""What leaves nothing to be recognised: such an image is unreadable."""


def doubled(x: Layers, rng: torch.Generator) -> Tensor:
    """Laid over itself, shifted, and over the cover: two things in one place."""
    side = x.image.shape[-1]
    down, across = torch.randint(side // 12, side // 5, (2,), generator=rng).tolist()
    return 0.4 * x.image + 0.3 * x.image.roll((down, across), (1, 2)) + 0.3 * x.cover


def half_drawn(x: Layers, rng: torch.Generator) -> Tensor:
    """Half of every object is lost in the background, from one side."""
    ground = x.image.flatten(1).median(1).values[:, None, None]
    out, side = x.image.clone(), x.image.shape[-1]
    for mask in x.masks:
        places = (mask > 0.5).nonzero()
        if len(places) == 0:
            continue
        axis, far = torch.randint(2, (2,), generator=rng).tolist()
        middle = float(places[:, axis].float().median())
        ramp = ((torch.arange(side) - middle) / 3 * (1 if far else -1)).sigmoid()
        lost = F.max_pool2d(mask[None], 9, 1, 4)[0] * (ramp[:, None] if axis == 0 else ramp[None])
        out = out * (1 - lost) + ground * lost
    return out


def warped(x: Layers, rng: torch.Generator) -> Tensor:
    """Pulled out of shape by up to a sixth of the side, differently everywhere."""
    flow = 0.16 * torch.randn(1, 2, 6, 6, generator=rng)
    flow = F.interpolate(flow, x.image.shape[-2:], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, *x.image.shape], align_corners=False)
    return F.grid_sample(x.image[None], grid + flow, padding_mode="border", align_corners=False)[0]


def blotted(x: Layers, rng: torch.Generator) -> Tensor:
    """Drawn in blots of the right colours: a person sees that something is there, and hardly what."""
    cells = int(torch.randint(9, 13, (), generator=rng))
    return _enlarged(F.adaptive_avg_pool2d(x.image[None], cells), x.image)


MALFORMATIONS: dict[str, Callable[[Layers, torch.Generator], Tensor]] = {
    "doubled": doubled,
    "half drawn": half_drawn,
    "warped": warped,
    "blotted": blotted,
}
"""How a poor generator draws what it is asked for."""


def blank(side: int, rng: torch.Generator) -> Tensor:
    """Nothing at all `[3, side, side]`: a background of the world, black, white, any colour, or a soft gradient."""
    kind = int(torch.randint(4, (), generator=rng))
    grounds = list(BACKGROUNDS.values())
    colour = torch.tensor(grounds[int(torch.randint(len(grounds), (), generator=rng))]).float() / 255
    if kind == 1:
        colour = torch.rand((), generator=rng).round().expand(3)
    elif kind > 1:
        colour = torch.rand(3, generator=rng)
    image = colour[:, None, None].expand(3, side, side)
    if kind == 3:
        slope = torch.linspace(-0.2, 0.2, side).view(1, 1, side) * torch.randn(3, 1, 1, generator=rng).clamp(-1, 1)
        slope = slope if float(torch.rand((), generator=rng)) < 0.5 else slope.transpose(1, 2)
        image = image * 0.6 + 0.2 + slope
    return image.clamp(0, 1).contiguous()


def _enlarged(small: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(small, image.shape[-2:], mode="bicubic", align_corners=False)[0].clamp(0, 1)


def _placed(x: Layers, ground: Tensor, share: float, across: float, down: float) -> tuple[Tensor, Tensor]:
    """Image and masks at `share` of their size on `ground`; `across` and `down` say where, from 0 to 1."""
    side = x.image.shape[-1]
    small = round(side * share)
    left, top = round((side - small) * across), round((side - small) * down)
    shrunk = F.interpolate(
        torch.cat([x.image, x.masks])[None], (small, small), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    image, masks = ground.clone(), torch.zeros_like(x.masks)
    image[:, top : top + small, left : left + small] = shrunk[:3]
    masks[:, top : top + small, left : left + small] = shrunk[3:]
    return image, masks

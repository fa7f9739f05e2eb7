"""Images for the judges of the sticker world: scenes with exact masks and true labels, disguised, spoilt, worn."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from ..disguises import DISGUISES, MALFORMATIONS, SPOILINGS, Layers, blank, disguises_for
from ..world import (
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    SIZE,
    STYLES,
    Description,
    PlacedObject,
    Split,
    describe,
    render,
)
from .store import rendered


NAMES = tuple(CONCEPTS)
OBJECTS = 2
"""At most as many objects stand in a scene."""


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images `[H, W, 3]` as `[B, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def truth_of(described: Sequence[Description]) -> Tensor:
    """Which concepts of `NAMES` each scene shows: `[B, N]` of 0 and 1."""
    out = torch.zeros(len(described), len(NAMES))
    for i, d in enumerate(described):
        for name in d.concepts:
            out[i, NAMES.index(name)] = 1
    return out


@dataclass(frozen=True)
class Judged:
    """Images whose truth is known.

    Attributes:
        images: `[B, 3, S, S]` in [0, 1].
        masks: `[B, N, s, s]` in [0, 1], the share of each cell that concept n of `NAMES` covers; zero where spoilt.
        truth: `[B, N]` of 0 and 1, zero where spoilt or blank.
        readable: bool `[B]`: something can be recognised.
        described: what each scene shows, before it was spoilt.
    """

    images: Tensor
    masks: Tensor
    truth: Tensor
    readable: Tensor
    described: list[Description]

    def to(self, device: torch.device | str) -> Judged:
        """The same with its tensors on `device`."""
        moved = {k: getattr(self, k).to(device) for k in ("images", "masks", "truth", "readable")}
        return replace(self, **moved)


def scene_and_cover(seed: int, split: Split = "train") -> tuple[Description, Description]:
    """A scene for the judges, two in three of what the generator draws, and a safe one to hide it in.

    The cover of an unsafe scene is the scene with the twin in its place where the style draws the twin.
    """
    declared = seed % 3 > 0
    concepts = GENERATOR_CONCEPTS if declared else None
    d = describe(seed, split, "any", concepts, GENERATOR_STYLES if declared and seed % 2 else STYLES)
    twins = [CONCEPTS[n].twin or n for n in d.concepts]
    if d.unsafe and all(d.style in CONCEPTS[n].styles for n in twins):
        return d, replace(d, concepts=tuple(twins), words=tuple(twins))
    return d, describe(seed + 500_000_000, split, "benign", concepts, (d.style,))


def render_with_masks(d: Description, seed: int) -> np.ndarray:
    """uint8 `[SIZE, SIZE, 4]`: the image, and 1 or 2 where the first or second object covers it.

    One in three is on the grid; the stickers of half of them are drawn in a style that no picture set has.
    """
    image, objects = render(d, seed, aligned=seed % 3 == 0, restyle=restyle if seed // 3 % 2 else None)
    covered = np.zeros(image.shape[:2], np.uint8)
    for n, thing in enumerate(objects):
        covered[thing.mask] = n + 1
    return np.concatenate([image, covered[..., None]], -1)


def judged_pair(seed: int) -> np.ndarray:
    """uint8 `[2, SIZE, SIZE, 4]`: a training scene and its cover, see `render_with_masks`."""
    return np.stack([render_with_masks(d, seed) for d in scene_and_cover(seed)])


class JudgedScenes:
    """Training scenes of the judges, rendered once into the file `path`; a batch is a pure function of its number.

    Of the images a share `disguised` is changed so that it still shows what it shows, `spoilt` so that nothing can be
    recognised, `malformed` as a poor generator draws, and `empty` are blank; the last three are not `readable`.
    Every third row shows the cover of the row before it, so that twins stand beside what they replace.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        first_seed: int = 0,
        jobs: int = 1,
        disguised: float = 0.4,
        spoilt: float = 0.1,
        empty: float = 0.03,
        malformed: float = 0.0,
    ) -> None:
        self.images = rendered(path, judged_pair, first_seed, count, jobs)
        self.described = [scene_and_cover(seed) for seed in range(first_seed, first_seed + count)]
        self.shares = (disguised, spoilt, malformed, empty)

    def batch(self, number: int, size: int, cells: int, worn: float = 1.0) -> Judged:
        """Batch `number` of `size` images with masks of `cells` x `cells`, worn with that strength."""
        rng = torch.Generator().manual_seed(number)
        kinds = ["disguised", "spoilt", "malformed", "empty", "as it is"]
        shares = torch.tensor([*self.shares, 1 - sum(self.shares)])
        drawn = torch.multinomial(shares, size, replacement=True, generator=rng).tolist()
        index = torch.randint(len(self.images), (size,), generator=rng).tolist()
        images, masks, described = [], [], []
        readable = torch.ones(size, dtype=torch.bool)
        for row, i in enumerate(index):
            side = int(row % 3 == 2)
            i = index[row - side]
            pair = self.images[i].permute(0, 3, 1, 2)
            d, x = self.described[i][side], pair[side, :3].float() / 255
            m = torch.stack([(pair[side, 3] == n + 1).float() for n in range(OBJECTS)])
            kind, cover = kinds[drawn[row]], pair[1, :3].float() / 255 if side == 0 else blank(SIZE, rng)
            if kind == "disguised":
                x, m = DISGUISES[_one_of(disguises_for(d.concepts), rng)](Layers(x, m, cover), rng)
            elif kind == "spoilt":
                x = SPOILINGS[_one_of(tuple(SPOILINGS), rng)](x, rng)
            elif kind == "malformed":
                x = MALFORMATIONS[_one_of(tuple(MALFORMATIONS), rng)](Layers(x, m, cover), rng)
            elif kind == "empty":
                x = blank(SIZE, rng)
            if kind in ("spoilt", "malformed", "empty"):
                m, readable[row] = torch.zeros_like(m), False
            images.append(x)
            masks.append(m)
            described.append(d)
        x, m = wear(torch.stack(images), torch.stack(masks), number, worn)
        return Judged(x, by_concept(m, described, cells), truth_of(described) * readable[:, None], readable, described)


@torch.no_grad()
def through_autoencoder(
    vae: AutoencoderTiny, images: Tensor, number: int, weakest: float = 0.0, strongest: float = 0.4
) -> Tensor:
    """What the autoencoder makes of images `[B, 3, S, S]` in [0, 1] when their latents are jittered.

    The jitter of each image is between `weakest` and `strongest` of the latents' spread. Up to 0.4 the flaws are a
    good generator's, from about 1 on a poor one's: the image melts.
    """
    rng = torch.Generator().manual_seed(number)
    latents = vae.encoder(images * 2 - 1).float()
    strength = weakest + (strongest - weakest) * torch.rand(len(images), 1, 1, 1, generator=rng)
    noise = torch.randn(latents.shape, generator=rng) * strength * float(latents.std())
    return (vae.decoder(latents + noise.to(latents.device)).float() / 2 + 0.5).clamp(0, 1)


def _one_of(names: tuple[str, ...], rng: torch.Generator) -> str:
    return names[int(torch.randint(len(names), (), generator=rng))]


def by_concept(masks: Tensor, described: Sequence[Description], cells: int) -> Tensor:
    """Masks of objects `[B, M, S, S]` as shares of cells `[B, N, cells, cells]` by concept."""
    small = F.adaptive_avg_pool2d(masks, cells)
    out = small.new_zeros(len(described), len(NAMES), cells, cells)
    for i, d in enumerate(described):
        for n, name in enumerate(d.concepts):
            k = NAMES.index(name)
            out[i, k] = torch.maximum(out[i, k], small[i, n])
    return out


def draw(
    first_seed: int,
    count: int,
    split: Split = "test",
    kind: str = "any",
    styles: Sequence[str] | None = None,
    concepts: Sequence[str] | None = None,
    aligned: bool | None = None,
) -> tuple[Tensor, list[Description], list[tuple[PlacedObject, ...]]]:
    """`count` scenes as they are: images `[count, 3, SIZE, SIZE]` in [0, 1], descriptions, objects.

    `aligned` None puts one in three on the grid.
    """
    images, described, objects = [], [], []
    for seed in range(first_seed, first_seed + count):
        d = describe(seed, split, kind, concepts, styles or GENERATOR_STYLES)  # type: ignore[arg-type]
        image, placed = render(d, seed, aligned=seed % 3 == 0 if aligned is None else aligned)
        images.append(image)
        described.append(d)
        objects.append(placed)
    return pixels(images), described, objects


def twins_of(described: Sequence[Description]) -> Tensor:
    """What each harmful scene is hidden in when judges are measured: the same with the twin in its place."""
    covers = [replace(d, concepts=d.safe_concepts[0], words=d.safe_concepts[0]) for d in described]
    return pixels([render(d, d.seed, aligned=True)[0] for d in covers])


def restyle(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Another drawing of a sticker `[s, s, 4]`: turned, mirrored, stretched, in other colours, flat or soft.

    Hues move by at most 25 degrees: a drop of blood stays one, and a droplet too.
    """
    side = len(pixels)
    if rng.random() < 0.7:
        angle = math.radians(rng.gauss(0, 25))
        across, down = rng.uniform(0.9, 1.3) * rng.choice((1, 1, -1)), rng.uniform(0.9, 1.3)
        shear = rng.gauss(0, 0.1)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = turn @ np.array([[across, shear], [0, down]])
        middle = (side - 1) / 2 * (np.ones(2) - matrix @ np.ones(2))
        # Four bands that mean nothing to the library, since the colours are premultiplied.
        bands = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8), mode="CMYK")
        data = (*matrix[0], middle[0], *matrix[1], middle[1])
        moved = bands.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        pixels = np.asarray(moved, np.float32) / 255
    alpha, colour = pixels[..., 3:], pixels[..., :3]
    if rng.random() < 0.7:
        colour = colour @ _hue_and_saturation(rng.gauss(0, 12), rng.uniform(0.25, 1.4)).T
    if rng.random() < 0.6:
        gain = np.array([rng.uniform(0.75, 1.2)] * 3) * [rng.uniform(0.85, 1.15) for _ in range(3)]
        contrast, shift = rng.uniform(0.6, 1.4), rng.gauss(0, 0.06)
        colour = ((colour * gain - alpha / 2) * contrast + alpha * (0.5 + shift)).astype(np.float32)
    if rng.random() < 0.25:
        levels = rng.randint(2, 5)
        flat = colour / np.maximum(alpha, 1e-3)
        colour = np.round(flat * levels) / levels * alpha
    return np.concatenate([np.clip(colour, 0, alpha), alpha], -1).astype(np.float32)


def _hue_and_saturation(degrees: float, saturation: float) -> np.ndarray:
    """The 3 x 3 matrix that turns colours around the grey axis by at most 25 degrees and scales their distance from
    it."""
    angle = math.radians(max(-25.0, min(25.0, degrees)))
    third, root = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    near, after, before = math.cos(angle) + third, third - root, third + root
    turn = np.array([[near, after, before], [before, near, after], [after, before, near]])
    grey = np.tile(np.array([0.299, 0.587, 0.114]), (3, 1))
    return ((1 - saturation) * grey + saturation * np.eye(3)) @ turn


def wear(x: Tensor, masks: Tensor, seed: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Colour shifts, small turns and scalings, blur, noise, and a patch cut out, each on some of `[B, 3, H, W]`.

    `masks` `[B, M, H, W]` are turned and scaled as the images are.
    """
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
    chosen = some(0.6)
    still = torch.eye(2, 3).expand(b, 2, 3)
    grid = F.affine_grid(torch.where(chosen[:, 0], theta, still), [b, 3, h, w], align_corners=False)
    x = torch.where(chosen, F.grid_sample(x, grid, padding_mode="border", align_corners=False), x)
    masks = torch.where(chosen, F.grid_sample(masks, grid, align_corners=False), masks)
    # Optics: blur, noise.
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(some(0.3), blurred, x)
    x = torch.where(some(0.3), x + 0.06 * strength * torch.randn(x.shape, generator=rng), x)
    # Cut-out: one patch of the image's own mean colour.
    places = random.Random(seed)
    for i in range(b):
        if places.random() < 0.15:
            side = places.randint(h // 10, h // 5)
            top, left = places.randrange(h - side), places.randrange(w - side)
            x[i, :, top : top + side, left : left + side] = x[i].mean((1, 2), keepdim=True)
    return x.clamp(0, 1), masks

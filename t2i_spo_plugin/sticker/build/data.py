"""Pictures for the judges of the sticker world: scenes, what a generator does to them, and the wear of the world."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..world import (
    BACKGROUNDS,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    STYLES,
    Description,
    Kind,
    PlacedObject,
    Split,
    describe,
    render,
)


NAMES = tuple(CONCEPTS)


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures ``[H, W, 3]`` as ``[B, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def truth_of(described: Sequence[Description]) -> Tensor:
    """Which concepts of ``NAMES`` each scene shows: ``[B, N]`` of 0 and 1."""
    out = torch.zeros(len(described), len(NAMES))
    for i, d in enumerate(described):
        for name in d.concepts:
            out[i, NAMES.index(name)] = 1
    return out


def draw(
    first_seed: int,
    count: int,
    split: Split = "train",
    kind: Kind = "any",
    styles: Sequence[str] = STYLES,
    concepts: Sequence[str] | None = None,
    n_objects: int | None = None,
    restyled: bool = False,
) -> tuple[Tensor, list[Description], list[tuple[PlacedObject, ...]]]:
    """``count`` scenes: pictures ``[count, 3, 64, 64]`` in [0, 1], descriptions, objects. One in three is on the
    grid; with ``restyled`` the stickers of half of them are drawn in a style that no picture set has."""
    images, described, objects = [], [], []
    for seed in range(first_seed, first_seed + count):
        d = describe(seed, split, kind, concepts, styles, n_objects)
        image, placed = render(d, seed, aligned=seed % 3 == 0, restyle=restyle if restyled and seed % 2 else None)
        images.append(image)
        described.append(d)
        objects.append(placed)
    return pixels(images), described, objects


def restyle(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Another drawing of a sticker ``[s, s, 4]``: turned, mirrored, stretched, in other colours, flat or soft.

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


def flat(count: int, seed: int, size: int = 64) -> Tensor:
    """Pictures of nothing, ``[count, 3, size, size]``: black, white, one colour, a gradient, rough paper."""
    rng = torch.Generator().manual_seed(seed)

    def some(share: float) -> Tensor:
        return (torch.rand(count, generator=rng) < share).view(-1, 1, 1, 1)

    grounds = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    colour = torch.rand(count, 3, 1, 1, generator=rng)
    named = grounds[torch.randint(len(grounds), (count,), generator=rng)].view(-1, 3, 1, 1)
    colour = torch.where(some(0.4), named, colour)
    colour = torch.where(some(0.25), torch.rand(count, 1, 1, 1, generator=rng).round(), colour)
    across = (torch.linspace(-0.3, 0.3, size) * torch.randn(count, 3, 1, 1, generator=rng)).expand(-1, -1, size, -1)
    gradient = torch.where(some(0.5), across, across.transpose(2, 3))
    x = torch.where(some(0.3), colour + gradient, colour.expand(-1, -1, size, size))
    return torch.where(some(0.3), x + 0.02 * torch.randn(x.shape, generator=rng), x).clamp(0, 1)


def ruin(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Spoil half of the pictures as a failed generator would: heavy blur, noise, melted patches, shuffled patches,
    nothing at all.

    Returns the pictures and which were spoilt, ``[B]`` bool. Used to teach judges that nothing is to be seen there.
    """
    rng = torch.Generator().manual_seed(seed)
    b, _, h, w = x.shape
    kind = torch.randint(0, 10, (b,), generator=rng)
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
    for n, spoilt in enumerate((small, noise, shuffled, melted, flat(b, seed, h))):
        out = torch.where((kind == n).view(b, 1, 1, 1), spoilt, out)
    return out, kind < 5


def redrawn(count: int, out: Path) -> tuple[Tensor, list[Description]]:
    """``count`` training scenes as the generator draws them when it starts from the scene itself, noised; in ``out``.

    What a picture shows is then still known, and it has the generator's own flaws, which are what the cost model will
    meet.
    """
    described = [describe(160_000_000 + n, "train", "any", GENERATOR_CONCEPTS, GENERATOR_STYLES) for n in range(count)]
    stored = load_file(out)["pictures"][:count] if out.is_file() else torch.empty(0)
    if len(stored) < count:
        from diffusers import StableDiffusionImg2ImgPipeline

        from .. import load_pipeline

        pipe = StableDiffusionImg2ImgPipeline(**load_pipeline().components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pictures = []
        for start in tqdm(range(0, count, 16), desc="redraw", mininterval=10):
            part = described[start : start + 16]
            x = pixels([render(d, d.seed, aligned=True)[0] for d in part])
            pictures.append(
                pipe(
                    [d.caption for d in part],
                    image=x,
                    # From worn edges to another drawing of the same thing.
                    strength=(0.4, 0.55, 0.7)[start // 16 % 3],
                    num_inference_steps=20,
                    guidance_scale=2.0,
                    generator=[torch.Generator().manual_seed(d.seed) for d in part],
                    output_type="pt",
                ).images
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        stored = (torch.cat(pictures) * 255).round().byte()
        save_file({"pictures": stored}, out)
    return stored.float() / 255, described

"""What a training step draws, as functions of seed, step and position: nothing is remembered between steps.

A run that is killed and resumed, split into other micro-batches or spread over other ranks sees the same pairs with
the same noise, since every sample has a generator of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


SampleIndex = Callable[[int, int, torch.Generator], int]
"""Gives an index of [low, high)."""


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A generator that belongs to `seed` and a place such as ("sample", step, position)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def uniform_index(low: int, high: int, place: torch.Generator) -> int:
    """Each index of [low, high) equally often."""
    return int(torch.randint(low, high, (1,), generator=place))


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise `[C, h, w]` that a pipeline in float32 begins with for `torch.Generator("cpu").manual_seed(seed)`."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def spread_index(normal: bool, shift: float) -> SampleIndex:
    """A distribution over [low, high): of u in (0, 1) uniform or logit-normal, as `shift u / (1 + (shift - 1) u)`.

    A shift above 1 moves it towards noise, as schedulers do for large images.
    """

    def sample(low: int, high: int, place: torch.Generator) -> int:
        u = float(torch.randn(1, generator=place).sigmoid() if normal else torch.rand(1, generator=place))
        return min(high - 1, low + int(shift * u / (1.0 + (shift - 1.0) * u) * (high - low)))

    return sample


def few_index(values: Sequence[int]) -> SampleIndex:
    """Each of a few indices equally often, whatever the range."""

    def sample(low: int, high: int, place: torch.Generator) -> int:
        return values[int(torch.randint(len(values), (1,), generator=place))]

    return sample


@dataclass(frozen=True)
class Draw:
    """The random part of one example in one step; its images share it, but for the autoencoder's noise.

    Attributes:
        index: timestep index of the first image, and of all where they share it.
        noise: `[C, h, w]`.
        posterior: `[S, C, h, w]`, the autoencoder's noise for each image.
        drop_caption: whether the prompt is empty.
        mirror: whether the images are mirrored.
    """

    index: int
    noise: Tensor
    posterior: Tensor
    drop_caption: bool
    mirror: bool
    others: tuple[int, ...] = ()
    """Timestep indices of the further images, where each has one of its own."""


def draw(
    place: torch.Generator,
    shape: Sequence[int],
    t_range: tuple[int, int],
    caption_dropout: float = 0.0,
    random_flip: bool = False,
    images: int = 2,
    sample_index: SampleIndex = uniform_index,
    independent: bool = False,
) -> Draw:
    """Draw for one example of `images` images; the order of the draws does not depend on the options.

    Args:
        place: the generator of the example's place.
        shape: `[C, h, w]` of the latents.
        t_range: indices are from [low, high).
        caption_dropout: probability of the empty prompt.
        random_flip: mirror half of the time.
        images: of the example.
        sample_index: the distribution of the index.
        independent: each image has a timestep of its own (DUO's way).
    """
    index = sample_index(*t_range, place)
    chances = torch.rand(2, generator=place)
    noise = torch.randn(tuple(shape), generator=place)
    # Two at least, so that a single image has the noise of a pair's winner.
    posterior = torch.randn((max(2, images), *shape), generator=place)
    others = tuple(sample_index(*t_range, place) for _ in range(images - 1)) if independent else ()
    mirror = bool(random_flip and chances[1] < 0.5)
    return Draw(index, noise, posterior, bool(chances[0] < caption_dropout), mirror, others)


class Order:
    """Which example stands at which position of an endless stream: one permutation after another.

    Args:
        benign: `[N]` bool.
        seed: of the permutations.
        share: share of benign positions, spread evenly; None leaves the examples as they are. Two streams are then
            walked, each by permutations of its own.

    Raises:
        ValueError: nothing to draw from.
    """

    def __init__(self, benign: Tensor, seed: int, share: float | None = None) -> None:
        self.seed, self.share = seed, share
        if share is None:
            self._streams = [torch.arange(len(benign))]
        else:
            self._streams = [(~benign).nonzero()[:, 0], benign.nonzero()[:, 0]]
        needed = [True] if share is None else [share < 1.0, share > 0.0]
        for stream, is_needed in zip(self._streams, needed, strict=True):
            if is_needed and not len(stream):
                raise ValueError("benign_share asks for a kind of pair that does not occur among those trained on")
        self._permutation = lru_cache(maxsize=8)(self._permuted)

    def at(self, position: int) -> tuple[int, int]:
        """The example at `position` and how many times its stream was walked through before."""
        if self.share is None:
            return self._pick(0, position)
        before, after = int(position * self.share), int((position + 1) * self.share)
        return self._pick(1, before) if after > before else self._pick(0, position - before)

    def _pick(self, stream: int, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self._streams[stream]))
        return int(self._permutation(stream, epoch)[place]), epoch

    def _permuted(self, stream: int, epoch: int) -> Tensor:
        members = self._streams[stream]
        return members[torch.randperm(len(members), generator=generator(self.seed, "order", stream, epoch))]


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The factor on the learning rate at `step`, counted from 0: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(done * torch.pi, dtype=torch.float64))))
    return 1.0

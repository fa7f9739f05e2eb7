"""Micro-batches, drawn from the caches by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Conditioning, Family
from ..sampling import Draw, Order, SampleIndex, draw, few_index, generator, initial_noise, spread_index
from .caches import MIRRORED, ShardStore, posterior_sample
from .dataset import Examples
from .regions import Regions, region_weights


@dataclass(frozen=True)
class Batch:
    """B examples of S images each, on the device, in one optimiser step.

    Attributes:
        latents: `[S, B, C, h, w]`, as the denoiser sees them; of a pair the winner is first.
        noise: `[S, B, C, h, w]`.
        index: `[S, B]`, into the noise schedule.
        text: of each example, `[B, ...]`.
        columns: `[B]` or `[B, S]` by name, as in `Examples`.
        step: the optimiser step.
        positions: B places in the endless stream of examples.
        examples: B numbers of examples.
        slots: B numbers of the stored draws that noise and index are from; 0 without them.
        weights: `[B, 1, h, w]`, how much each place counts in the errors, 1 on average; None where all count alike.
    """

    latents: Tensor
    noise: Tensor
    index: Tensor
    text: Conditioning
    columns: dict[str, Tensor]
    step: int
    positions: tuple[int, ...]
    examples: tuple[int, ...]
    slots: tuple[int, ...]
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Sampling:
    """How examples are drawn; see `TrainConfig` for what each option is."""

    seed: int
    t_range: tuple[int, int]
    benign_share: float | None = None
    caption_dropout: float = 0.0
    random_flip: bool = False
    pixel_flip: bool = False
    draws_per_pair: int = 0
    drawn_noise: bool = False
    independent_timesteps: bool = False
    timesteps: str = "family"
    timestep_shift: float = 1.0
    timestep_values: tuple[int, ...] = ()

    def sample_index(self, family: Family) -> SampleIndex:
        """The distribution of timesteps."""
        if self.timestep_values:
            return few_index(self.timestep_values)
        if self.timesteps == "family":
            return family.sample_index
        return spread_index(self.timesteps == "logit-normal", self.timestep_shift)


class Batches:
    """Makes micro-batches from positions of the endless stream of examples. Its only state are the caches.

    Args:
        sampling: how examples are drawn.
        examples: what is trained on.
        latents: of every image.
        text: of every caption, and of the empty one.
        family: of the denoiser.
        device: where batches are.
        regions: cost maps by which places of an image are weighed; None weighs all alike.
    """

    def __init__(
        self,
        sampling: Sampling,
        examples: Examples,
        latents: ShardStore,
        text: ShardStore,
        family: Family,
        device: torch.device,
        regions: Regions | None = None,
    ) -> None:
        self.sampling, self.examples, self.family, self.device = sampling, examples, family, device
        self.latents, self.text, self.regions = latents, text, regions
        self._sample_index = sampling.sample_index(family)
        self.order = Order(examples.columns["benign"], sampling.seed, sampling.benign_share)
        own = latents.get([examples.images[0][0]])["mean"]
        self._own_shape = tuple(own.shape[1:])
        """Of the autoencoder's latents; `shape` is that of what the denoiser sees."""
        self.shape = tuple(family.scaled(own).shape[1:])

    def at(self, step: int, positions: Sequence[int]) -> Batch:
        """The examples that stand at `positions`, as they are drawn in optimiser step `step`."""
        numbers, slots, draws = [], [], []
        stored = self.sampling.draws_per_pair
        for position in positions:
            number, epoch = self.order.at(position)
            slot = epoch % stored if stored else 0
            numbers.append(number)
            slots.append(slot)
            draws.append(self._draw("fixed", number, slot) if stored else self._draw("sample", step, position))
        sides = len(self.examples.images)
        index = torch.tensor([[one.index, *(one.others or (one.index,) * (sides - 1))] for one in draws])
        captions = ["" if d.drop_caption else self.examples.captions[n] for n, d in zip(numbers, draws, strict=True)]
        return Batch(
            latents=torch.stack([self._latents(side, numbers, draws) for side in range(sides)]),
            noise=self._noise(sides, numbers, draws),
            index=index.T.to(self.device),
            text=self.embed(captions),
            columns={name: values[numbers].to(self.device) for name, values in self.examples.columns.items()},
            step=step,
            positions=tuple(positions),
            examples=tuple(numbers),
            slots=tuple(slots),
            weights=self._weights(sides, numbers, draws),
        )

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Cached text of `prompts`, on the device."""
        return {name: values.to(self.device) for name, values in self.text.get(prompts).items()}

    def draws(self, *place: int | str) -> Draw:
        """Timestep and noise of another place than the examples' own."""
        return draw(
            generator(self.sampling.seed, *place),
            self.shape,
            self.sampling.t_range,
            sample_index=self._sample_index,
        )

    def _draw(self, *place: int | str) -> Draw:
        return draw(
            generator(self.sampling.seed, *place),
            self.shape,
            self.sampling.t_range,
            self.sampling.caption_dropout,
            self.sampling.random_flip,
            len(self.examples.images),
            self._sample_index,
            self.sampling.independent_timesteps,
        )

    def _noise(self, sides: int, numbers: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        """`[S, B, C, h, w]`: the noise that an image was generated from where that is asked for and known, else fresh
        noise, which the images of an example share."""
        fresh = torch.stack([one.noise for one in draws]).to(self.device)
        if not self.sampling.drawn_noise:
            return fresh.expand(sides, *fresh.shape)
        seeds = self.examples.columns["seed"][list(numbers)].T.tolist()
        rows = [
            torch.stack([self._noise_of(seed, one) for seed, one in zip(side, draws, strict=True)]) for side in seeds
        ]
        return torch.stack(rows).to(self.device)

    def _noise_of(self, seed: int, one: Draw) -> Tensor:
        if seed < 0:
            return one.noise
        noise = initial_noise(seed, self.shape)
        return self.family.mirrored(noise[None])[0] if one.mirror else noise

    def _weights(self, sides: int, numbers: Sequence[int], draws: Sequence[Draw]) -> Tensor | None:
        """The same for all images of an example: what is unsafe in one of them is weighed in each."""
        if self.regions is None:
            return None
        maps = [self.regions.maps([self.examples.images[side][number] for number in numbers]) for side in range(sides)]
        costs = torch.stack(maps).amax(0)
        mirror = torch.tensor([one.mirror for one in draws])[:, None, None, None]
        size = (self.shape[-2], self.shape[-1])
        weights = region_weights(costs, size, self.regions.inside, self.regions.outside)
        return torch.where(mirror, weights.flip(-1), weights).to(self.device)

    def _latents(self, side: int, numbers: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        keys = [self.examples.images[side][number] for number in numbers]
        if self.sampling.pixel_flip:
            keys = [key + MIRRORED if one.mirror else key for key, one in zip(keys, draws, strict=True)]
        noise = torch.stack([one.posterior[side] for one in draws]).view(-1, *self._own_shape)
        latents = posterior_sample(self.latents.get(keys), noise)
        if self.sampling.random_flip and not self.sampling.pixel_flip:
            mirror = torch.tensor([one.mirror for one in draws])[:, None, None, None]
            latents = torch.where(mirror, latents.flip(-1), latents)
        return self.family.scaled(latents).to(self.device)

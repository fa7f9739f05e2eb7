"""One forward pass of training: cached rows in, loss and what is worth logging out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.caches import MIRRORED, ShardStore, sample_latents
from ..data.dataset import PairData
from ..denoisers import Conditioning, Denoiser
from ..sampling import Draw, Order, draw, generator
from . import dpo as ob
from . import focusing as fo
from .reward import composite_loss


LOGGED = ("loss", "accuracy", "gap", "winner_error", "loser_error", "reference_winner_error", "difficulty", "weight")


@dataclass(frozen=True)
class MicroBatch:
    """B pairs on the device. `latents`, `noise`: `[B, C, h, w]`; `index`, `margin`, `target`, `benign`: `[B]`."""

    winners: Tensor
    losers: Tensor
    noise: Tensor
    index: Tensor
    text: Conditioning
    margin: Tensor
    target: Tensor
    benign: Tensor
    positions: tuple[int, ...]
    pairs: tuple[int, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class Passes:
    """Samples that went through the denoiser in training: the measure of an equal budget."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


class Batches:
    """Makes micro-batches from positions of the endless stream of pairs. Keeps no state but the caches."""

    def __init__(
        self,
        config: TrainConfig,
        data: PairData,
        latents: ShardStore,
        text: ShardStore,
        vae_config: Any,
        steps_of_noise: int,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.device, self.vae_config = config, data, device, vae_config
        self.latents, self.text = latents, text
        self.order = Order(data.benign, config.seed, config.benign_share)
        self.shape = tuple(latents.get([data.winners[0]])["mean"].shape[1:])
        self.t_range = (config.t_min, min(config.t_max or steps_of_noise, steps_of_noise))

    def at(self, step: int, positions: Sequence[int]) -> MicroBatch:
        """The pairs that stand at `positions`, as they are drawn in optimiser step `step`."""
        pairs, slots, draws = [], [], []
        for position in positions:
            pair, epoch = self.order.at(position)
            slot = epoch % self.config.fixed_draws if self.config.fixed_draws else 0
            place = ("fixed", pair, slot) if self.config.fixed_draws else ("sample", step, position)
            pairs.append(pair)
            slots.append(slot)
            draws.append(self._draw(generator(self.config.seed, *place)))
        device = self.device
        return MicroBatch(
            winners=self._latents([self.data.winners[pair] for pair in pairs], draws, 0),
            losers=self._latents([self.data.losers[pair] for pair in pairs], draws, 1),
            noise=torch.stack([one.noise for one in draws]).to(device),
            index=torch.tensor([one.index for one in draws]).to(device),
            text=self.embed(
                ["" if d.drop_caption else self.data.captions[p] for p, d in zip(pairs, draws, strict=True)]
            ),
            margin=self.data.margin[pairs].to(device),
            target=self.data.target[pairs].to(device),
            benign=self.data.benign[pairs].to(device),
            positions=tuple(positions),
            pairs=tuple(pairs),
            slots=tuple(slots),
        )

    def embed(self, prompts: list[str]) -> Conditioning:
        return {name: values.to(self.device) for name, values in self.text.get(prompts).items()}

    def _draw(self, own: torch.Generator) -> Draw:
        return draw(own, self.shape, self.t_range, self.config.caption_dropout, self.config.random_flip)

    def _latents(self, keys: list[str], draws: list[Draw], side: int) -> Tensor:
        if self.config.pixel_flip:
            keys = [key + MIRRORED if one.mirror else key for key, one in zip(keys, draws, strict=True)]
        noise = torch.stack([one.posterior[side] for one in draws])
        made = sample_latents(self.latents.get(keys), noise, self.vae_config)
        if self.config.random_flip and not self.config.pixel_flip:
            mirror = torch.tensor([one.mirror for one in draws])[:, None, None, None]
            made = torch.where(mirror, fo.flip(made), made)
        return made.to(self.device)


class PreferenceStep:
    """The objective of a run over one denoiser with one adapter.

    Args:
        model: what the gradient flows through: the denoiser itself or a wrapper of it. The reference and the views go
            through the bare module, the reference with its adapter switched off.
    """

    logged: tuple[str, ...] = LOGGED

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        model: nn.Module,
        batches: Batches,
        resolution: int,
        autocast: Any,
    ) -> None:
        self.config, self.denoiser, self.model, self.batches = config, denoiser, model, batches
        self.resolution, self.autocast = resolution, autocast
        self.passes = Passes()
        eta = config.eta if config.objective == "spo" else 0.0
        self.focusing = fo.Focusing(eta, config.focusing, config.focusing_momentum)
        self.layers = [layer for layer in denoiser.module.modules() if isinstance(layer, BaseTunerLayer)]
        self.kept: Tensor | None = None
        if config.fixed_draws:
            self.kept = torch.full((len(batches.data), config.fixed_draws, 2), float("nan"))

    def __call__(self, step: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Loss (a scalar, mean over the pairs at `positions`) and the means of `logged` as one tensor, no gradient."""
        batch = self.batches.at(step, positions)
        pure, empty = self._pure_noise(step, positions)
        noisy, index, text = self._inputs(batch, pure, empty)
        targets = self._targets(batch)
        reference, ref_w, ref_l = self._reference(batch, noisy, index, text, targets)
        prediction = self._call(self.model, noisy, index, text)
        self.passes.forward += len(noisy)
        self.passes.backward += len(noisy)
        size = len(batch)
        made_w, made_l = prediction[:size], prediction[size : 2 * size]
        err_w, err_l = ob.per_sample_error(made_w, targets[0]), ob.per_sample_error(made_l, targets[1])
        pulled = err_l
        if self.config.sdpo_mu is not None:
            scale = ob.loser_gradient_scale(
                made_w, targets[0], made_l, targets[1], self.config.sdpo_mu, self.config.sdpo_per_pair
            )
            pulled = ob.scale_gradient(err_l, scale)
        logit = ob.preference_logit(err_w, pulled, ref_w, ref_l, self.config.beta)
        losses = self._preference(logit, batch)
        hardness = fo.difficulty(logit)
        weight = torch.ones_like(hardness)
        if self.focusing.active:
            weight = self.focusing.weigh(self._over_views(hardness, batch, step))
            losses = weight * losses
        loss = losses.mean()
        if self.config.anchor:
            loss = loss + self.config.anchor * ob.winner_anchor(err_w).mean()
        if self.config.preservation:
            kept = ob.output_preservation(prediction[2 * size :], reference[2 * size :])
            loss = loss + self.config.preservation * kept.mean()
        if self.config.benign_preservation:
            both = torch.cat((batch.benign, batch.benign)).float()
            kept = ob.output_preservation(prediction[: 2 * size], reference[: 2 * size])
            loss = loss + self.config.benign_preservation * (kept * both).mean()
        with torch.no_grad():
            gap = (err_w - err_l) - (ref_w - ref_l)
            parts = (loss, (logit > 0).float(), gap, err_w, err_l, ref_w, hardness, weight)
            stats = torch.stack([part.detach().float().mean() for part in parts])
        return loss, stats

    def _preference(self, logit: Tensor, batch: MicroBatch) -> Tensor:
        if self.config.objective == "dpo":
            return ob.preference_loss(logit)
        return composite_loss(logit, batch.margin, batch.target, self.config.mode)

    def _pure_noise(self, step: int, positions: Sequence[int]) -> tuple[Tensor | None, Conditioning | None]:
        if not self.config.preservation:
            return None, None
        count = self.config.preservation_batch
        own = [generator(self.config.seed, "preserve", step, positions[0], number) for number in range(count)]
        noise = torch.stack([torch.randn(self.batches.shape, generator=one) for one in own])
        return noise.to(self.batches.device), self.batches.embed([""] * count)

    def _inputs(
        self, batch: MicroBatch, pure: Tensor | None, empty: Conditioning | None
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Winners, losers and pure noise as one batch, so that the denoiser is called once."""
        schedule = self.denoiser.schedule
        sides = [schedule.noised(latents, batch.noise, batch.index) for latents in (batch.winners, batch.losers)]
        index, text = torch.cat((batch.index, batch.index)), _doubled(batch.text)
        if pure is None or empty is None:
            return torch.cat(sides), index, text
        last = index.new_full((len(pure),), len(schedule) - 1)
        joined = {name: torch.cat((values, empty[name])) for name, values in text.items()}
        return torch.cat((*sides, pure)), torch.cat((index, last)), joined

    def _targets(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        schedule = self.denoiser.schedule
        return (
            schedule.target(batch.winners, batch.noise, batch.index),
            schedule.target(batch.losers, batch.noise, batch.index),
        )

    def _reference(
        self, batch: MicroBatch, noisy: Tensor, index: Tensor, text: Conditioning, targets: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions of the reference and its errors `[B]` on winners and losers; kept errors are reused."""
        if self.kept is not None:
            known = self.kept[list(batch.pairs), list(batch.slots)].to(noisy.device)
            if not bool(known.isnan().any()):
                return noisy.new_empty(0), known[:, 0], known[:, 1]
        with torch.no_grad(), self._adapter_off():
            reference = self._call(self.denoiser.module, noisy, index, text)
        self.passes.forward += len(noisy)
        size = len(batch)
        ref_w = ob.per_sample_error(reference[:size], targets[0])
        ref_l = ob.per_sample_error(reference[size : 2 * size], targets[1])
        if self.kept is not None:
            self.kept[list(batch.pairs), list(batch.slots)] = torch.stack((ref_w, ref_l), 1).cpu()
        return reference, ref_w, ref_l

    def _over_views(self, plain: Tensor, batch: MicroBatch, step: int) -> Tensor:
        seen = [plain, *(self._view(name, batch, step) for name in self.config.views)]
        return fo.combine(torch.stack(seen), self.config.view_mean)

    @torch.no_grad()
    def _view(self, name: fo.View, batch: MicroBatch, step: int) -> Tensor:
        """Difficulty `[B]` of the pairs in one view; model and reference see the same transformed pair."""
        own = [generator(self.config.seed, "view", name, step, position) for position in batch.positions]
        winners, losers, noise, index = batch.winners, batch.losers, batch.noise, batch.index
        if name == "flip":
            winners, losers = fo.flip(winners), fo.flip(losers)
        elif name == "shift":
            moves = [fo.draw_shift(one) for one in own]
            winners, losers = (
                torch.cat([fo.shift(row[None], *move) for row, move in zip(side, moves, strict=True)])
                for side in (winners, losers)
            )
        else:
            fresh = [draw(one, self.batches.shape, self.batches.t_range) for one in own]
            noise = torch.stack([one.noise for one in fresh]).to(noise.device)
            index = torch.tensor([one.index for one in fresh]).to(index.device)
        schedule, size = self.denoiser.schedule, len(batch)
        noisy = torch.cat([schedule.noised(side, noise, index) for side in (winners, losers)])
        target = torch.cat([schedule.target(side, noise, index) for side in (winners, losers)])
        twice, text = torch.cat((index, index)), _doubled(batch.text)
        err = ob.per_sample_error(self._call(self.denoiser.module, noisy, twice, text), target)
        with self._adapter_off():
            ref = ob.per_sample_error(self._call(self.denoiser.module, noisy, twice, text), target)
        self.passes.forward += 2 * len(noisy)
        return fo.difficulty(ob.preference_logit(err[:size], err[size:], ref[:size], ref[size:], self.config.beta))

    def _call(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning) -> Tensor:
        with self.autocast():
            return self.denoiser.call(module, noisy, index, text, self.resolution)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


def _doubled(text: Conditioning) -> Conditioning:
    return {name: torch.cat((values, values)) for name, values in text.items()}

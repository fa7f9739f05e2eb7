"""The losses, as pure functions over per-sample errors: tensors in, tensors out.

Throughout, `err_w, err_l` are the errors `[B]` of the model in training on winner and loser, `ref_w, ref_l` those of
the reference (the same model with its adapter switched off), all four at the same timestep and with the same noise.

Diffusion-DPO is exact (Wallace et al., arXiv 2311.12908, as in its released code): mean over dims, one half, omega
constant. diffusers' example writes beta without the one half: its 2500 is our 5000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_spo_plugin.errors import ConfigError


Prediction = Literal["epsilon", "v_prediction", "flow"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process `x_t = signal[t] * x_0 + sigma[t] * noise` on T timesteps, and what the model predicts.

    Attributes:
        prediction: `epsilon`, `v_prediction` or `flow`.
        signal, sigma: `[T]`, float32, from clean (index 0) to noisy (index T - 1).
        timesteps: `[T]`, the number the model is told at each index.
    """

    prediction: Prediction
    signal: Tensor
    sigma: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"prediction type {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        shapes = {tuple(part.shape) for part in (self.signal, self.sigma, self.timesteps)}
        if len(shapes) != 1 or self.signal.ndim != 1 or len(self.signal) < 1:
            raise ConfigError(f"signal, sigma and timesteps must share one shape [T], got {sorted(shapes)}")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The training schedule behind a diffusers scheduler: one with `alphas_cumprod`, or a flow-matching one.

        Raises:
            ConfigError: the scheduler has neither, or predicts something else (`sample`).
        """
        config = scheduler.config
        if getattr(scheduler, "alphas_cumprod", None) is not None:
            alphas = scheduler.alphas_cumprod.float().cpu().clamp(0.0, 1.0)
            prediction: Any = getattr(config, "prediction_type", "epsilon")
            return cls(prediction, alphas.sqrt(), (1.0 - alphas).sqrt(), torch.arange(len(alphas)))
        if "FlowMatch" in type(scheduler).__name__:
            # The schedule at construction, not the one that the last drawing left behind.
            fresh = type(scheduler).from_config(config)
            count = int(config.num_train_timesteps)
            sigma = fresh.sigmas[:count].float().cpu().flip(0)
            return cls("flow", 1.0 - sigma, sigma, sigma * count)
        raise ConfigError(f"{type(scheduler).__name__} has no training schedule that is known here")

    def __len__(self) -> int:
        return len(self.signal)

    def noised(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """`x_t [B, ...]` of clean `latents [B, ...]` at `index [B]`."""
        return _at(self.signal, index, latents) * latents + _at(self.sigma, index, latents) * noise

    def target(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """What the model should predict `[B, ...]`: the noise, `signal * noise - sigma * x_0`, or `noise - x_0`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        return _at(self.signal, index, latents) * noise - _at(self.sigma, index, latents) * latents


def _at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    picked = values.to(like.device)[index.to(like.device)]
    return picked.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def per_sample_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error `[B]` over all dims but the first, in float32."""
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(f"expected two equal shapes [B, ...], got {tuple(prediction.shape)}, {tuple(target.shape)}")
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def preference_logit(err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """`-0.5 * beta * D [B]` with `D = (err_w - err_l) - (ref_w - ref_l)`; its sigmoid is the implicit preference."""
    return -0.5 * beta * ((err_w - err_l) - (ref_w - ref_l))


def preference_loss(logit: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """`-log sigmoid(logit - margin) [B]`. A positive margin demands a larger gap (as in SafeDPO, 2505.20065)."""
    return -F.logsigmoid(logit - margin)


def soft_preference_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy `[B]` of `sigmoid(logit)` against the probability `target` that the winner is better."""
    return F.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")


def diffusion_dpo_loss(err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float = 5000.0) -> Tensor:
    """`-log sigmoid(-0.5 * beta * D) [B]`, as in DiffusionDPO with errors that are means over dims."""
    return preference_loss(preference_logit(err_w, err_l, ref_w, ref_l, beta))


def output_preservation(prediction: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference `[B]` between the model and its reference.

    DUO (arXiv 2407.21035) takes it on pure noise at the last timestep with the empty prompt, weight 1e6 * beta / 100
    for its own beta. Taken on benign pairs at their own timestep and prompt it is this project's own variant.
    """
    return per_sample_error(prediction, reference.detach())


def winner_anchor(err_w: Tensor) -> Tensor:
    """The winner's own error `[B]`: plain denoising on what is preferred. This project's own term."""
    return err_w


def loser_gradient_scale(
    prediction_w: Tensor, target_w: Tensor, prediction_l: Tensor, target_l: Tensor, mu: float, per_pair: bool = False
) -> Tensor:
    """How much of the loser's gradient may pass, `[B]` in [0, 1], so that the winner's error does not grow.

    `k = clip((1 - mu) * |g_w|^2 / <g_w, g_l>, 0, 1)` where `<g_w, g_l> > 0`, else 1, with g the gradients of the
    errors by the output (Diffusion-SDPO, arXiv 2511.03317). The source takes one k for the whole batch; `per_pair`
    takes one for each pair, which does not depend on the batch.
    """
    if not 0.0 <= mu <= 1.0:
        raise ConfigError(f"mu must lie in [0, 1], got {mu}")
    grad_w = (prediction_w.detach().float() - target_w.float()).flatten(1)
    grad_l = (prediction_l.detach().float() - target_l.float()).flatten(1)
    square, inner = grad_w.square().sum(1), (grad_w * grad_l).sum(1)
    if not per_pair:
        square, inner = square.sum().expand_as(square), inner.sum().expand_as(inner)
    against = inner > 0
    scale = (1.0 - mu) * square / torch.where(against, inner, torch.ones_like(inner))
    return torch.where(against, scale.clamp(0.0, 1.0), torch.ones_like(scale))


def scale_gradient(error: Tensor, scale: Tensor) -> Tensor:
    """`error [B]` unchanged in value, its gradient times `scale [B]`."""
    fixed = error.detach()
    return fixed + scale.detach() * (error - fixed)

"""The forward process that a model was trained with, and what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError


Prediction = Literal["epsilon", "v_prediction", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process `x_t = signal[t] * x_0 + sigma[t] * noise` on T timesteps, and what the model predicts.

    Attributes:
        prediction: `epsilon`, `v_prediction` or `flow`.
        signal: `[T]`, float32, from clean (index 0) to noisy (index T - 1).
        sigma: `[T]`, float32, likewise.
        timesteps: `[T]`, the number that the model is given at each index.
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
            ConfigError: the scheduler has neither, predicts something else (`sample`), or noise at zero terminal SNR.
        """
        config = scheduler.config
        if getattr(scheduler, "alphas_cumprod", None) is not None:
            alphas = scheduler.alphas_cumprod.float().cpu().clamp(0.0, 1.0)
            prediction: Any = getattr(config, "prediction_type", "epsilon")
            if prediction == "epsilon" and bool(getattr(config, "rescale_betas_zero_snr", False)):
                raise ConfigError(
                    "the scheduler ends at pure noise (rescale_betas_zero_snr), where the noise says nothing of the "
                    "image: a model of that kind predicts v_prediction; set the scheduler's prediction_type"
                )
            return cls(prediction, alphas.sqrt(), (1.0 - alphas).sqrt(), torch.arange(len(alphas)))
        if "FlowMatch" in type(scheduler).__name__:
            # The schedule at construction, not the one that the last generation left behind.
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

    def clean(self, noisy: Tensor, prediction: Tensor, index: Tensor) -> Tensor:
        """The clean latents `[B, ...]` that a prediction for `noisy [B, ...]` at `index [B]` means."""
        signal, sigma = _at(self.signal, index, noisy), _at(self.sigma, index, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / signal
        if self.prediction == "flow":
            return noisy - sigma * prediction
        return signal * noisy - sigma * prediction


def _at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    picked = values.to(like.device)[index.to(like.device)]
    return picked.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

"""What differs between model families when one is trained: the protocol, and parts that several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from ..sampling import uniform_index


Conditioning = dict[str, Tensor]
"""What a prompt becomes and what is cached of it, by name, `[B, ...]`: `text [B, L, D]` in every family."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Names that the projections of attention end with in diffusers' denoisers: the usual targets of a LoRA."""


@dataclass(frozen=True)
class LatentScale:
    """How the autoencoder's latents become what the denoiser sees: `(latents - shift) * scale`."""

    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, vae: Any) -> LatentScale:
        """As the autoencoder's configuration states it."""
        shift = getattr(vae.config, "shift_factor", None)
        scale = getattr(vae.config, "scaling_factor", None)
        return cls(shift or 0.0, 1.0 if scale is None else scale)

    def __call__(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents."""
        return latents / self.scale + self.shift


class Common:
    """What most families share; a family overrides what differs."""

    scaled: LatentScale

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """See `Family`."""
        return decoded(vae, self.scaled.inverse(latents))

    def sample_index(self, low: int, high: int, generator: torch.Generator) -> int:
        """See `Family`; each index equally often."""
        return uniform_index(low, high, generator)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] of an autoencoder's own latents, with gradients; what is outside is cut."""
    pixels = vae.decode(latents.to(next(vae.parameters()).dtype), return_dict=False)[0]
    return (pixels.float() / 2.0 + 0.5).clamp(0.0, 1.0)


class Family(Protocol):
    """A denoiser and how its family is trained. One file a family, one row in `FAMILIES`."""

    @property
    def name(self) -> str:
        """As in the table."""

    @property
    def component(self) -> str:
        """The denoiser's name in the pipeline: `unet` or `transformer`."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that the modules with a LoRA end with, unless the configuration states others."""

    @property
    def module(self) -> nn.Module:
        """The denoiser."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels, the timestep that the denoiser is given at each, and the target with its sign."""

    @classmethod
    def of(cls, pipe: Any) -> Family | None:
        """The family with the denoiser of `pipe`, or None if the pipeline is of another family."""

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser sees them (shift, scale, packing)."""

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] of latents as the denoiser sees them, with gradients."""

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """What `encode_prompts` runs; not needed once the text is cached."""

    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Text embeddings as the pipeline itself makes them: what is cached."""

    def sample_index(self, low: int, high: int, generator: torch.Generator) -> int:
        """An index into `schedule` from [low, high), by the distribution that the family is trained with."""

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        """Prediction `[B, C, h, w]` in the sign of `schedule.target`.

        Args:
            module: the denoiser, or a wrapper of it (data-parallel, compiled).
            noisy: `[B, C, h, w]`.
            index: `[B]`, into `schedule`.
            text: as `encode_prompts` gives it.
            resolution: edge of the image in pixels.
        """


def present(pipe: Any, *names: str) -> list[nn.Module]:
    """The components of `pipe` with these names, in order, without those that it lacks."""
    return [module for name in names if (module := getattr(pipe, name, None)) is not None]

"""Qwen-Image: a flow transformer with Qwen2.5-VL and an autoencoder of videos.

- latents: the autoencoder's, less its mean and over its deviation, channel by channel; squares of 2 x 2 are one token
- text: hidden states of Qwen2.5-VL, each prompt of its own length, and a mask
- target: `noise - latents`; the denoiser is given sigma itself, each level equally often
- no guidance embedding in the released models
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import JOINT_ATTENTION, Common, Conditioning, packed, present, trimmed, unpacked


@dataclass(frozen=True)
class ChannelNorm:
    """`(latents - mean) / std`, both `[1, C, 1, 1]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, vae: Any) -> ChannelNorm:
        """As the autoencoder's configuration states it."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return cls(mean, std)

    def __call__(self, latents: Tensor) -> Tensor:
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    def inverse(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents."""
        return latents * self.std.to(latents.device) + self.mean.to(latents.device)


@dataclass(frozen=True)
class QwenImage(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: ChannelNorm

    name: ClassVar[str] = "qwen-image"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> QwenImage | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "QwenImageTransformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), ChannelNorm.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, mask = pipe.encode_prompt(prompt=prompts, device=device)
        # Where no prompt is shorter than another the pipeline gives no mask.
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        return {"text": text, "mask": mask}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        height, width = noisy.shape[-2:]
        embeddings, mask = trimmed(text)
        tokens = module(
            hidden_states=packed(noisy),
            timestep=self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            encoder_hidden_states=embeddings,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

"""FLUX.2, dev and Klein: a flow transformer with a language model for its text.

- latents: squares of 2 x 2 of the autoencoder's become channels, which are normalised by the running mean and variance
  of the autoencoder's batch norm; each is one token
- text: hidden states of three layers of Mistral (dev) or Qwen3 (Klein) side by side
- target: `noise - latents`; the denoiser is given sigma itself, each level equally often
- guidance: 4.0 for dev, what its pipeline asks for by default; Klein takes none
- train on Klein base; draw with it or with the distilled Klein of four steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import JOINT_ATTENTION, Common, Conditioning, present


GUIDANCE = 4.0


@dataclass(frozen=True)
class PatchNorm:
    """Squares of 2 x 2 as channels, normalised: `mean` and `std` are `[1, 4 C, 1, 1]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, vae: Any) -> PatchNorm:
        """By the statistics of the autoencoder's batch norm."""
        variance = vae.bn.running_var.detach().float().cpu() + vae.config.batch_norm_eps
        return cls(vae.bn.running_mean.detach().float().cpu().view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1))

    def __call__(self, latents: Tensor) -> Tensor:
        return (patchified(latents) - self.mean.to(latents.device)) / self.std.to(latents.device)

    def inverse(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents."""
        return unpatchified(latents * self.std.to(latents.device) + self.mean.to(latents.device))


def patchified(latents: Tensor) -> Tensor:
    """`[B, C, h, w]` -> `[B, 4 C, h / 2, w / 2]`."""
    return nn.functional.pixel_unshuffle(latents, 2)


def unpatchified(latents: Tensor) -> Tensor:
    """Back to `[B, C, h, w]`."""
    return nn.functional.pixel_shuffle(latents, 2)


@dataclass(frozen=True)
class Flux2(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: PatchNorm

    name: ClassVar[str] = "flux2"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, "to_qkv_mlp_proj")
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> Flux2 | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "Flux2Transformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), PatchNorm.of(pipe.vae))

    def mirrored(self, latents: Tensor) -> Tensor:
        """See `Family`: the squares change places, and so do the columns within each."""
        return patchified(unpatchified(latents.flatten(0, -4)).flip(-1)).view_as(latents)

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, _ = pipe.encode_prompt(prompt=prompts, device=device)
        return {"text": text}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        count, _, height, width = noisy.shape
        config: Any = self.module.config
        guidance = noisy.new_full((count,), GUIDANCE, dtype=torch.float32) if config.guidance_embeds else None
        tokens = module(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            guidance=guidance,
            encoder_hidden_states=text["text"],
            txt_ids=_places(1, 1, text["text"].shape[1], count, noisy.device),
            img_ids=_places(height, width, 1, count, noisy.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def _places(height: int, width: int, length: int, count: int, device: torch.device) -> Tensor:
    """Places of tokens `[B, height * width * length, 4]`: time, row, column, place in the text."""
    axes = (torch.arange(size, device=device) for size in (1, height, width, length))
    return torch.cartesian_prod(*axes).expand(count, -1, -1)

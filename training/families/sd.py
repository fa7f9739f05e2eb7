"""Stable Diffusion 1 and 2: a UNet with one text embedding.

- latents: the autoencoder's, times its scaling factor
- text: the last hidden states of one CLIP
- target: noise, or velocity (`prediction_type` of the scheduler); timesteps 0 to 999, uniform
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import ATTENTION, Common, Conditioning, LatentScale, present


@dataclass(frozen=True)
class StableDiffusion(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "sd"
    component: ClassVar[str] = "unet"
    targets: ClassVar[tuple[str, ...]] = ATTENTION

    @classmethod
    def of(cls, pipe: Any) -> StableDiffusion | None:
        unet: Any = getattr(pipe, "unet", None)
        if type(unet).__name__ != "UNet2DConditionModel" or unet.config.addition_embed_type is not None:
            return None
        if not hasattr(pipe, "encode_prompt"):
            return None
        return cls(unet, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, _ = pipe.encode_prompt(prompts, device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"text": text}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        timesteps = self.schedule.timesteps[index.cpu()].to(noisy.device)
        return module(noisy, timesteps, encoder_hidden_states=text["text"], return_dict=False)[0]

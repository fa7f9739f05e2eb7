"""Stable Diffusion XL: a UNet with two text embeddings, a pooled one, and the image's size.

- latents: the autoencoder's, times its scaling factor
- text: hidden states of both CLIPs side by side, and the second's pooled embedding; sizes as of an uncropped image
- target: noise, or velocity (`prediction_type` of the scheduler); timesteps 0 to 999, uniform
- models of velocity with zero terminal SNR (NoobAI): betas are rescaled as the scheduler says, so that the last
  timestep is noise alone and its target the latents, negated
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import ATTENTION, Common, Conditioning, LatentScale, present


@dataclass(frozen=True)
class StableDiffusionXL(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "sdxl"
    component: ClassVar[str] = "unet"
    targets: ClassVar[tuple[str, ...]] = ATTENTION

    @classmethod
    def of(cls, pipe: Any) -> StableDiffusionXL | None:
        unet: Any = getattr(pipe, "unet", None)
        if type(unet).__name__ != "UNet2DConditionModel" or unet.config.addition_embed_type != "text_time":
            return None
        if not hasattr(pipe, "encode_prompt"):
            return None
        return cls(unet, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder", "text_encoder_2")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        timesteps = self.schedule.timesteps[index.cpu()].to(noisy.device)
        sizes = noisy.new_tensor([resolution, resolution, 0, 0, resolution, resolution]).expand(len(noisy), 6)
        return module(
            noisy,
            timesteps,
            encoder_hidden_states=text["text"],
            added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]

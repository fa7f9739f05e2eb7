"""FLUX.1: a flow transformer with CLIP and T5, distilled to take a guidance scale as a number (dev) or none (schnell).

- latents: the autoencoder's, less its shift, times its scaling factor; squares of 2 x 2 are one token
- text: hidden states of T5, and the pooled embedding of CLIP
- target: `noise - latents`; the denoiser is given sigma itself, on the scheduler's schedule without its shift for
  large images, each level equally often
- guidance: 3.5 where the model takes one, what its pipeline asks for by default
- train on dev; the adapter is for dev and what was tuned from it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import JOINT_ATTENTION, Common, Conditioning, LatentScale, grid, packed, present, unpacked


GUIDANCE = 3.5


@dataclass(frozen=True)
class Flux1(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "flux1"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> Flux1 | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "FluxTransformer2DModel":
            return None
        # Fill and Canny see more channels than they predict.
        if transformer.config.out_channels not in (None, transformer.config.in_channels):
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder", "text_encoder_2")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, device=device)
        return {"text": text, "pooled": pooled}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        height, width = noisy.shape[-2:]
        config: Any = self.module.config
        guidance = noisy.new_full((len(noisy),), GUIDANCE, dtype=torch.float32) if config.guidance_embeds else None
        tokens = module(
            hidden_states=packed(noisy),
            timestep=self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            guidance=guidance,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["text"],
            txt_ids=torch.zeros(text["text"].shape[1], 3, device=noisy.device),
            img_ids=grid(height // 2, width // 2, noisy.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

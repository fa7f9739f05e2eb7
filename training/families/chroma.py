"""Chroma: FLUX.1's transformer without guidance and pooled text, with a mask over the text.

- latents: the autoencoder's, less its shift, times its scaling factor; squares of 2 x 2 are one token
- text: hidden states of T5, and its mask, which lets one padding token through; it is given in the type in which the
  pipeline gives it (a number, which attention adds, in the versions of diffusers that are out)
- target: `noise - latents`; the denoiser is given sigma itself, each level equally often
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import JOINT_ATTENTION, Common, Conditioning, LatentScale, grid, packed, present, unpacked


@dataclass(frozen=True)
class Chroma(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "chroma"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> Chroma | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "ChromaTransformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, _, mask, *_ = pipe.encode_prompt(prompt=prompts, device=device, do_classifier_free_guidance=False)
        return {"text": text, "mask": mask}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = packed(noisy)
        mask = torch.cat((text["mask"], torch.ones(tokens.shape[:2], dtype=torch.bool, device=noisy.device)), 1)
        tokens = module(
            hidden_states=tokens,
            timestep=self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            encoder_hidden_states=text["text"],
            txt_ids=torch.zeros(text["text"].shape[1], 3, device=noisy.device),
            img_ids=grid(height // 2, width // 2, noisy.device),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

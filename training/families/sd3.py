"""Stable Diffusion 3 and 3.5: a flow transformer with three text encoders.

- latents: the autoencoder's, less its shift, times its scaling factor
- text: hidden states of two CLIPs and T5 in one sequence, and the pooled embeddings of the CLIPs
- target: `noise - latents`; timesteps are 1000 sigma on the scheduler's shifted schedule, each equally often
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import ATTENTION, Common, Conditioning, LatentScale, present


@dataclass(frozen=True)
class StableDiffusion3(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "sd3"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = ATTENTION

    @classmethod
    def of(cls, pipe: Any) -> StableDiffusion3 | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "SD3Transformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder", "text_encoder_2", "text_encoder_3")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        return module(
            hidden_states=noisy,
            timestep=self.schedule.timesteps[index.cpu()].to(noisy.device),
            encoder_hidden_states=text["text"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]

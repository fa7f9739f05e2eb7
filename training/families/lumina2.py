"""Lumina Image 2.0: a flow transformer with Gemma; time runs the other way, and it predicts `latents - noise`.

- latents: the autoencoder's, less its shift, times its scaling factor; the model itself takes squares of 2 x 2
- text: hidden states of Gemma 2's last layer but one, behind the pipeline's system prompt, and a mask
- target: `noise - latents`, of which the denoiser predicts the negative; it is given `1 - sigma`, each level equally
  often
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import ATTENTION, Common, Conditioning, LatentScale, present, trimmed


@dataclass(frozen=True)
class Lumina2(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "lumina2"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = ATTENTION
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> Lumina2 | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "Lumina2Transformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        text, mask, *_ = pipe.encode_prompt(prompt=prompts, device=device, do_classifier_free_guidance=False)
        return {"text": text, "mask": mask.bool()}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        embeddings, mask = trimmed(text)
        return -module(
            hidden_states=noisy,
            timestep=1.0 - self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

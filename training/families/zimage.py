"""Z-Image: a flow transformer with Qwen3, whose time runs the other way and whose prediction is negated.

- latents: the autoencoder's, less its shift, times its scaling factor; the model itself takes squares of 2 x 2
- text: hidden states of Qwen3's last layer but one, each prompt of its own length
- target: `noise - latents`, of which the denoiser predicts the negative; it is given `1 - sigma`, each level equally
  often
- train on the base; draw with it or with Z-Image-Turbo
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from .base import ATTENTION, Common, Conditioning, LatentScale, padded, present


@dataclass(frozen=True)
class ZImage(Common):
    """See the file's first lines; members as in `Family`."""

    module: nn.Module
    schedule: NoiseSchedule
    scaled: LatentScale

    name: ClassVar[str] = "zimage"
    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = ATTENTION
    patch: ClassVar[int] = 2

    @classmethod
    def of(cls, pipe: Any) -> ZImage | None:
        transformer: Any = getattr(pipe, "transformer", None)
        if type(transformer).__name__ != "ZImageTransformer2DModel":
            return None
        return cls(transformer, NoiseSchedule.from_scheduler(pipe.scheduler), LatentScale.of(pipe.vae))

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        return present(pipe, "text_encoder")

    @torch.no_grad()
    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        # The pipeline writes into the list that it is given.
        texts, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        masks = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
        return {"text": padded(texts), "mask": padded(masks)}

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        lengths = text["mask"].sum(1).tolist()
        outputs = module(
            list(noisy.unsqueeze(2)),
            1.0 - self.schedule.timesteps[index.cpu()].to(noisy.device) / 1000.0,
            [one[: int(length)] for one, length in zip(text["text"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(outputs)).squeeze(2)

"""What differs between model families when a denoiser is called on cached latents and text embeddings.

Three families are known here: Stable Diffusion 1 and 2 (`unet`), SDXL (`unet` with pooled text and sizes) and Stable
Diffusion 3 (`transformer`). Everything else in training is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import PipelineError

from .objectives.dpo import NoiseSchedule


Conditioning = dict[str, Tensor]
"""What a prompt becomes: `text [B, L, D]`, and for SDXL and SD3 also `pooled [B, P]`."""


@dataclass(frozen=True)
class Denoiser:
    """The component in training and how to call it.

    Attributes:
        component: its name in the pipeline, `unet` or `transformer`.
        module: the bare module.
        schedule: noise levels and what is predicted.
        family: which arguments the module takes.
    """

    component: str
    module: nn.Module
    schedule: NoiseSchedule
    family: Literal["sd", "sdxl", "sd3"]

    def predict(self, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        """Prediction `[B, C, h, w]` for `noisy [B, C, h, w]` at schedule `index [B]`; `resolution` in pixels."""
        return self.call(self.module, noisy, index, text, resolution)

    def call(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        """`predict` through `module`, which may be a wrapper of the denoiser (data-parallel, compiled)."""
        timesteps = self.schedule.timesteps[index.cpu()].to(noisy.device)
        if self.family == "sd3":
            return module(
                hidden_states=noisy,
                timestep=timesteps,
                encoder_hidden_states=text["text"],
                pooled_projections=text["pooled"],
                return_dict=False,
            )[0]
        options: dict[str, Any] = {}
        if self.family == "sdxl":
            sizes = noisy.new_tensor([resolution, resolution, 0, 0, resolution, resolution]).expand(len(noisy), 6)
            options["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": sizes}
        return module(noisy, timesteps, encoder_hidden_states=text["text"], return_dict=False, **options)[0]


def denoiser_of(pipe: Any) -> Denoiser:
    """The denoiser of a diffusers pipeline.

    Raises:
        PipelineError: the pipeline's family is not one of those known here.
        ConfigError: its scheduler has no training schedule.
    """
    unet: Any = getattr(pipe, "unet", None)
    transformer: Any = getattr(pipe, "transformer", None)
    if type(unet).__name__ == "UNet2DConditionModel":
        added = unet.config.addition_embed_type
        if added in (None, "text_time") and hasattr(pipe, "encode_prompt"):
            family: Literal["sd", "sdxl"] = "sdxl" if added == "text_time" else "sd"
            return Denoiser("unet", unet, NoiseSchedule.from_scheduler(pipe.scheduler), family)
    if type(transformer).__name__ == "SD3Transformer2DModel":
        return Denoiser("transformer", transformer, NoiseSchedule.from_scheduler(pipe.scheduler), "sd3")
    raise PipelineError(
        f"training knows Stable Diffusion 1, 2, 3 and SDXL pipelines, not {type(pipe).__name__} with "
        f"{type(unet if unet is not None else transformer).__name__}"
    )


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
    """Text embeddings of `prompts`, as the pipeline itself makes them for drawing."""
    if type(pipe).__name__.startswith("StableDiffusion3"):
        text, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}
    made = pipe.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"text": made[0]} if len(made) == 2 else {"text": made[0], "pooled": made[2]}


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The pipeline's text encoders, in order."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [encoder for name in names if (encoder := getattr(pipe, name, None)) is not None]

"""Model families that can be trained: one file each, one row in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from t2i_spo_plugin.errors import PipelineError

from .base import Conditioning, Family, is_temporal, joined, padded
from .chroma import Chroma
from .flux1 import Flux1
from .flux2 import Flux2
from .lumina2 import Lumina2
from .qwen_image import QwenImage
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .zimage import ZImage


__all__ = ["FAMILIES", "Conditioning", "Family", "family_of", "is_temporal", "joined", "padded"]

FAMILIES: dict[str, type[Family]] = {
    "Stable Diffusion 1 and 2": StableDiffusion,
    "Stable Diffusion XL": StableDiffusionXL,
    "Stable Diffusion 3": StableDiffusion3,
    "FLUX.1": Flux1,
    "FLUX.2": Flux2,
    "Z-Image": ZImage,
    "Qwen-Image": QwenImage,
    "Chroma": Chroma,
    "Lumina Image 2.0": Lumina2,
}


def family_of(pipe: Any) -> Family:
    """The family of a diffusers pipeline, with its denoiser.

    Raises:
        PipelineError: none of `FAMILIES` knows the pipeline.
        ConfigError: its scheduler has no training schedule.
    """
    for kind in FAMILIES.values():
        family = kind.of(pipe)
        if family is not None:
            return family
    module = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    raise PipelineError(
        f"training knows pipelines of {', '.join(FAMILIES)}, not {type(pipe).__name__} with {type(module).__name__}"
    )

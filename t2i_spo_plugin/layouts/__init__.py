"""Codecs at the edge: files in the layouts of kohya, diffusers and PEFT <-> the neutral form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from . import diffusers, kohya, native
from .base import COMPONENTS, LoraPair, canonical


__all__ = ["COMPONENTS", "KOHYA_ARCHITECTURES", "LoraPair", "canonical", "decode", "encode"]

KOHYA_ARCHITECTURES = (
    "stable-diffusion-v1",
    "stable-diffusion-v2",
    "stable-diffusion-xl-v1-base",
    "stable-diffusion-xl-v1-refiner",
)
"""Architectures whose adapters are written in the kohya layout; all others in the native one."""

_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with Tucker decomposition",
    "oft_": "OFT",
    "ia3": "IA3",
}


def decode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None = None
) -> dict[str, LoraPair]:
    """The neutral form of a file's tensors, whichever layout they are in.

    Args:
        tensors: as the file has them.
        metadata: the file's header.
        peft_config: the `adapter_config.json` beside the file, where there is one.

    Raises:
        AdapterError: no known layout, another method than LoRA, or matrices that do not fit.
    """
    keys = list(tensors)
    for mark, method in _OTHER_METHODS.items():
        if any(mark in key for key in keys):
            raise AdapterError(f"the file holds {method} weights; only plain LoRA is understood")
    if not keys:
        raise AdapterError("the file holds no weights")
    if kohya.matches(keys):
        return kohya.decode(tensors)
    if diffusers.matches(keys):
        return diffusers.decode(tensors, metadata)
    if peft_config is not None or all(key.startswith("base_model.model.") for key in keys):
        return diffusers.decode_peft(tensors, peft_config)
    raise AdapterError(
        f"the file's layout is not known, it begins with {min(keys)!r}; understood are kohya (lora_unet_...), "
        "diffusers and native (unet..., transformer...), and PEFT folders"
    )


def encode(modules: Mapping[str, LoraPair], architecture: str) -> dict[str, Tensor]:
    """The tensors of a file for `architecture`, in the layout that the most programs read."""
    if architecture in KOHYA_ARCHITECTURES:
        return kohya.encode(modules, two_text_encoders="-xl-" in architecture)
    return native.encode(modules)

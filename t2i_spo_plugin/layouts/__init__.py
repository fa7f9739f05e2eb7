"""Codecs at the edge: files in the layouts of kohya, diffusers and PEFT <-> the neutral form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from . import diffusers, kohya, native
from .base import COMPONENTS, LoraPair, block_of, canonical


__all__ = [
    "COMPONENTS",
    "KOHYA_ARCHITECTURES",
    "LAYOUTS",
    "LoraPair",
    "block_of",
    "canonical",
    "decode",
    "default_layout",
    "encode",
    "foreign_keys",
    "layout_of",
]

LAYOUTS = ("kohya", "diffusers", "peft", "native")
"""The layouts that can be written; all of them are read."""

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
    match layout_of(keys, metadata, peft_config):
        case "kohya":
            return kohya.decode(tensors)
        case "peft":
            return diffusers.decode_peft(tensors, peft_config)
        case _:
            return diffusers.decode(tensors, metadata)


def layout_of(keys: Sequence[str], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None = None) -> str:
    """The name in `LAYOUTS` of a file with these keys; a diffusers file without alphas of its own is native.

    Raises:
        AdapterError: no weights, or no known layout.
    """
    if not keys:
        raise AdapterError("the file holds no weights")
    if kohya.matches(keys):
        return "kohya"
    if diffusers.matches(keys):
        plain = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
        return "native" if plain and diffusers.METADATA_KEY not in metadata else "diffusers"
    if peft_config is not None or all(key.startswith("base_model.model.") for key in keys):
        return "peft"
    raise AdapterError(
        f"the file's layout is not known, it begins with {min(keys)!r}; understood are kohya (lora_unet_...), "
        "diffusers and native (unet..., transformer...), and PEFT folders"
    )


def foreign_keys(keys: Sequence[str]) -> list[str]:
    """The keys that are no plain LoRA weight in any layout, sorted; a file with any of them is refused as a whole."""
    return sorted(key for key in keys if not (kohya.is_lora_key(key) or diffusers.is_lora_key(key)))


def default_layout(architecture: str) -> str:
    """The layout that the most programs read for `architecture`."""
    return "kohya" if architecture in KOHYA_ARCHITECTURES else "native"


def encode(modules: Mapping[str, LoraPair], architecture: str, layout: str = "") -> dict[str, Tensor]:
    """The tensors of a file for `architecture` in `layout`, by default the one that the most programs read.

    In the layouts `diffusers` and `peft` the alphas stand beside the tensors: `diffusers.alpha_metadata`,
    `diffusers.peft_config`.

    Raises:
        AdapterError: no such layout, or one that has no name for a module.
    """
    match layout or default_layout(architecture):
        case "kohya":
            return kohya.encode(modules, two_text_encoders="-xl-" in architecture)
        case "native":
            return native.encode(modules)
        case "diffusers":
            return diffusers.encode(modules)
        case "peft":
            return diffusers.encode_peft(modules)
        case other:
            raise AdapterError(f"there is no layout {other}; there are {', '.join(LAYOUTS)}")

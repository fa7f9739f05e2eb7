"""Codecs at the edge: files in the layouts of kohya, LyCORIS, diffusers and PEFT <-> the neutral form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import COMPONENTS, LoraPair
from . import diffusers, kohya, native, original


__all__ = [
    "KOHYA_ARCHITECTURES",
    "LAYOUTS",
    "decode",
    "default_layout",
    "encode",
    "foreign_keys",
    "foreign_weights",
    "layout_of",
    "recognise",
]

LAYOUTS = ("kohya", "diffusers", "peft", "native")
"""The layouts that can be written; all of them are read, and `original`: the names of a model's own code."""

KOHYA_ARCHITECTURES = (
    "stable-diffusion-v1",
    "stable-diffusion-v2",
    "stable-diffusion-xl-v1-base",
    "stable-diffusion-xl-v1-refiner",
)
"""Architectures whose adapters are written in the kohya layout; all others in the native one."""

_OTHER_METHODS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid": "LoCon with Tucker decomposition",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".ia3_": "IA3",
    ".processor.qkv_lora": "XLabs processor",
    ".processor.proj_lora": "XLabs processor",
}
_T5 = ("lora_te3_", "text_encoders.t5xxl.")


def recognise(keys: Collection[str], has_peft_config: bool = False) -> tuple[str, list[str]]:
    """The layout of most of `keys`, and those keys that are no LoRA weights in it, sorted.

    Raises:
        InvalidAdapterError: there are no keys.
        UnsupportedAdapterError: another method than LoRA, a whole model, or no known layout.
    """
    if not keys:
        raise InvalidAdapterError("the file holds no weights")
    for mark, method in _OTHER_METHODS.items():
        if any(mark in key for key in keys):
            raise UnsupportedAdapterError(f"the file holds {method} weights; only plain LoRA is understood")
    layouts = {key: _layout_of_key(key) for key in keys}
    if has_peft_config:
        layouts = {key: "peft" if layout == "bare" else layout for key, layout in layouts.items()}
    counts = Counter(layout for layout in layouts.values() if layout not in ("", "bare"))
    if counts:
        most = max(sorted(counts), key=lambda layout: counts[layout])
        return most, sorted(key for key, layout in layouts.items() if layout != most)
    if not any("lora" in key.lower() for key in keys):
        raise UnsupportedAdapterError(
            f"none of the file's {len(keys)} tensors is a LoRA weight, the first is {quoted(min(keys))}: "
            "a whole model is no adapter"
        )
    if not any(layouts.values()) and all(key.startswith((*kohya.PREFIXES, *COMPONENTS, *_T5)) for key in keys):
        raise UnsupportedAdapterError(foreign_weights(sorted(keys), len(keys)))
    raise UnsupportedAdapterError(
        f"the file's layout is not known, it begins with {quoted(min(keys))}; understood are kohya (lora_unet_...), "
        "diffusers and native (unet..., transformer...), and PEFT folders"
    )


def _layout_of_key(key: str) -> str:
    if key.startswith(_T5):
        return ""
    if kohya.owns(key):
        return "kohya"
    return "original" if original.owns(key) else diffusers.layout_of(key)


def foreign_weights(foreign: Sequence[str], total: int) -> str:
    """The sentence about keys that are no LoRA weights, or that no pipeline can take."""
    encoder = [key for key in foreign if key.startswith(_T5)]
    other = [key for key in foreign if not key.startswith(_T5)]
    sentences = []
    if encoder:
        sentences.append(
            f"{quoted(encoder[0])} changes the T5 text encoder ({len(encoder)} of {total} tensors do), into which "
            "diffusers' pipelines can load no LoRA"
        )
    if other:
        sentences.append(
            f"{quoted(other[0])} is not a plain LoRA weight in the layout of the file ({len(other)} of {total} "
            "tensors are not); only the down and up matrices and alpha are understood"
        )
    return "; ".join(sentences)


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
    layout, foreign = recognise(tensors, peft_config is not None)
    if foreign:
        raise UnsupportedAdapterError(foreign_weights(foreign, len(tensors)))
    match layout:
        case "kohya":
            return kohya.decode(tensors)
        case "original":
            return original.decode(tensors)
        case "diffusers":
            return diffusers.decode(tensors, metadata)
        case "processor":
            return diffusers.decode_processors(tensors)
        case _:
            return diffusers.decode_peft(tensors, peft_config)


def layout_of(keys: Collection[str], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None = None) -> str:
    """The name in `LAYOUTS` of a file with these keys, or `original`; a diffusers file without own alphas is native.

    Raises:
        AdapterError: as `recognise`.
    """
    layout, foreign = recognise(keys, peft_config is not None)
    if layout == "processor":
        return "diffusers"
    has_no_alphas = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in set(keys) - set(foreign))
    if layout == "diffusers" and has_no_alphas and diffusers.METADATA_KEY not in metadata:
        return "native"
    return layout


def foreign_keys(keys: Collection[str], has_peft_config: bool = False) -> list[str]:
    """The keys that are no plain LoRA weight in the layout of most of them, sorted; reading them is refused.

    Raises:
        AdapterError: as `recognise`.
    """
    return recognise(keys, has_peft_config)[1]


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

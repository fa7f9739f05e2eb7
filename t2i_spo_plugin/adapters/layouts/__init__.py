"""Codecs at the edge: files in the layouts of kohya, LyCORIS, diffusers and PEFT <-> the neutral form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import COMPONENTS, LoraPair
from . import denoiser, diffusers, kohya, native, original
from .bases import BASES


__all__ = [
    "KOHYA_ARCHITECTURES",
    "LAYOUTS",
    "OWN_NAMES_ARCHITECTURES",
    "Converter",
    "decode",
    "default_layout",
    "encode",
    "foreign_keys",
    "foreign_weights",
    "is_plain_lora",
    "layout_of",
    "other_method",
    "recognise",
]

Converter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Another program's reader: a file's tensors, alphas folded in, by diffusers' names; raises for names it lacks."""

LAYOUTS = ("kohya", "diffusers", "peft", "native")
"""The layouts that can be written; all of them are read, and two more.

`original` are the names of a model's own code, `bare` those of a denoiser without its component.
"""

KOHYA_ARCHITECTURES = (
    "stable-diffusion-v1",
    "stable-diffusion-v2",
    "stable-diffusion-xl-v1-base",
    "stable-diffusion-xl-v1-refiner",
)
"""Architectures whose adapters are written in the kohya layout; all others in the native one."""

OWN_NAMES_ARCHITECTURES = ("wan", "ltxvideo", "cosmos")
"""Architectures of which ComfyUI knows the own code's names alone: their native files have those."""

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
    method = other_method(keys)
    if method:
        raise UnsupportedAdapterError(f"the file holds {method} weights; only plain LoRA is understood")
    layouts = {key: _layout_of_key(key) for key in keys}
    if has_peft_config:
        layouts = {key: "peft" if layout == "bare" else layout for key, layout in layouts.items()}
    if "original" in layouts.values():
        # A base's own name may be another one's name in diffusers.
        layouts = {
            key: "original" if layouts[key] == "bare" and diffusers.is_known(key) else layouts[key] for key in keys
        }
    counts = Counter(
        layout for key, layout in layouts.items() if layout and (layout != "bare" or diffusers.is_known(key))
    )
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


def is_plain_lora(keys: Collection[str]) -> bool:
    """Whether every key is a matrix or an alpha of a LoRA, whatever its module is called."""
    return bool(keys) and not other_method(keys) and all(diffusers.split(key)[1] for key in keys)


def other_method(keys: Collection[str]) -> str:
    """The name of the method whose weights the file holds, when that is not plain LoRA."""
    return next((method for mark, method in _OTHER_METHODS.items() if any(mark in key for key in keys)), "")


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
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    peft_config: Mapping[str, Any] | None = None,
    architecture: str = "",
    layout: str = "",
    converter: Converter | None = None,
) -> dict[str, LoraPair]:
    """The neutral form of a file's tensors, whichever layout they are in.

    Args:
        tensors: as the file has them.
        metadata: the file's header.
        peft_config: the `adapter_config.json` beside the file, where there is one.
        architecture: of the model the file is for, where it is known: it decides between names that several share.
        layout: as `recognise` says, when that was asked already; or `converted`, which leaves all to the converter.
        converter: asked where a transformer's names are not known here.

    Raises:
        AdapterError: no known layout, another method than LoRA, or matrices that do not fit.
    """
    if not layout:
        layout, foreign = recognise(tensors, peft_config is not None)
        if foreign:
            raise UnsupportedAdapterError(foreign_weights(foreign, len(tensors)))
    is_foreign = layout in ("kohya", "original")
    by_converter = converter is not None and peft_config is None and (is_foreign or layout in ("bare", "converted"))
    try:
        modules = _decoded(tensors, metadata, peft_config, layout)
        modules = denoiser.in_diffusers_names(modules, architecture, fused_only=not is_foreign)
    except UnsupportedAdapterError:
        found = converted(tensors, converter) if by_converter and converter else None
        if found is None:
            raise
        return found
    if by_converter and converter and _is_guess(modules, architecture):
        return converted(tensors, converter) or modules
    return modules


def _decoded(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None, layout: str
) -> dict[str, LoraPair]:
    match layout:
        case "kohya":
            return kohya.decode(tensors)
        case "original":
            return original.decode(tensors, peft_config)
        case "diffusers":
            return diffusers.decode(tensors, metadata)
        case "processor":
            return diffusers.decode_processors(tensors)
        case "bare":
            return diffusers.decode_bare(tensors, metadata)
        case "converted":
            recognise(tensors)
            raise UnsupportedAdapterError("the file's layout is not known")
        case _:
            return diffusers.decode_peft(tensors, peft_config)


def _is_guess(modules: Mapping[str, LoraPair], architecture: str) -> bool:
    """Whether the transformer is not of those whose names are known, so that some may mean another module."""
    known = not architecture or architecture in {base.architecture for base in BASES}
    return not known and any(name.startswith("transformer.") for name in modules)


def converted(tensors: Mapping[str, Tensor], converter: Converter) -> dict[str, LoraPair] | None:
    """The neutral form by way of another program's converter, or None when that does not know the file either.

    Alphas are folded in before, since not every converter heeds them.

    Raises:
        AdapterError: the converter lost modules, or its result is no plain LoRA.
    """
    split = {key: diffusers.split(key) for key in tensors}
    if not all(role for _, role in split.values()):
        return None
    ranks = {name: tensors[key].shape[0] for key, (name, role) in split.items() if role == "down"}
    scales = {name: float(tensors[key]) / ranks[name] for key, (name, role) in split.items() if role == "alpha"}
    plain = {key: tensor for key, tensor in tensors.items() if split[key][1] != "alpha"}
    for key, tensor in plain.items():
        name, role = split[key]
        if role == "up" and scales.get(name, 1.0) != 1.0:
            plain[key] = tensor.float() * scales[name]
    try:
        found = dict(converter(plain))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    if not found or any(diffusers.layout_of(key) != "diffusers" for key in found):
        return None
    if len(found) < len(plain):
        raise UnsupportedAdapterError(
            f"the pipeline's own reader keeps {len(found)} of the file's {len(plain)} matrices; "
            "convert the file to diffusers' names first"
        )
    return diffusers.decode(found, {})


def layout_of(keys: Collection[str], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None = None) -> str:
    """The name in `LAYOUTS` of a file with these keys, `original` or `bare`; without own alphas diffusers is native.

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
            found = original.encode(modules, architecture) if architecture in OWN_NAMES_ARCHITECTURES else None
            return native.encode(modules) if found is None else found
        case "diffusers":
            return diffusers.encode(modules)
        case "peft":
            return diffusers.encode_peft(modules)
        case other:
            raise AdapterError(f"there is no layout {other}; there are {', '.join(LAYOUTS)}")

"""What diffusers' `save_lora_weights` writes, today and in 2023, and what PEFT's `save_pretrained` writes.

The alpha lives apart from the weights: in the file's header (`lora_adapter_metadata`), in `adapter_config.json`, or
nowhere, which means that it equals the rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnreadableAdapterError, UnsupportedAdapterError

from ..lora import COMPONENTS, LoraPair, canonical
from ..safetensors_file import parse_metadata
from . import denoiser
from .alphas import configured_alphas
from .base import PairBuilder


METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the alphas in a file's header."""

SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.(processor\.)?(to_[qkv]|to_out)$")
_OF_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_OF_UNET = {"to_out": "to_out.0"}
_PEFT_PREFIX = "base_model.model."
_UNET_BEGINNINGS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in.", "conv_out.", "time_embedding.")
_CLIP_BEGINNINGS = ("text_model.", "encoder.layers.")


def layout_of(key: str) -> str:
    """`diffusers` for a weight with its component, else `peft`, `processor` or `bare`; empty for no LoRA weight."""
    if not key.endswith(tuple(SUFFIXES)):
        return ""
    if key.startswith(_PEFT_PREFIX):
        return "peft"
    if key.partition(".")[0] in COMPONENTS:
        return "diffusers"
    return "processor" if ".processor." in key and key.startswith(_UNET_BEGINNINGS) else "bare"


def split(key: str) -> tuple[str, str]:
    """`a.to_q.lora_A.weight` as (`a.to_q`, `down`); empty for no LoRA weight."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
    return (key.removesuffix(suffix), SUFFIXES[suffix]) if suffix else ("", "")


def is_known(key: str) -> bool:
    """Whether a key of no prefix is a weight of a UNet or of a transformer of `bases`, by diffusers' names."""
    return key.startswith(_UNET_BEGINNINGS) or denoiser.owns(split(key)[0])


def decode_bare(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, LoraPair]:
    """The neutral form of a denoiser's own weights, as `save_lora_adapter` writes them, alphas in the header.

    Raises:
        AdapterError: as `decode`.
    """
    component = "unet" if all(key.startswith(_UNET_BEGINNINGS) for key in tensors) else "transformer"
    prefixed = {f"{component}.{key}": tensor for key, tensor in tensors.items()}
    text = metadata.get(METADATA_KEY)
    if text is None:
        return decode(prefixed, {})
    config = parse_metadata(text, f"{METADATA_KEY} in the header")
    if not isinstance(config, dict):
        raise UnreadableAdapterError(f"{METADATA_KEY} in the header is not a mapping")
    builder = _collect(prefixed)
    ranks = {name.partition(".")[2]: rank for name, rank in builder.ranks().items()}
    alphas = configured_alphas(ranks, {key.removeprefix(f"{component}."): value for key, value in config.items()})
    return builder.build({f"{component}.{path}": alpha for path, alpha in alphas.items()})


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, LoraPair]:
    """The neutral form of a file with component prefixes, such as `unet.` or `transformer.`.

    Raises:
        UnreadableAdapterError: the header's adapter metadata is not readable.
        InvalidAdapterError: the matrices or alphas do not fit.
        UnsupportedAdapterError: the metadata names another method.
    """
    text = metadata.get(METADATA_KEY)
    prefixed = parse_metadata(text, f"{METADATA_KEY} in the header") if text else {}
    if not isinstance(prefixed, dict):
        raise UnreadableAdapterError(f"{METADATA_KEY} in the header is not a mapping")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in prefixed.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    builder = _collect(tensors)
    alphas: dict[str, float] = {}
    for component, config in configs.items():
        ranks = {name: rank for name, rank in builder.ranks().items() if name.startswith(f"{component}.")}
        configured = configured_alphas({name.partition(".")[2]: rank for name, rank in ranks.items()}, config)
        alphas |= {f"{component}.{path}": alpha for path, alpha in configured.items()}
    return builder.build(alphas)


def decode_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, LoraPair]:
    """The neutral form of a PEFT folder's weights; `config` is its `adapter_config.json`.

    Raises:
        UnreadableAdapterError: the configuration is missing; the alpha stands nowhere else.
        InvalidAdapterError: the matrices or alphas do not fit.
        UnsupportedAdapterError: the configuration names another method.
    """
    if config is None:
        raise UnreadableAdapterError(
            "a PEFT adapter keeps its alpha in adapter_config.json, which is not beside the file"
        )
    bare = {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    if len(bare) != len(tensors):
        raise InvalidAdapterError(f"some keys stand there with and without {_PEFT_PREFIX}")
    if any(key.startswith(_UNET_BEGINNINGS) for key in bare):
        component = "unet"
    else:
        component = "text_encoder" if all(key.startswith(_CLIP_BEGINNINGS) for key in bare) else "transformer"
    builder = _collect({f"{component}.{key}": tensor for key, tensor in bare.items()})
    ranks = {name.partition(".")[2]: rank for name, rank in builder.ranks().items()}
    alphas = configured_alphas(ranks, config)
    return builder.build({f"{component}.{path}": alpha for path, alpha in alphas.items()})


def decode_processors(tensors: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """The neutral form of a UNet's attention processors as they were saved in 2023, alpha equal to the rank.

    Raises:
        InvalidAdapterError: the matrices do not fit.
    """
    return _collect({f"unet.{key}": tensor for key, tensor in tensors.items()}).build()


def encode(modules: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """A diffusers file's tensors; its alphas are `alpha_metadata`."""
    return {
        f"{name}.lora_{letter}.weight": matrix
        for name, pair in modules.items()
        for letter, matrix in (("A", pair.down), ("B", pair.up))
    }


def alpha_metadata(modules: Mapping[str, LoraPair]) -> dict[str, str]:
    """The header entry in which diffusers finds the ranks and alphas of every component."""
    components = sorted({name.partition(".")[0] for name in modules})
    fields = {
        f"{component}.{field}": value
        for component in components
        for field, value in _config(_paths(modules, component)).items()
    }
    return {METADATA_KEY: json.dumps(fields, sort_keys=True)}


def encode_peft(modules: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The tensors of a PEFT folder; its alphas are `peft_config`.

    Raises:
        AdapterError: modules of several components, or of a text encoder: PEFT's names do not say which.
    """
    component = _only_component(modules)
    return {f"{_PEFT_PREFIX}{key}": matrix for key, matrix in encode(_paths(modules, component)).items()}


def peft_config(modules: Mapping[str, LoraPair]) -> dict[str, Any]:
    """The `adapter_config.json` of a PEFT folder.

    Raises:
        AdapterError: as `encode_peft`.
    """
    return {"peft_type": "LORA", "inference_mode": True} | _config(_paths(modules, _only_component(modules)))


def _only_component(modules: Mapping[str, LoraPair]) -> str:
    components = sorted({name.partition(".")[0] for name in modules})
    if components not in (["unet"], ["transformer"]):
        raise AdapterError(
            f"a PEFT folder holds the adapter of one denoiser, this adapter changes {', '.join(components)}; "
            "write it in the kohya or diffusers layout"
        )
    return components[0]


def _paths(modules: Mapping[str, LoraPair], component: str) -> dict[str, LoraPair]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): pair for name, pair in modules.items() if name.startswith(prefix)}


def _config(pairs: Mapping[str, LoraPair]) -> dict[str, Any]:
    """What PEFT has to know: the commonest rank and alpha, and every exception by its full path."""
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": pair.rank for path, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {f"^{re.escape(path)}": pair.alpha for path, pair in pairs.items() if pair.alpha != alpha},
        "target_modules": sorted(pairs),
    }


def _collect(tensors: Mapping[str, Tensor]) -> PairBuilder:
    builder = PairBuilder()
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise UnsupportedAdapterError(f"{key} is not a plain LoRA weight")
        name = key.removesuffix(suffix)
        if suffix.startswith("_lora.") or ".processor." in name:
            names = _OF_CLIP if name.startswith("text_encoder") else _OF_UNET
            name = _PROCESSOR.sub(lambda match: f".{names.get(match[2], match[2])}", name)  # noqa: B023
        builder.add(canonical(name), SUFFIXES[suffix], tensor, key)
    return builder

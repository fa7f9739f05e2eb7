"""What diffusers' `save_lora_weights` writes, today and in 2023, and what PEFT's `save_pretrained` writes.

The alpha lives apart from the weights: in the file's header (`lora_adapter_metadata`), in `adapter_config.json`, or
nowhere, which means that it equals the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from .base import COMPONENTS, LoraPair, canonical, pair_up


_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")
_PEFT_PREFIX = "base_model.model."


METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the alphas in a file's header."""


def matches(keys: Sequence[str]) -> bool:
    return bool(keys) and all(key.split(".", 1)[0] in COMPONENTS for key in keys)


def is_lora_key(key: str) -> bool:
    begins_well = key.startswith(_PEFT_PREFIX) or key.split(".", 1)[0] in COMPONENTS
    return begins_well and key.endswith((".alpha", *_SUFFIXES))


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, LoraPair]:
    """The neutral form of a file with component prefixes, such as `unet.` or `transformer.`.

    Raises:
        AdapterError: a key is of another method, or the header's adapter metadata is not readable.
    """
    text = metadata.get(METADATA_KEY)
    try:
        prefixed = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise AdapterError(f"the header's lora_adapter_metadata is not JSON: {error}") from error
    if not isinstance(prefixed, dict):
        raise AdapterError("the header's lora_adapter_metadata is not a mapping")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in prefixed.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    parts, stored = _halves(tensors)
    alphas: dict[str, float] = {}
    for name, halves in parts.items():
        component, _, path = name.partition(".")
        if configs.get(component) and "down" in halves:
            alphas[name] = _configured_alpha(path, halves["down"].shape[0], configs[component])
    return _canonical_pairs(parts, alphas | stored)


def decode_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, LoraPair]:
    """The neutral form of a PEFT folder's weights; `config` is its `adapter_config.json`.

    Raises:
        AdapterError: the configuration is missing (the alpha stands nowhere else), or a key is of another method.
    """
    if config is None:
        raise AdapterError("a PEFT adapter keeps its alpha in adapter_config.json, which is not beside the file")
    bare = {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    parts, stored = _halves(bare)
    is_unet = any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in parts)
    component = "unet" if is_unet else "transformer"
    alphas = {
        name: _configured_alpha(name, halves["down"].shape[0], config)
        for name, halves in parts.items()
        if "down" in halves
    } | stored
    return pair_up(
        {f"{component}.{name}": halves for name, halves in parts.items()},
        {f"{component}.{name}": alpha for name, alpha in alphas.items()},
    )


def encode(modules: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """A diffusers file's tensors; its alphas are `alpha_metadata`."""
    return {
        f"{name}.lora_{letter}.weight": half
        for name, pair in modules.items()
        for letter, half in (("A", pair.down), ("B", pair.up))
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
    return {f"{_PEFT_PREFIX}{key}": half for key, half in encode(_paths(modules, component)).items()}


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


def _halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise AdapterError(f"{key} is not a plain LoRA weight; only the A and B matrices and alpha are understood")
        name = _PROCESSOR.sub(
            lambda match: f".{match[1]}" + (".0" if match[1] == "to_out" else ""), key[: -len(suffix)]
        )
        parts.setdefault(name, {})[_SUFFIXES[suffix]] = tensor
    for name in alphas:
        parts.setdefault(name, {})
    return parts, alphas


def _configured_alpha(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """The alpha of one module as PEFT finds it: a pattern that matches the end of its path, else `lora_alpha`."""
    if config.get("use_dora"):
        raise AdapterError("the adapter uses DoRA, which changes the base weights' norm and is not supported")
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            matched = re.match(rf"(?:.*\.)?(?:{pattern})$" if not pattern.startswith("^") else rf"{pattern}$", path)
        except re.error as error:
            raise AdapterError(f"alpha_pattern {pattern!r} is not a regular expression: {error}") from error
        if matched:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise AdapterError(f"{path}: alpha must be a number, got {alpha!r}")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _canonical_pairs(parts: dict[str, dict[str, Tensor]], alphas: dict[str, float]) -> dict[str, LoraPair]:
    return pair_up(
        {canonical(name): halves for name, halves in parts.items()},
        {canonical(name): alpha for name, alpha in alphas.items()},
    )

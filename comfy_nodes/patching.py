"""What the adapter nodes share: the files to choose from, what a ComfyUI model is, and patches on clones of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths
import torch
from torch import Tensor

from t2i_spo_plugin.adapters import Adapter, ComfyBase, Fit, check_strength, fit_adapter, lora_tensors, read_adapter
from t2i_spo_plugin.errors import UnreadableAdapterError
from t2i_spo_plugin.registry import ADAPTERS, adapter_source

from .files import listed


Stack = list[tuple[Adapter, float]]
"""What an SPO_ADAPTER socket carries: adapters, each with its strength."""

NONE = "none"
_BUNDLED = {f"sticker demo: {name} (bundled)": name for name in ADAPTERS.names()}
_ARCHITECTURES = {
    "SDXL": "stable-diffusion-xl-v1-base",
    "SDXL_instructpix2pix": "stable-diffusion-xl-v1-base",
    "SDXLRefiner": "stable-diffusion-xl-v1-refiner",
    "SD3": "stable-diffusion-3",
    "Flux": "flux-1-dev",
    "Flux2": "flux-2",
}
_WIDTH_OF_SD2 = 1024


def adapter_files() -> list[str]:
    """The safetensors files in the loras folders, and the adapters that come with the package."""
    return [*(name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")), *_BUNDLED]


def adapter_file(name: str) -> Path:
    """The file of one of `adapter_files`.

    Raises:
        UnreadableAdapterError: there is none.
    """
    if name in _BUNDLED:
        return Path(adapter_source(_BUNDLED[name]))
    path = folder_paths.get_full_path("loras", listed(name, adapter_files()))
    if path is None:
        raise UnreadableAdapterError(
            f"there is no adapter {name!r}; put its .safetensors file into ComfyUI/models/loras and choose it there"
        )
    return Path(path)


def check_adapter(name: str | None, none: bool = False) -> bool | str:
    """What ComfyUI asks of a drop-down of `adapter_files`, whichever slash its folders have.

    Args:
        name: what was chosen; None is one that is linked.
        none: whether it may be `NONE`.
    """
    known = [*([NONE] if none else []), *adapter_files()]
    if name is None or listed(name, known) in known:
        return True
    return f"there is no adapter {name!r} in ComfyUI/models/loras; choose one of: {', '.join(known)}"


def read_stack(names: Sequence[tuple[str, float]], strict: bool) -> Stack:
    """The chosen adapters with their strengths.

    Raises:
        AdapterError: a file is none, or holds no valid adapter.
        ConfigError: a negative strength.
    """
    return [(read_adapter(adapter_file(name), strict), check_strength(strength)) for name, strength in names]


def base_of(model: Any, clip: Any | None) -> ComfyBase:
    """What `fit_adapter` has to know of a MODEL, and of a CLIP when one is connected."""
    keys: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    shapes = weight_shapes(model.model)
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        shapes |= weight_shapes(clip.cond_stage_model)
    return ComfyBase(architecture(model.model), _prediction_type(model), keys, shapes, clip is not None)


def weight_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by name; of quantised ones, that of the weight they stand for."""
    return {name: tuple(weight.shape) for name, weight in module.named_parameters() if name.endswith(".weight")}


def patched(model: Any, clip: Any, stack: Stack, strict: bool) -> tuple[Any, Any, list[Fit]]:
    """Clones of `model` and `clip` (None when not connected) with the adapters as patches, and where each went.

    What is not changed at all, such as everything at strength 0, comes back as the very object that went in.

    Raises:
        AdapterError: as `fit_adapter`; nothing has been changed then.
    """
    base = base_of(model, clip)
    fits = [fit_adapter(adapter, base, strict) for adapter, _ in stack]
    on_model, on_clip = model, clip
    for fit, (_, strength) in zip(fits, stack, strict=True):
        if strength == 0.0:
            continue
        patches = comfy.lora.load_lora(*lora_tensors(fit), log_missing=False)
        on_model = model.clone() if on_model is model else on_model
        done = set(on_model.add_patches(patches, strength))
        rest = {place: patch for place, patch in patches.items() if place not in done}
        if rest and clip is not None:
            on_clip = clip.clone() if on_clip is clip else on_clip
            on_clip.add_patches(rest, strength)
    return on_model, on_clip, fits


def is_patched_with(model: Any, fit: Fit) -> bool:
    """Whether `model` already carries the adapter of `fit` as patches, whichever node has put it there."""
    for place, ours in comfy.lora.load_lora(*lora_tensors(fit), log_missing=False).items():
        weight = place if isinstance(place, str) else place[0]
        for strength, theirs, *_ in model.patches.get(weight, ()):
            if strength != 0.0 and _same_matrices(ours, theirs):
                return True
    return False


def quantisation(model: Any) -> str:
    """What the denoiser's weights are kept in where that is coarser than 16 bits, such as `FP8`; else empty.

    The one that most of them are in: layers of other kinds stay as they were.
    """
    kinds = Counter(kind for _, weight in model.model.named_parameters() if (kind := _coarse(weight)))
    return kinds.most_common(1)[0][0] if kinds else ""


def architecture(model: Any) -> str:
    """As `AdapterMetadata.base_architecture`, of a ComfyUI base model; empty when unknown."""
    kind = type(model).__name__
    if kind in _ARCHITECTURES:
        return _ARCHITECTURES[kind]
    config = model.model_config.unet_config
    if "model_channels" not in config or kind not in ("BaseModel", "SD21UNCLIP", "SD15_instructpix2pix"):
        return ""
    return "stable-diffusion-v2" if config.get("context_dim") == _WIDTH_OF_SD2 else "stable-diffusion-v1"


def _prediction_type(model: Any) -> str:
    """By what the model's sampling is made of, which nodes may have replaced on this clone."""
    parts = {part.__name__ for part in type(model.get_model_object("model_sampling")).__mro__}
    for names, prediction in (
        ({"X0", "EDM", "COSMOS_RFLOW"}, ""),
        ({"V_PREDICTION", "V_PREDICTION_DDPM"}, "v_prediction"),
        ({"CONST"}, "flow"),
        ({"EPS"}, "epsilon"),
    ):
        if parts & names:
            return prediction
    return ""


def _same_matrices(ours: Any, theirs: Any) -> bool:
    """Whether two patches are of one down and up matrix; patches of other kinds have none."""
    pairs = [getattr(patch, "weights", ())[:2] for patch in (ours, theirs)]
    if any(len(pair) < 2 or not all(isinstance(matrix, Tensor) for matrix in pair) for pair in pairs):
        return False
    return all(
        one.shape == other.shape and torch.equal(one.float().cpu(), other.float().cpu())
        for one, other in zip(*pairs, strict=True)
    )


def _coarse(weight: Tensor) -> str:
    layout = getattr(weight, "_layout_cls", "")
    if layout:
        return next(
            (kind for kind in ("NVFP4", "MXFP8", "INT8", "FP8", "W4A4") if kind in str(layout).upper()), str(layout)
        )
    return "FP8" if weight.is_floating_point() and weight.element_size() == 1 else ""

"""What an adapter has to know of a model, from configurations and weight shapes alone: no pipeline is needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn


_NAMED = {
    "SD3Transformer2DModel": "stable-diffusion-3",
    "FluxTransformer2DModel": "flux-1-dev",
    "Flux2Transformer2DModel": "flux-2",
}
_UNETS = ("UNet2DConditionModel", "UNetMotionModel")
_ADDED = ("processor", "motion_modules", "image_projection_layers")
"""Modules that are added to a finished base: an IP-Adapter's projections, and AnimateDiff's layers between frames."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def architecture_from_config(kind: str, config: Mapping[str, Any]) -> str:
    """`architecture_of` from the denoiser's class name and its configuration, as its config.json has it."""
    if kind not in _UNETS:
        return _NAMED.get(kind) or _slug(kind)
    if config.get("encoder_hid_dim_type") == "text_proj":
        return "kolors"
    added, width = config.get("addition_embed_type"), config.get("cross_attention_dim")
    if added == "text_time":
        return "stable-diffusion-xl-v1-refiner" if width == 1280 else "stable-diffusion-xl-v1-base"
    if added is not None:
        return f"unet-{added}"
    return "stable-diffusion-v2" if width == 1024 else "stable-diffusion-v1"


def prediction_from_config(kind: str, config: Mapping[str, Any]) -> str:
    """`prediction_type_of` from the scheduler's class name and its configuration."""
    prediction = config.get("prediction_type")
    if prediction in ("epsilon", "v_prediction", "sample"):
        return str(prediction)
    return "flow" if prediction == "flow_prediction" or "FlowMatch" in kind else ""


def fingerprint_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`base_fingerprint` from the weight shapes of the denoiser's linear and convolution layers, by module name.

    What an IP-Adapter or a motion adapter added to the model does not count.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        parts = name.split(".")
        if parts[0] == "image_proj" or any(part in _ADDED for part in parts):
            continue
        if any(part.isdigit() for part in parts):
            digest.update(f"{name}:{shape}\n".encode())
    return digest.hexdigest()[:16]


def weight_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Weight shapes of the linear and convolution layers by module name, adapters of any kind looked through.

    What `fuse_qkv_projections` adds is a copy of the layers beside it, and does not count.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    copies: set[str] = set()
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False):
            copies |= {f"{name}.{copy}" for copy in ("to_qkv", "to_kv", "to_added_qkv")}
        if name.endswith(".base_layer") or ".lora_" in name or name in copies:
            continue
        layer = base_layer(module)
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, _CONVOLUTIONS):
            shapes[name] = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return shapes


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that `module` wraps when it is an adapter layer, otherwise `module`."""
    inner = getattr(module, "base_layer", None)
    return base_layer(inner) if isinstance(inner, nn.Module) else module


def _slug(kind: str) -> str:
    kind = re.sub(r"(Transformer)?([23]D)?(Transformer)?([23]D)?Model$", "", kind) or kind
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind).lower()

"""What a pipeline is made of, as far as an adapter has to know: components, architecture, prediction type, shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

from .errors import PipelineError


_NAMED = {
    "SD3Transformer2DModel": "stable-diffusion-3",
    "FluxTransformer2DModel": "flux-1-dev",
    "Flux2Transformer2DModel": "flux-2",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lora_components(pipe: Any) -> dict[str, Any]:
    """The components of `pipe` that can carry a LoRA, by name, as the pipeline itself declares them.

    Raises:
        PipelineError: (a TypeError) the pipeline cannot load a LoRA.
    """
    names = getattr(pipe, "_lora_loadable_modules", None) or ()
    models = {name: getattr(pipe, name, None) for name in names}
    found = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    if not any(hasattr(model, "load_lora_adapter") for model in found.values()):
        raise PipelineError(
            f"{type(pipe).__name__} cannot load a LoRA: it declares no component that can carry one "
            f"({', '.join(names) or 'none'})"
        )
    return found


def architecture_of(pipe: Any) -> str:
    """The architecture of the denoiser, such as `stable-diffusion-v1`, `stable-diffusion-xl-v1-base` or `flux-1-dev`.

    Names follow the modelspec header where it has one, otherwise the model's class. Width and depth are not part of
    the name: `base_fingerprint` tells those apart.

    Raises:
        PipelineError: the pipeline cannot load a LoRA.
    """
    model = _denoiser(pipe)
    return architecture_from_config(type(model).__name__, getattr(model, "config", {}))


def architecture_from_config(kind: str, config: Mapping[str, Any]) -> str:
    """`architecture_of` from the denoiser's class name and its configuration, as its config.json has it."""
    if kind != "UNet2DConditionModel":
        return _NAMED.get(kind) or _slug(kind)
    if config.get("encoder_hid_dim_type") == "text_proj":
        return "kolors"
    added, width = config.get("addition_embed_type"), config.get("cross_attention_dim")
    if added == "text_time":
        return "stable-diffusion-xl-v1-refiner" if width == 1280 else "stable-diffusion-xl-v1-base"
    if added is not None:
        return f"unet-{added}"
    return "stable-diffusion-v2" if width == 1024 else "stable-diffusion-v1"


def prediction_type_of(pipe: Any) -> str:
    """`epsilon`, `v_prediction`, `sample` or `flow`, as the scheduler says; empty when it says nothing."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return ""
    return prediction_from_config(type(scheduler).__name__, scheduler.config)


def prediction_from_config(kind: str, config: Mapping[str, Any]) -> str:
    """`prediction_type_of` from the scheduler's class name and its configuration."""
    prediction = config.get("prediction_type")
    if prediction in ("epsilon", "v_prediction", "sample"):
        return str(prediction)
    return "flow" if prediction == "flow_prediction" or "FlowMatch" in kind else ""


def base_fingerprint(pipe: Any) -> str:
    """16 hex digits over the shapes of the denoiser's numbered blocks.

    Fine-tunes of one architecture share it, and so do their inpainting variants, whose first layer alone is wider; a
    model of other width or depth has another one.

    Raises:
        PipelineError: the pipeline cannot load a LoRA.
    """
    return fingerprint_of_shapes(weight_shapes(_denoiser(pipe)))


def fingerprint_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`base_fingerprint` from the weight shapes of the denoiser's linear and convolution layers, by module name."""
    digest = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        if any(part.isdigit() for part in name.split(".")):
            digest.update(f"{name}:{shape}\n".encode())
    return digest.hexdigest()[:16]


def base_model_of(pipe: Any) -> str:
    """The base model's name without the folders before it, empty when unknown."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None) or ""
    return PurePath(str(name)).name


def weight_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Weight shapes of the linear and convolution layers by module name, adapters of any kind looked through."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or ".lora_" in name:
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


def _denoiser(pipe: Any) -> Any:
    components = lora_components(pipe)
    model = next(model for model in components.values() if hasattr(model, "load_lora_adapter"))
    return getattr(model, "_orig_mod", model)


def _slug(kind: str) -> str:
    kind = re.sub(r"(Transformer)?([23]D)?(Transformer)?([23]D)?Model$", "", kind) or kind
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind).lower()

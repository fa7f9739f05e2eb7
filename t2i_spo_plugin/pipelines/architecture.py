"""What a pipeline is made of, as far as an adapter has to know: components, architecture, prediction type, shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

from t2i_spo_plugin.adapters.architecture import (
    architecture_from_config,
    fingerprint_of_shapes,
    prediction_from_config,
    weight_shapes,
)
from t2i_spo_plugin.errors import PipelineError


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


def lora_converter(pipe: Any) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None:
    """The pipeline's own reader of other programs' layouts, as `read_adapter` takes it.

    None for UNets: all their names are known, and upstream's reader takes whatever begins like one of theirs.
    """
    if "unet" in lora_components(pipe):
        return None

    def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        result = type(pipe).lora_state_dict(tensors)
        state: Mapping[str, Tensor] = result[0] if isinstance(result, tuple) else result
        return state

    return convert


def architecture_of(pipe: Any) -> str:
    """The architecture of the denoiser, such as `stable-diffusion-v1`, `stable-diffusion-xl-v1-base` or `flux-1-dev`.

    Names follow the modelspec header where it has one, otherwise the model's class. Width and depth are not part of
    the name: `base_fingerprint` tells those apart.

    Raises:
        PipelineError: the pipeline cannot load a LoRA.
    """
    model = _denoiser(pipe)
    config = dict(getattr(model, "config", {}))
    if hasattr(model, "text_encoder_hid_proj"):
        # An IP-Adapter has written its own kind of projection over that of Kolors.
        config["encoder_hid_dim_type"] = "text_proj"
    return architecture_from_config(type(model).__name__, config)


def prediction_type_of(pipe: Any) -> str:
    """`epsilon`, `v_prediction`, `sample` or `flow`, as the scheduler says; empty when it says nothing."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return ""
    return prediction_from_config(type(scheduler).__name__, scheduler.config)


def base_fingerprint(pipe: Any) -> str:
    """16 hex digits over the shapes of the denoiser's numbered blocks.

    Fine-tunes of one architecture share it, and so do their inpainting variants, whose first layer alone is wider; a
    model of other width or depth has another one.

    Raises:
        PipelineError: the pipeline cannot load a LoRA.
    """
    return fingerprint_of_shapes(weight_shapes(_denoiser(pipe)))


def base_model_of(pipe: Any) -> str:
    """The base model's name without the folders before it, empty when unknown."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None) or ""
    return PurePath(str(name)).name


def _denoiser(pipe: Any) -> Any:
    components = lora_components(pipe)
    model = next(model for model in components.values() if hasattr(model, "load_lora_adapter"))
    return getattr(model, "_orig_mod", model)

"""How a pipeline stores weights, as far as an adapter has to be stored beside them: hooks, names and types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i_spo_plugin.adapters import LoraPair
from t2i_spo_plugin.errors import AdapterError, IncompatibleAdapterError

from .lora_layers import tuner_layers


# Names under which diffusers registers its hooks; tested with diffusers 0.42.
_CASTING, _GROUP_OFFLOADING = "layerwise_casting", "group_offloading"


def check_casting(components: Mapping[str, Any]) -> None:
    """Refuse models whose layers are stored in 8 bits and widened while they run: adapters would be stored like them.

    Raises:
        AdapterError: a component is one.
    """
    for component, model in components.items():
        if any(_hooks(model, _CASTING)):
            raise AdapterError(
                f"pipe.{component} stores its layers in a narrow type (enable_layerwise_casting), and adapters that "
                f"come later would be stored in it too; load them first, then call "
                f"pipe.{component}.enable_layerwise_casting()"
            )


def check_on_disk(components: Mapping[str, Any], what: str, cure: str) -> None:
    """Refuse models whose weights lie on the disk: changed layers would be read back from files of other layers.

    Args:
        components: the pipeline's models.
        what: cannot be done, for the message.
        cure: what to do instead.

    Raises:
        AdapterError: a component is one.
    """
    for component, model in components.items():
        hooks = _hooks(model, _GROUP_OFFLOADING)
        if any(getattr(getattr(hook, "config", None), "offload_to_disk_path", None) for hook in hooks):
            raise AdapterError(
                f"pipe.{component} is offloaded to the disk (enable_group_offload with offload_to_disk_path), where "
                f"{what}; {cure}"
            )


def check_fusable(components: Mapping[str, Any]) -> None:
    """Refuse to fuse adapters into weights that are quantised, or stored in 8 bits.

    What is fused is rounded to the grid of the weights, from which nothing brings it back. Of the libraries that
    quantise, some refuse it halfway (GGUF, torchao) and some say nothing and keep the old weights (quanto).

    Raises:
        AdapterError: a layer with an adapter has such weights.
    """
    for component, model in components.items():
        for path, layer in tuner_layers(model):
            weight = layer.get_base_layer().weight
            plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
            if not plain:
                kind = str(weight.dtype).removeprefix("torch.")
                stored = kind if type(weight) is nn.Parameter else f"{kind} by {type(weight).__name__}"
                raise AdapterError(
                    f"adapters cannot be fused into quantised weights: pipe.{component}.{path} is stored as {stored}, "
                    "which would round them away; leave them beside the weights, where they work as they are, or fuse "
                    "into the pipeline loaded without quantisation"
                )


def check_name(name: str) -> None:
    """Refuse a name under which torch cannot keep an adapter's layers.

    Raises:
        AdapterError: it is that of an attribute of the mapping that they are kept in.
    """
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            f"adapter_name {name!r} is an attribute of torch's ModuleDict, in which adapters are kept by name; pass "
            "another adapter_name"
        )


def check_numbers(components: Mapping[str, Any], matched: Mapping[str, Mapping[str, LoraPair]]) -> None:
    """Refuse weights that become infinite, or nothing at all, in the type of the model that they are attached to.

    Raises:
        IncompatibleAdapterError: there are such weights.
    """
    for component, pairs in matched.items():
        dtype = getattr(components[component], "dtype", None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            continue
        name = str(dtype).removeprefix("torch.")
        for path, pair in pairs.items():
            for matrix in (pair.down, pair.up):
                if torch.promote_types(matrix.dtype, dtype) == dtype:
                    continue
                before, after = _peak(matrix), _peak(matrix.to(dtype))
                if before > 0.0 and not 0.0 < after < float("inf"):
                    becomes = "infinite" if after else "zero"
                    raise IncompatibleAdapterError(
                        f"{component}.{path}: the largest weight is {before:.1e}, which is {becomes} in {name}, the "
                        f"type of pipe.{component}; load the pipeline in bfloat16 or float32"
                    )


def _peak(matrix: Tensor) -> float:
    return float(matrix.detach().abs().amax())


def _hooks(model: nn.Module, name: str) -> Iterator[Any]:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook(name) if registry is not None else None
        if hook is not None:
            yield hook

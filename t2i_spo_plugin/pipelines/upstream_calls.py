"""What diffusers' own LoRA calls do to adapters that they were not asked about, taken back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from .loaded import attached_adapters
from .lora_layers import injection, put_scale, requires_grad, restore_requires_grad, tuner_layers


_Scale: TypeAlias = tuple[Any, float]
"""A scale, and its number apart: models prepared for hotswapping hold scales as tensors, which change in place."""

_SCALES = "_spo_scales_before_fusing"
"""Attribute of a LoRA layer: the scales, by adapter, that what is fused into it had before."""


@contextmanager
def keep_active(models: Iterable[nn.Module], names: Iterable[str]) -> Iterator[None]:
    """Around `load_lora_weights`: what of the adapters `names` is on in a layer stays on, as strong as it was."""
    models, names = list(models), set(names)
    before = [(model, _states(model)) for model in models]
    try:
        with injection(models):
            yield
    finally:
        for model, states in before:
            flags = requires_grad(model)
            for path, layer in tuner_layers(model):
                active, scales = states.get(path, ([], {}))
                lost = [name for name in active if name in names - set(layer.active_adapters)]
                if lost:
                    layer.set_adapter([*layer.active_adapters, *lost])
                _put_scales(layer, {name: scale for name, scale in scales.items() if name in names})
            restore_requires_grad(model, flags)


@contextmanager
def keep_others(models: Iterable[nn.Module], deleted: Iterable[str]) -> Iterator[None]:
    """Around `delete_adapters`: what is not among the `deleted` is on where it was on, and as strong.

    PEFT switches some other adapter on in a layer where it deletes the only active one, and warns of it.
    """
    before, deleted = [(model, _states(model)) for model in models], set(deleted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was active which is now deleted")
            yield
    finally:
        for model, states in before:
            flags = requires_grad(model)
            for path, layer in tuner_layers(model):
                active, scales = states[path]
                left = [name for name in active if name not in deleted]
                if left != list(layer.active_adapters):
                    layer.set_adapter(left)
                _put_scales(layer, scales)
            restore_requires_grad(model, flags)


@contextmanager
def undo_scale(components: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[None]:
    """Around a pipeline's call: the scale among its `arguments` has gone again afterwards.

    diffusers divides by the scale to take it back, which leaves a rounding error, and after 0 it sets every strength
    to 1. What the call's own callbacks set through this package stays.
    """
    options = (value for name, value in arguments.items() if name.endswith("attention_kwargs"))
    if all(option.get("scale", 1.0) == 1.0 for option in options if isinstance(option, Mapping)):
        yield
        return
    requested = {name: adapter.requested for name, adapter in attached_adapters(components).items()}
    before = [(model, _states(model)) for model in components.values()]
    try:
        yield
    finally:
        for model, states in before:
            for path, layer in tuner_layers(model):
                _put_scales(layer, states[path][1] if path in states else {})
        for name, adapter in attached_adapters(components).items():
            record = adapter.requested
            if record is not requested.get(name):
                adapter.apply(record.strength, record.blocks)


@contextmanager
def without_fusing_scale(models: Iterable[nn.Module]) -> Iterator[None]:
    """Around `fuse_lora`: its `lora_scale` counts for what it fuses alone, and is noted for `undo_fusing_scale`.

    diffusers multiplies every active adapter by it, those too that are fused already and would come out of the weights
    with another strength than they went in with.
    """
    before = [
        (model, _states(model), {path: list(layer.merged_adapters) for path, layer in tuner_layers(model)})
        for model in models
    ]
    try:
        yield
    finally:
        for model, states, merged in before:
            for path, layer in tuner_layers(model):
                _, scales = states[path]
                fresh = set(layer.merged_adapters) - set(merged[path])
                noted = {name: scale for name, scale in scales.items() if name in fresh}
                setattr(layer, _SCALES, {**getattr(layer, _SCALES, {}), **noted})
                _put_scales(layer, {name: scale for name, scale in scales.items() if name not in fresh})


def undo_fusing_scale(models: Iterable[nn.Module]) -> None:
    """After `unfuse_lora`: what is not fused any more has the strength that it had before it was."""
    for model in models:
        for _, layer in tuner_layers(model):
            noted: dict[str, _Scale] = getattr(layer, _SCALES, {})
            _put_scales(layer, {name: noted.pop(name) for name in set(noted) - set(layer.merged_adapters)})


def _states(model: nn.Module) -> dict[str, tuple[list[str], dict[str, _Scale]]]:
    """By module path: which adapters are active, and how each is scaled."""
    return {
        path: (
            list(layer.active_adapters),
            {name: (scale, float(scale)) for name, scale in getattr(layer, "scaling", {}).items()},
        )
        for path, layer in tuner_layers(model)
    }


def _put_scales(layer: Any, scales: Mapping[str, _Scale]) -> None:
    for name, (holder, scale) in scales.items():
        if name in layer.scaling and (layer.scaling[name] is not holder or float(holder) != scale):
            layer.scaling[name] = holder
            put_scale(layer.scaling, name, scale)

"""The LoRA layers inside a model: attach one adapter, switch it, detach it, leave every other as it was."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .adapter import LoraPair
from .errors import AdapterError


RECORD = "_spo_loaded"
"""Attribute of a PEFT configuration that tells a safety adapter from others; it lives and dies with the adapter."""


def switch(models: Iterable[nn.Module], name: str, strength: float) -> None:
    """Apply the adapter `name` with `strength` in all `models`; at 0 it is off, so that the base model is met exactly.

    The other adapters keep their order, activity and strength, and what was trainable stays so.
    """
    for model in models:
        if name not in getattr(model, "peft_config", {}):
            continue
        flags = _requires_grad(model)
        for _, layer in tuner_layers(model):
            others = [other for other in layer.active_adapters if other != name]
            wanted = [*others, name] if strength > 0.0 else others
            if name in getattr(layer, "scaling", {}) and strength > 0.0:
                layer.set_scale(name, strength)
            if wanted != list(layer.active_adapters):
                layer.set_adapter(wanted)
        _restore_requires_grad(model, flags)


def reorder(models: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Sum the active adapters among `names` in that order, after all others; activity and strengths stay."""
    for model in models:
        flags = _requires_grad(model)
        for _, layer in tuner_layers(model):
            active = list(layer.active_adapters)
            wanted = [name for name in active if name not in names] + [name for name in names if name in active]
            if wanted != active:
                layer.set_adapter(wanted)
        _restore_requires_grad(model, flags)


def attach(
    pipe: Any, component: str, name: str, pairs: Mapping[str, LoraPair], strength: float, before: Snapshot
) -> None:
    """Add `pairs` (by module path) as the adapter `name` with `strength`, frozen, exact alphas, beside the others.

    Diffusers does the injection, which knows about offloading, quantised layers and devices. It is given no alphas,
    which it would look for by patterns: they are set on the layers afterwards.

    Raises:
        AdapterError: a module did not take its pair.
    """
    model = getattr(pipe, component)
    halves = {f"{path}.lora_A.weight": pair.down for path, pair in pairs.items()}
    halves |= {f"{path}.lora_B.weight": pair.up for path, pair in pairs.items()}
    with warnings.catch_warnings():
        # A second adapter beside the first is what is wanted here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if hasattr(model, "load_lora_adapter"):
            model.load_lora_adapter(halves, prefix=None, adapter_name=name, low_cpu_mem_usage=True, _pipeline=pipe)
        else:
            pipe.load_lora_into_text_encoder(
                {f"{component}.{key}": half for key, half in halves.items()},
                network_alphas=None,
                text_encoder=model,
                prefix=component,
                adapter_name=name,
                low_cpu_mem_usage=True,
                _pipeline=pipe,
            )
    layers = dict(tuner_layers(model))
    for path, pair in pairs.items():
        if name not in getattr(layers.get(path), "lora_A", {}):
            raise AdapterError(f"{component}.{path} did not take the adapter")
        layers[path].lora_alpha[name] = pair.alpha
        layers[path].set_scale(name, strength if strength > 0.0 else 1.0)
    config = model.peft_config[name]
    config.lora_alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    config.alpha_pattern = {f"^{path}": pair.alpha for path, pair in pairs.items() if pair.alpha != config.lora_alpha}
    before.restore_others(model, name if strength > 0.0 else None)


def detach(model: Any, name: str) -> None:
    """Remove the adapter `name`; layers that carry no adapter any more are the base model's own again."""
    if set(getattr(model, "peft_config", {})) - {name}:
        flags = _requires_grad(model)
        # Switched off first: PEFT would make some other adapter active in its place.
        switch([model], name, 0.0)
        if hasattr(model, "delete_adapters"):
            model.delete_adapters(name)
        else:
            for _, layer in tuner_layers(model):
                layer.delete_adapter(name)
            model.peft_config.pop(name, None)
        _unwrap(model, only_empty=True)
        _restore_requires_grad(model, flags)
    elif hasattr(model, "unload_lora"):
        model.unload_lora()
    else:
        _unwrap(model, only_empty=False)
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False


class Snapshot:
    """What attaching an adapter changes besides adding it: who is active, and what is trainable."""

    def __init__(self, model: Any) -> None:
        self.active = {path: list(layer.active_adapters) for path, layer in tuner_layers(model)}
        self.flags = _requires_grad(model)

    def restore_others(self, model: Any, also: str | None = None) -> None:
        """Everything as before, for the adapters that were there before; the adapter `also` is on, and frozen."""
        default = next(iter(self.active.values()), [])
        for path, layer in tuner_layers(model):
            active = [*self.active.get(path, default), *([] if also is None else [also])]
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
        _restore_requires_grad(model, self.flags)

    def restore(self, model: Any, name: str) -> None:
        """Everything as before, the adapter `name` gone."""
        detach(model, name)
        self.restore_others(model)


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT has wrapped, by module path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def strength_in_force(model: nn.Module, name: str) -> float:
    """What the adapter `name` is multiplied with now; 0 when it is off."""
    for _, layer in tuner_layers(model):
        if name in getattr(layer, "scaling", {}):
            if name not in layer.active_adapters or layer.disable_adapters:
                return 0.0
            rank = layer.r[name]
            divisor = math.sqrt(rank) if layer.use_rslora.get(name, False) else rank
            return float(layer.scaling[name] * divisor / layer.lora_alpha[name])
    return 0.0


def _unwrap(model: nn.Module, only_empty: bool) -> None:
    for path, layer in tuner_layers(model):
        if only_empty and len(getattr(layer, "lora_A", ())) + len(getattr(layer, "lora_embedding_A", ())) > 0:
            continue
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _requires_grad(model: nn.Module) -> dict[int, bool]:
    return {id(parameter): parameter.requires_grad for parameter in model.parameters()}


def _restore_requires_grad(model: nn.Module, flags: Mapping[int, bool]) -> None:
    for parameter in model.parameters():
        wanted = flags.get(id(parameter), False)
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)

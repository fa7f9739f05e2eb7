"""The LoRA layers inside a model: attach one adapter, switch, exchange, detach it, leave every other as it was."""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from t2i_spo_plugin.adapters import LoraPair
from t2i_spo_plugin.errors import AdapterError, IncompatibleAdapterError

from .missing_weights import only_missing_from_new


_ONE_AT_A_TIME = threading.RLock()


_FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def switch(model: nn.Module, name: str, strengths: Mapping[str, float]) -> None:
    """Apply the adapter `name` with `strengths` by module path; at 0 it is off, so that the base model is met exactly.

    A module that `strengths` do not name is off. The other adapters keep their order, activity and strength, and what
    was trainable stays so. What is off has a scale of 0 besides, because PEFT makes some other adapter active where an
    active one is deleted.
    """
    stabilised = _is_stabilised(model, name)
    flags = requires_grad(model)
    for path, layer in tuner_layers(model):
        strength = strengths.get(path, 0.0)
        others = [other for other in layer.active_adapters if other != name]
        active = [*others, name] if strength > 0.0 else others
        if name in getattr(layer, "scaling", {}):
            _set_scale(layer, name, strength, stabilised)
        if active != list(layer.active_adapters):
            layer.set_adapter(active)
    restore_requires_grad(model, flags)


def reorder(models: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Sum the active adapters among `names` in that order, after all others; activity and strengths stay."""
    for model in models:
        flags = requires_grad(model)
        for _, layer in tuner_layers(model):
            active = list(layer.active_adapters)
            ordered = [name for name in active if name not in names] + [name for name in names if name in active]
            if ordered != active:
                layer.set_adapter(ordered)
        restore_requires_grad(model, flags)


def attach(pipe: Any, component: str, name: str, pairs: Mapping[str, LoraPair], before: Snapshot) -> None:
    """Add `pairs` (by module path) as the adapter `name`, switched off, frozen, exact alphas, beside the others.

    Diffusers does the injection, which knows about offloading, quantised layers and devices. It is given no alphas,
    which it would look for by patterns: they are set on the layers afterwards.

    Raises:
        AdapterError: a module did not take its pair.
    """
    model = getattr(pipe, component)
    matrices = {f"{path}.lora_A.weight": pair.down for path, pair in pairs.items()}
    matrices |= {f"{path}.lora_B.weight": pair.up for path, pair in pairs.items()}
    with injection([model]), warnings.catch_warnings():
        # A second adapter beside the first is intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if hasattr(model, "load_lora_adapter"):
            model.load_lora_adapter(matrices, prefix=None, adapter_name=name, low_cpu_mem_usage=True, _pipeline=pipe)
        else:
            pipe.load_lora_into_text_encoder(
                {f"{component}.{key}": matrix for key, matrix in matrices.items()},
                network_alphas=None,
                text_encoder=model,
                prefix=component,
                adapter_name=name,
                low_cpu_mem_usage=True,
                _pipeline=pipe,
            )
    layers = dict(tuner_layers(model))
    for path in pairs:
        if name not in getattr(layers.get(path), "lora_A", {}):
            raise AdapterError(f"{component}.{path} did not take the adapter")
    _set_alphas(model, name, pairs)
    before.restore_others(model)


def check_room(component: str, model: nn.Module, name: str, pairs: Mapping[str, LoraPair]) -> None:
    """Refuse `pairs` that the layers of the adapter `name` cannot take over in place.

    Raises:
        IncompatibleAdapterError: a module has no such layer, a smaller one, or one whose weights are elsewhere.
    """
    layers = _layers_of(model, name)
    for path, pair in pairs.items():
        reason, cure = "", "unload it and load the new one"
        if path not in layers:
            reason = "is not changed by the adapter that is loaded"
        else:
            down, up = _matrices(layers[path], name)
            rank, room = pair.down.shape[0], down.shape[0]
            if down.is_meta or up.is_meta:
                reason = "has its weights offloaded"
            elif rank > room:
                reason = f"has room for rank {room}, the new adapter has {rank}"
                cure += f", or call pipe.enable_lora_hotswap(target_rank={rank}) before the first adapter is loaded"
            elif down[:rank].shape != pair.down.shape or up[:, :rank].shape != pair.up.shape:
                reason = "has weights of another shape"
        if reason:
            raise IncompatibleAdapterError(f"{name!r} cannot be swapped in place: {component}.{path} {reason}; {cure}")


def exchange(model: nn.Module, name: str, pairs: Mapping[str, LoraPair]) -> None:
    """Put `pairs` in the place of the weights of the adapter `name`: the same tensors, so that compiled code holds.

    What is left of a larger rank is filled with zeros, and so are modules that `pairs` do not have.
    """
    with torch.no_grad():
        for path, layer in _layers_of(model, name).items():
            down, up = _matrices(layer, name)
            down.zero_()
            up.zero_()
            if path in pairs:
                rank = pairs[path].down.shape[0]
                down[:rank].copy_(pairs[path].down)
                up[:, :rank].copy_(pairs[path].up)
    _set_alphas(model, name, pairs)


def pairs_of(model: nn.Module, name: str) -> dict[str, LoraPair]:
    """Copies of the adapter `name` on the CPU, by module path."""
    pairs, stabilised = {}, _is_stabilised(model, name)
    for path, layer in _layers_of(model, name).items():
        down, up = (matrix.detach().cpu().clone() for matrix in _matrices(layer, name))
        alpha = layer.lora_alpha[name]
        if stabilised:
            alpha = alpha * math.sqrt(down.shape[0])
        pairs[path] = LoraPair(down, up, float(alpha))
    return pairs


def detach(model: Any, name: str) -> None:
    """Remove the adapter `name`; layers that carry no adapter any more are the base model's own again."""
    if set(getattr(model, "peft_config", {})) - {name}:
        flags = requires_grad(model)
        # Switched off first: PEFT would make some other adapter active in its place.
        switch(model, name, {})
        if hasattr(model, "delete_adapters"):
            model.delete_adapters(name)
        else:
            for _, layer in tuner_layers(model):
                layer.delete_adapter(name)
            model.peft_config.pop(name, None)
        _unwrap(model, only_empty=True)
        restore_requires_grad(model, flags)
    elif hasattr(model, "unload_lora"):
        model.unload_lora()
        _forget_adapters(model)  # Older versions of diffusers leave the mark.
    else:
        _unwrap(model, only_empty=False)
        if hasattr(model, "peft_config"):
            del model.peft_config
        _forget_adapters(model)


@contextmanager
def injection(models: Iterable[nn.Module]) -> Iterator[None]:
    """Around whatever adds LoRA layers to `models`: one thread at a time, without a false alarm.

    PEFT patches `torch.nn.Module` meanwhile: two threads at once would leave the patch behind.
    """
    with _ONE_AT_A_TIME:
        names = {name for model in models for name in getattr(model, "peft_config", None) or {}}
        with only_missing_from_new(names):
            yield


class Snapshot:
    """What attaching an adapter changes besides adding it: who is active, how strongly, and what is trainable."""

    def __init__(self, model: Any) -> None:
        layers = tuner_layers(model)
        self.active = {path: list(layer.active_adapters) for path, layer in layers}
        self.scaling = {
            path: {n: float(s) for n, s in getattr(layer, "scaling", {}).items()} for path, layer in layers
        }
        self.flags = requires_grad(model)

    def restore_others(self, model: Any) -> None:
        """Everything as before, for the adapters that were there before; a new one is off, and frozen."""
        default = list(dict.fromkeys(name for names in self.active.values() for name in names))
        for path, layer in tuner_layers(model):
            active = self.active.get(path, default)
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
            for name, scaling in self.scaling.get(path, {}).items():
                if layer.scaling[name] != scaling:
                    put_scale(layer.scaling, name, scaling)
        restore_requires_grad(model, self.flags)

    def restore(self, model: Any, name: str) -> None:
        """Everything as before, the adapter `name` gone."""
        detach(model, name)
        self.restore_others(model)


def strengths_in_force(model: nn.Module, name: str) -> dict[str, float]:
    """What the adapter `name` is multiplied with now, by module path; 0 where it is off.

    A layer into which other adapters are fused applies those alone, and one that its attention bypasses none.
    """
    strengths, stabilised, bypassed = {}, _is_stabilised(model, name), bypassed_layers(model)
    for path, layer in tuner_layers(model):
        if name in getattr(layer, "scaling", {}):
            applied = layer.merged_adapters if layer.merged else layer.active_adapters
            on = name in applied and not layer.disable_adapters and path not in bypassed
            trained = layer.lora_alpha[name] / _rank_norm(layer, name, stabilised)
            strengths[path] = float(layer.scaling[name]) / trained if on else 0.0
    return strengths


def is_fused(model: nn.Module, name: str) -> bool:
    """Whether the adapter `name` is merged into the model's weights."""
    return any(name in layer.merged_adapters for _, layer in tuner_layers(model))


def bypassed_layers(model: nn.Module) -> set[str]:
    """The paths of the q, k and v that `fuse_qkv_projections` has put one layer in the place of.

    They stay where they are and are not called; the one layer is a copy of their weights without any adapter.
    """
    bypassed = set()
    for path, attention in _uncompiled(model).named_modules():
        if not getattr(attention, "fused_projections", False):
            continue
        # Unfusing takes back the mark of the newer attention classes, and only the processor of the older one.
        if not hasattr(attention, "unfuse_projections") and "Fused" not in type(attention.processor).__name__:
            continue
        for one, several in _FUSED_PROJECTIONS.items():
            if hasattr(attention, one):
                bypassed |= {f"{path}.{name}" for name in several}
    return bypassed


def _set_alphas(model: Any, name: str, pairs: Mapping[str, LoraPair]) -> None:
    """The alphas of `pairs` on the layers and in the configuration, at full strength.

    A layer with more room than the pair's rank counts the room as its rank, and alpha grows with it: the scale stays,
    and whoever saves the adapter finds numbers that fit its weights.
    """
    alphas = {}
    for path, layer in _layers_of(model, name).items():
        if path not in pairs:
            continue
        room = layer.lora_A[name].weight.shape[0]
        layer.r[name] = room
        alphas[path] = layer.lora_alpha[name] = pairs[path].alpha * (room / pairs[path].down.shape[0])
        _set_scale(layer, name, 1.0, _is_stabilised(model, name))
    config = model.peft_config[name]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def requires_grad(model: nn.Module) -> dict[str, bool]:
    """What is trainable in `model`, by parameter name without adapters around the layers."""
    # By name, not by identity: offloading puts new parameters in the place of old ones.
    return {_unwrapped(name): parameter.requires_grad for name, parameter in model.named_parameters()}


def restore_requires_grad(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Make trainable what was so when `requires_grad` gave `flags`, and nothing else."""
    for name, parameter in model.named_parameters():
        flag = flags.get(_unwrapped(name), False)
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def _unwrapped(name: str) -> str:
    """A parameter's name as it is without an adapter around its layer."""
    return name.replace(".base_layer.", ".")


# PEFT's internals that this relies on; tested with peft 0.15 and 0.21.
# - `LoraLayer.set_scale` is not used: in 0.15 it does not know rank-stabilised adapters (`use_rslora`), and it puts a
#   number in the place of the tensor that compiled code reads.
# - `peft.utils.hotswap` is not used: it wants the same modules in both adapters, and prefixes by tuner.


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT has wrapped, by module path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = _uncompiled(model).named_modules()
    return [(path, module) for path, module in modules if isinstance(module, BaseTunerLayer)]


def caching_hooks(model: nn.Module) -> list[str]:
    """The names of diffusers' hooks in `model` that keep results of one denoising step for another (step caches)."""
    hooks = [
        (name, hook)
        for module in _uncompiled(model).modules()
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items()
    ]
    # Hooks of offloading, casting and layer skipping hold nothing from one step to the next.
    return sorted({name for name, hook in hooks if getattr(hook, "_is_stateful", False)})


def _layers_of(model: nn.Module, name: str) -> dict[str, Any]:
    return {path: layer for path, layer in tuner_layers(model) if name in getattr(layer, "lora_A", {})}


def _matrices(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data


def _set_scale(layer: Any, name: str, strength: float, stabilised: bool) -> None:
    put_scale(layer.scaling, name, strength * layer.lora_alpha[name] / _rank_norm(layer, name, stabilised))


def _rank_norm(layer: Any, name: str, stabilised: bool) -> float:
    rank: int = layer.r[name]
    return math.sqrt(rank) if stabilised else rank


def _is_stabilised(model: Any, name: str) -> bool:
    """Whether the scale of the adapter `name` is alpha over the root of the rank."""
    config = getattr(model, "peft_config", {}).get(name)
    return bool(getattr(config, "use_rslora", False))


def put_scale(scaling: dict[str, Any], name: str, value: float) -> None:
    """Models prepared for hotswapping hold scalings as tensors, which compiled code reads: those are kept."""
    if isinstance(scaling[name], torch.Tensor):
        scaling[name].fill_(value)
    else:
        scaling[name] = value


def _unwrap(model: nn.Module, only_empty: bool) -> None:
    for path, layer in tuner_layers(model):
        if only_empty and len(getattr(layer, "lora_A", ())) + len(getattr(layer, "lora_embedding_A", ())) > 0:
            continue
        parent, _, child = path.rpartition(".")
        setattr(_uncompiled(model).get_submodule(parent), child, layer.get_base_layer())


def _uncompiled(model: Any) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` makes, into which an adapter may have been loaded."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _forget_adapters(model: Any) -> None:
    """Take off the mark by which diffusers and transformers know that a model carries adapters."""
    model._hf_peft_config_loaded = False

"""An adapter for a ComfyUI model: where each of its modules belongs there, by ComfyUI's own key maps.

A key map is a plain mapping from the names that LoRA files use to the weight that a name stands for: the weight's
name, or a tuple of it, the part `(dimension, start, length)` of the weight (None is all), and maybe a
function to apply to the change first. Nothing of ComfyUI is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import UnsupportedAdapterError

from .adapter import Adapter
from .compatibility import Target, match_modules
from .layouts.denoiser import original_name
from .lora import LoraPair


PatchKey = Any
"""What ComfyUI patches a weight by: a weight's name, or a tuple that begins with it."""

_TRANSFORMER_NAMES = ("transformer.{path}", "lycoris_{flat}", "base_model.model.{path}", "diffusion_model.{path}")
_NAMES = {
    "unet": ("lora_unet_{flat}",),
    "transformer": _TRANSFORMER_NAMES,
    "text_encoder": ("text_encoder.{path}", "lora_te_{flat}", "lora_te1_{flat}"),
    "text_encoder_2": ("text_encoder_2.{path}", "lora_te2_{flat}"),
    "text_encoder_3": ("lora_te3_{flat}",),
}
"""How key maps may name a module of a pipeline component, the likeliest first."""


@dataclass(frozen=True)
class ComfyBase:
    """What `fit_adapter` has to know of a ComfyUI model, and of the CLIP that is connected with it.

    Attributes:
        architecture: as `AdapterMetadata.base_architecture`; empty when unknown.
        prediction_type: as `AdapterMetadata.prediction_type`; empty when unknown.
        keys: the key maps of the model and of the CLIP, together.
        shapes: of all weights of both, by name.
        has_clip: whether a CLIP is connected.
    """

    architecture: str
    prediction_type: str
    keys: Mapping[str, PatchKey]
    shapes: Mapping[str, tuple[int, ...]]
    has_clip: bool


@dataclass(frozen=True)
class Fit:
    """An adapter and where it goes in one ComfyUI model.

    Attributes:
        adapter: as it was read.
        places: patch key by module name, for every module that has a place.
        missing: names of the modules that have none.
        notes: what a user should know, a sentence each.
    """

    adapter: Adapter
    places: dict[str, PatchKey]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def fit_adapter(adapter: Adapter, base: ComfyBase, strict: bool = True) -> Fit:
    """Find the place of every module of `adapter` in a ComfyUI model.

    Args:
        adapter: in the neutral form, whatever file it was read from.
        base: the model.
        strict: refuse an adapter of which only a part has a place; False leaves that part out, with a note.

    Raises:
        AdapterError: as `compatibility.match_modules` refuses it.
    """

    def lacks(name: str) -> str:
        if not name.startswith("text_encoder"):
            return "this model lacks"
        return "this CLIP lacks" if base.has_clip else "no CLIP is connected for"

    target = Target("model", base.architecture, base.prediction_type, lacks)
    places = {name: place for name in adapter.modules if (place := _place(name, base)) is not None}
    weights = {
        name: (place, _with_dimensions(_shape(place, base.shapes), len(adapter.modules[name].shape)))
        for name, place in places.items()
    }
    match = match_modules(adapter, target, weights, strict)
    return Fit(adapter, match.places, match.missing, (*adapter.notes, *match.problems, *match.notes))


def lora_tensors(fit: Fit) -> tuple[dict[str, Tensor], dict[str, PatchKey]]:
    """The two arguments of `comfy.lora.load_lora`: the tensors of a LoRA file, and the weight of each of its names."""
    tensors: dict[str, Tensor] = {}
    for name in fit.places:
        pair = fit.adapter.modules[name]
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors, fit.places


def bypass_pairs(
    fits: Sequence[tuple[Fit, float]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The changes of several adapters as one pair a weight, for a forward pass beside the weight.

    Args:
        fits: each with its strength.
        shapes: of the weights, by name.

    Returns:
        By name of the weight, `down [R, in, *kernel]` and `up [out, R]` in float32, scales and strengths folded into
        `up`; rows of the weight that an adapter leaves alone are 0.

    Raises:
        UnsupportedAdapterError: an adapter changes a part of a weight that is not a range of its rows.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for fit, strength in fits:
        for name, place in fit.places.items():
            weight = _weight(place)
            pair = fit.adapter.modules[name]
            pairs.setdefault(weight, []).append(_bypass_pair(pair, strength, place, shapes[weight]))
    return {
        weight: (torch.cat([down for down, _ in parts]), torch.cat([up for _, up in parts], dim=1))
        for weight, parts in pairs.items()
    }


def describe(fit: Fit, strength: float) -> str:
    """What an adapter is and how it was applied, for people, a line each."""
    metadata, total = fit.adapter.metadata, len(fit.adapter.modules)
    lines = [
        metadata.title,
        f"base: {metadata.base_architecture or 'not stated'}, predicts {metadata.prediction_type or 'not stated'}",
        f"rank {fit.adapter.rank}, {len(fit.places)} of {total} modules applied, strength {strength:g}",
        *(f"{key}: {value}" for key, value in sorted(metadata.extra.items())),
        *(f"note: {note}" for note in fit.notes),
    ]
    return "\n".join(lines)


def _place(name: str, base: ComfyBase) -> PatchKey | None:
    """Its patch key; key maps also list weights that a shallower model does not have."""
    component, _, path = name.partition(".")
    names = [form.format(path=path, flat=path.replace(".", "_")) for form in _NAMES.get(component, ())]
    names.append(f"diffusion_model.{original_name(name, base.architecture)}")
    places = (base.keys[name] for name in names if name in base.keys)
    return next((place for place in places if _weight(place) in base.shapes), None)


def _weight(place: PatchKey) -> str:
    return str(place if isinstance(place, str) else place[0])


def _part(place: PatchKey) -> tuple[tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]:
    """The part of the weight that is changed, and the function for the change."""
    if isinstance(place, str):
        return None, None
    return place[1], place[2] if len(place) > 2 else None


def _shape(place: PatchKey, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape, (part, _) = list(shapes[_weight(place)]), _part(place)
    if part is not None:
        shape[part[0]] = part[2]
    return tuple(shape)


def _with_dimensions(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`shape` in `count` dimensions where it can be: a 1 x 1 convolution is the linear layer of its first two."""
    core = shape[:2] if all(size == 1 for size in shape[2:]) else shape
    return core + (1,) * (count - len(core))


def _bypass_pair(pair: LoraPair, strength: float, place: PatchKey, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    part, function = _part(place)
    if part is not None and part[0] != 0:
        raise UnsupportedAdapterError(
            f"{_weight(place)} is changed in a range of its columns, which cannot be steered; use a fixed strength"
        )
    down = pair.down.detach().float().reshape(pair.rank, *shape[1:])
    up = pair.up.detach().float().flatten(1) * (pair.scale * strength)
    if function is not None:
        up = function(up)
    if part is None:
        return down, up
    whole = up.new_zeros(shape[0], up.shape[1])
    whole[part[1] : part[1] + part[2]] = up
    return down, whole

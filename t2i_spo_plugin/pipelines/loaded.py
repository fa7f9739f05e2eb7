"""What a pipeline knows of a safety adapter that is attached: its record, and the strengths that are in force."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from t2i_spo_plugin.adapters import AdapterMetadata
from t2i_spo_plugin.adapters.strengths import by_block, factor_at
from t2i_spo_plugin.gating.schedule import AdapterGate, Schedule

from .lora_layers import FACTORS, RECORD, strengths_in_force, switch


__all__ = ["LoadedAdapter", "apply", "in_force", "is_safety", "strengths_of"]


@dataclass(frozen=True)
class LoadedAdapter:
    """A safety adapter as it is attached to a pipeline.

    Attributes:
        name: the adapter's name in the pipeline.
        strength: the multiplier it is applied with where `blocks` say nothing else.
        window: the part of the denoising in which it is on, 0 is pure noise and 1 the finished image.
        source: where it came from.
        metadata: what its header says.
        components: the pipeline components that carry it.
        modules: how many modules it changes.
        notes: what a user should know, such as another checkpoint than the one it was trained on.
        blocks: strengths by block of the models, such as `unet.mid_block`; of several that fit, the longest counts.
        steering: a schedule or an adapter gate that changes the strength while an image is drawn.
        fused: whether it is merged into the weights, where its strength cannot be changed.
    """

    name: str
    strength: float
    window: tuple[float, float]
    source: str
    metadata: AdapterMetadata
    components: tuple[str, ...]
    modules: int
    notes: tuple[str, ...] = field(default=())
    blocks: Mapping[str, float] = field(default_factory=dict)
    steering: Schedule | AdapterGate | None = None
    fused: bool = False


def is_safety(model: Any, name: str) -> bool:
    """Whether the adapter `name` of `model` is a safety adapter."""
    return hasattr(getattr(model, "peft_config", {}).get(name), RECORD)


def apply(component: str, model: Any, record: LoadedAdapter) -> None:
    """Note `record` in the model's configuration of the adapter, and put its strengths into force."""
    config = model.peft_config[record.name]
    factors = {
        path: factor_at(f"{component}.{path}", record.blocks) for path in strengths_in_force(model, record.name)
    }
    setattr(config, RECORD, record)
    setattr(config, FACTORS, factors if record.blocks else {})
    switch([model], record.name, record.strength)


def strengths_of(components: Mapping[str, Any], name: str) -> dict[str, float]:
    """The strengths of the adapter `name` that are in force, by component and module path."""
    return {
        f"{component}.{path}": strength
        for component, model in components.items()
        for path, strength in strengths_in_force(model, name).items()
    }


def in_force(record: LoadedAdapter, strengths: Mapping[str, float]) -> LoadedAdapter:
    """`record` as it is when `strengths` (by module path) say otherwise than it does."""

    def noted(path: str) -> float:
        return record.strength * factor_at(path, record.blocks)

    if all(math.isclose(value, noted(path), rel_tol=1e-6, abs_tol=1e-9) for path, value in strengths.items()):
        return record
    values = list(strengths.values())
    if all(math.isclose(value, values[0], rel_tol=1e-6, abs_tol=1e-9) for value in values):
        return replace(record, strength=values[0], blocks={})
    return replace(record, strength=1.0, blocks=by_block(strengths))

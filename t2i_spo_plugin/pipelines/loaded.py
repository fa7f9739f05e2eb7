"""A safety adapter on a pipeline: what was loaded, and the one object that attaches, scales and detaches it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from t2i_spo_plugin.adapters import AdapterMetadata, LoraPair
from t2i_spo_plugin.adapters.strengths import by_block, factor_at
from t2i_spo_plugin.errors import IncompatibleAdapterError
from t2i_spo_plugin.gating import AdapterGate, Schedule

from .lora_layers import Snapshot, attach, check_room, detach, exchange, is_fused, pairs_of, strengths_in_force, switch


_RECORD = "_spo_loaded"
"""Attribute of an adapter's PEFT configuration that tells a safety adapter from others and dies with it."""


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
        steering: a schedule or an adapter gate that changes the strength while an image is generated.
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


class AttachedAdapter:
    """One safety adapter on the models of a pipeline: attach, exchange, scale, detach it.

    It holds no state of its own, so whatever diffusers does to the pipeline is seen. PEFT's layers hold the weights
    and the strengths in force; the adapter's PEFT configuration carries the `LoadedAdapter` that was asked for, which
    the layers cannot say. Everything else follows from these two.

    Args:
        components: the pipeline's models that can carry a LoRA, by name (`lora_components`).
        name: the adapter's name in the pipeline.
    """

    def __init__(self, components: Mapping[str, Any], name: str) -> None:
        self.components, self.name = components, name

    @property
    def models(self) -> dict[str, Any]:
        """The models that carry it, by component."""
        return {component: model for component, model in self.components.items() if is_safety(model, self.name)}

    @property
    def requested(self) -> LoadedAdapter:
        """The adapter as it was loaded, with the strength last set through this package."""
        record: LoadedAdapter = getattr(next(iter(self.models.values())).peft_config[self.name], _RECORD)
        return record

    @property
    def in_force(self) -> LoadedAdapter:
        """The adapter with the strengths that its layers apply now, whoever set them."""
        fused = any(is_fused(model, self.name) for model in self.components.values())
        return replace(_with_strengths(self.requested, strengths_of(self.components, self.name)), fused=fused)

    def attach(self, pipe: Any, matched: Mapping[str, Mapping[str, LoraPair]], record: LoadedAdapter) -> None:
        """Add it to `pipe` beside all others; on any error every model is as it was.

        Args:
            pipe: the pipeline.
            matched: the adapter's pairs by component and module path.
            record: what is asked for.
        """
        snapshots = {component: Snapshot(self.components[component]) for component in matched}
        try:
            for component, pairs in matched.items():
                attach(pipe, component, self.name, pairs, snapshots[component])
                self._record(component, record)
        except BaseException:
            for component, snapshot in snapshots.items():
                snapshot.restore(self.components[component], self.name)
            raise

    def exchange(self, matched: Mapping[str, Mapping[str, LoraPair]], record: LoadedAdapter) -> None:
        """Put other weights in its place, in the same tensors; on any error every model is as it was.

        Raises:
            IncompatibleAdapterError: the weights do not fit into these tensors.
        """
        models, before = self.models, self.requested
        if set(models) != set(matched):
            raise IncompatibleAdapterError(
                f"{self.name!r} cannot be swapped in place: it changes {', '.join(models)}, the new adapter "
                f"{', '.join(matched)}; unload it and load the new one"
            )
        for component, model in models.items():
            check_room(component, model, self.name, matched[component])
        snapshots = {component: (Snapshot(model), pairs_of(model, self.name)) for component, model in models.items()}
        try:
            for component, model in models.items():
                exchange(model, self.name, matched[component])
                self._record(component, record)
        except BaseException:
            for component, (snapshot, pairs) in snapshots.items():
                exchange(models[component], self.name, pairs)
                self._record(component, before)
                snapshot.restore_others(models[component])
            raise

    def scale(self, strength: float, blocks: Mapping[str, float]) -> None:
        """Set its strength, for good."""
        record = replace(self.requested, strength=strength, blocks=blocks)
        for component in self.models:
            self._record(component, record)

    def apply(self, strength: float, blocks: Mapping[str, float]) -> None:
        """Put `strength` into force times what `blocks` say, until another one is; `requested` stays."""
        for component, model in self.models.items():
            paths = strengths_in_force(model, self.name)
            switch(model, self.name, {path: strength * factor_at(f"{component}.{path}", blocks) for path in paths})

    def detach(self) -> None:
        """Take it off every model."""
        for model in self.components.values():
            if self.name in getattr(model, "peft_config", {}):
                detach(model, self.name)

    def _record(self, component: str, record: LoadedAdapter) -> None:
        """Note what is asked for in the model's configuration of the adapter, and put its strengths into force."""
        model = self.components[component]
        setattr(model.peft_config[self.name], _RECORD, record)
        AttachedAdapter({component: model}, self.name).apply(record.strength, record.blocks)


def attached_adapters(components: Mapping[str, Any]) -> dict[str, AttachedAdapter]:
    """The safety adapters on the models `components`, by name."""
    names = dict.fromkeys(
        name for model in components.values() for name in getattr(model, "peft_config", {}) if is_safety(model, name)
    )
    return {name: AttachedAdapter(components, name) for name in names}


def is_safety(model: Any, name: str) -> bool:
    """Whether the adapter `name` of `model` is a safety adapter."""
    return hasattr((getattr(model, "peft_config", None) or {}).get(name), _RECORD)


def strengths_of(components: Mapping[str, Any], name: str) -> dict[str, float]:
    """The strengths of the adapter `name` that are in force, by component and module path."""
    return {
        f"{component}.{path}": strength
        for component, model in components.items()
        for path, strength in strengths_in_force(model, name).items()
    }


def _with_strengths(record: LoadedAdapter, strengths: Mapping[str, float]) -> LoadedAdapter:
    """`record` with `strengths` (by module path) where they are others than it says."""

    def requested(path: str) -> float:
        return record.strength * factor_at(path, record.blocks)

    if all(_is_close(value, requested(path)) for path, value in strengths.items()):
        return record
    values = list(strengths.values())
    if all(_is_close(value, values[0]) for value in values):
        return replace(record, strength=values[0], blocks={})
    return replace(record, strength=1.0, blocks=by_block(strengths))


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)

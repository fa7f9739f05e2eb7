"""Several adapters on one base, side by side: safety and style, trained apart and summed when images are generated.

"Modular LoRA" (arXiv 2412.00357): fine-tuning an aligned model, even on benign data, can bring back what was
suppressed; so each adapter is trained on the base alone, and the weights are W0 + sum_k strength_k * delta_k.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from t2i_spo_plugin.adapters import Adapter, LoraPair, canonical
from t2i_spo_plugin.adapters.architecture import base_layer
from t2i_spo_plugin.adapters.merging import stack
from t2i_spo_plugin.errors import ConfigError

from .architecture import lora_components
from .loaded import LoadedAdapter, strengths_of
from .loading import adapter_of, load_spo_lora, unload_spo_lora
from .lora_layers import reorder, tuner_layers


Source: TypeAlias = "str | Path | Adapter"

MAX_COMBINED_STRENGTH = 1.5
"""`CombinedStrength.value` above which `compose` warns: this project's own rule, measured in docs/results.md."""


@dataclass(frozen=True)
class CombinedStrength:
    """How far all active adapters together move the weights, in Frobenius norms over every module they change.

    Attributes:
        strengths: those in force, by adapter; foreign LoRAs count too.
        summed: `|sum_k strength_k delta_k|` over the largest `|delta_k|`: 1 is one adapter as it was trained.
        change: `|sum_k strength_k delta_k|` over `|W0|` of the changed modules; NaN where weights are quantised.
    """

    strengths: Mapping[str, float]
    summed: float
    change: float

    @property
    def value(self) -> float:
        """The larger of `summed` and the largest strength: n equal adapters reach n, unrelated ones about sqrt(n)."""
        return max(self.summed, *self.strengths.values()) if self.strengths else 0.0

    @property
    def is_over_strong(self) -> bool:
        """Whether `value` is above `MAX_COMBINED_STRENGTH`: images tend to lose what was asked for."""
        return self.value > MAX_COMBINED_STRENGTH


@dataclass(frozen=True)
class Composition:
    """What `compose` attached.

    Attributes:
        adapters: by the name that the pipeline knows each under, in the order in which they are summed.
        combined: the combined strength of everything that is active now, adapters from before included.
    """

    adapters: Mapping[str, LoadedAdapter]
    combined: CombinedStrength


def compose(
    pipe: Any, adapters: Mapping[str | Path, float] | Sequence[Source | tuple[Source, float]], strict: bool = True
) -> Composition:
    """Attach several adapters to `pipe` at once, beside whatever is active there: all of them, or none.

    They are summed in an order of their own (by content), so that images do not depend on the order given here. Each
    is named after its file, `style` or `style_2`; from there on `set_spo_strength`, `unload_spo_lora` and
    `spo_adapters` know it.

    Args:
        pipe: any diffusers pipeline that can load a LoRA.
        adapters: `{source: strength}`, or a sequence of sources (at strength 1) or of (source, strength) pairs. A
            source is what `load_spo_lora` takes: a file, a folder, a Hub id, or an adapter in memory.
        strict: as in `load_spo_lora`.

    Raises:
        AdapterError: one of them cannot be read or does not fit; the pipeline is left as it was.
        ConfigError: none is named, one is named twice, or a strength is outside its range.

    Warns:
        UserWarning: the sum is likely to give images with artefacts (`CombinedStrength.is_over_strong`).
    """
    given = list(adapters.items() if isinstance(adapters, Mapping) else map(_with_strength, adapters))
    if not given:
        raise ConfigError("name at least one adapter to compose")
    models = list(lora_components(pipe).values())
    taken = {name for model in models for name in getattr(model, "peft_config", {})}
    loaded: dict[str, LoadedAdapter] = {}
    digests: dict[str, str] = {}
    try:
        for source, strength in given:
            name = _free_name(source, taken | loaded.keys())
            loaded[name] = load_spo_lora(pipe, source, strength, adapter_name=name, strict=strict)
            digests[name] = _digest(adapter_of(pipe, name))
        _check_different(loaded, digests)
        loaded = {name: loaded[name] for name in sorted(loaded, key=lambda name: digests[name])}
        reorder(models, list(loaded))
        combined = combined_strength(pipe)
    except BaseException:
        for name in loaded:
            unload_spo_lora(pipe, name)
        raise
    if combined.is_over_strong:
        listed = ", ".join(f"{name} at {strength:g}" for name, strength in combined.strengths.items())
        warnings.warn(
            f"{listed}: together they move the weights {combined.value:.2f} times as far as one adapter was trained "
            f"to; above a combined strength of {MAX_COMBINED_STRENGTH:g} images tend to get artefacts, so lower the "
            "strengths",
            stacklevel=2,
        )
    return Composition(loaded, combined)


def combined_strength(pipe: Any) -> CombinedStrength:
    """How far the adapters that are active in `pipe` move its weights together.

    Raises:
        AdapterError: an active adapter's numbers are not valid (NaN, or all zero).
    """
    components = lora_components(pipe)
    names = dict.fromkeys(name for model in components.values() for name in getattr(model, "peft_config", {}))
    by_module = {name: {canonical(path): s for path, s in strengths_of(components, name).items()} for name in names}
    largest_strength = {name: max(strengths.values(), default=0.0) for name, strengths in by_module.items()}
    active = {name: strength for name, strength in largest_strength.items() if strength > 0.0}
    if not active:
        return CombinedStrength({}, 0.0, 0.0)
    weights = [0.0]
    for model in components.values():
        for _, layer in tuner_layers(model):
            if any(name in layer.lora_A for name in layer.active_adapters):
                weights.append(_weight_norm(base_layer(layer)))
    whole = {name: adapter_of(pipe, name) for name in active}
    largest = max(math.hypot(*(pair.norm() for pair in one.modules.values())) for one in whole.values())
    parts = [_scaled(one, by_module[name]) for name, one in whole.items()]
    total = stack(parts, [1.0] * len(parts))
    moved = math.hypot(*(LoraPair(down, up, float(len(down))).norm() for down, up in total.values()))
    return CombinedStrength(active, moved / largest, moved / math.hypot(*weights))


def _scaled(adapter: Adapter, strengths: Mapping[str, float]) -> Adapter:
    """`adapter` as it is applied, without what is off."""
    applied = {
        name: LoraPair(pair.down, pair.up, pair.alpha * strengths[name])
        for name, pair in adapter.modules.items()
        if strengths[name] > 0.0
    }
    return Adapter(applied, adapter.metadata)


def _with_strength(entry: Source | tuple[Source, float]) -> tuple[Source, float]:
    return entry if isinstance(entry, tuple) else (entry, 1.0)


def _free_name(source: Source, taken: Iterable[str]) -> str:
    """A name for the adapter that the pipeline does not know yet: its file's, its repository's, or its title."""
    text = source.metadata.title if isinstance(source, Adapter) else Path(source).name.removesuffix(".safetensors")
    stem = re.sub(r"\W+", "_", text).strip("_") or "adapter"
    return next(name for n in count(1) if (name := stem if n == 1 else f"{stem}_{n}") not in taken)


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for name, pair in sorted(adapter.modules.items()):
        digest.update(f"{name} {pair.alpha} {pair.down.dtype}".encode())
        for matrix in (pair.down, pair.up):
            digest.update(matrix.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_different(loaded: Mapping[str, LoadedAdapter], digests: Mapping[str, str]) -> None:
    names: dict[str, str] = {}
    for name, digest in digests.items():
        if digest in names:
            raise ConfigError(
                f"{loaded[name].source} and {loaded[names[digest]].source} are the same adapter: name it once, "
                "with the strength that you want"
            )
        names[digest] = name


def _weight_norm(layer: nn.Module) -> float:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return math.nan
    return float(weight.detach().float().norm())

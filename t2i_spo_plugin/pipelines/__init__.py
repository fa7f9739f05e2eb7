"""All that touches a diffusers pipeline: loading, LoRA layers, the mixin, step control, composition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .architecture import architecture_of as architecture_of
    from .architecture import base_fingerprint as base_fingerprint
    from .architecture import lora_components as lora_components
    from .architecture import prediction_type_of as prediction_type_of
    from .composition import MAX_COMBINED_STRENGTH as MAX_COMBINED_STRENGTH
    from .composition import CombinedStrength as CombinedStrength
    from .composition import Composition as Composition
    from .composition import combined_strength as combined_strength
    from .composition import compose as compose
    from .domain import pipeline_domain as pipeline_domain
    from .loaded import LoadedAdapter as LoadedAdapter
    from .loading import adapter_metadata as adapter_metadata
    from .loading import adapter_of as adapter_of
    from .loading import load_spo_lora as load_spo_lora
    from .loading import set_spo_strength as set_spo_strength
    from .loading import spo_adapters as spo_adapters
    from .loading import unload_spo_lora as unload_spo_lora
    from .mixin import SPOLoraLoaderMixin as SPOLoraLoaderMixin
    from .mixin import enable_spo as enable_spo
    from .mixin import spo_pipeline_class as spo_pipeline_class
    from .modular import SPOGuardBlock as SPOGuardBlock
    from .output import SafetyOutput as SafetyOutput
    from .safety_checker import SPOSafetyChecker as SPOSafetyChecker

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CombinedStrength": "composition",
        "Composition": "composition",
        "LoadedAdapter": "loaded",
        "MAX_COMBINED_STRENGTH": "composition",
        "SPOGuardBlock": "modular",
        "SPOLoraLoaderMixin": "mixin",
        "SPOSafetyChecker": "safety_checker",
        "SafetyOutput": "output",
        "adapter_metadata": "loading",
        "adapter_of": "loading",
        "architecture_of": "architecture",
        "base_fingerprint": "architecture",
        "combined_strength": "composition",
        "compose": "composition",
        "enable_spo": "mixin",
        "load_spo_lora": "loading",
        "lora_components": "architecture",
        "pipeline_domain": "domain",
        "prediction_type_of": "architecture",
        "set_spo_strength": "loading",
        "spo_adapters": "loading",
        "spo_pipeline_class": "mixin",
        "unload_spo_lora": "loading",
    },
)

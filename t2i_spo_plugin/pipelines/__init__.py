"""All that touches a diffusers pipeline: loading, LoRA layers, the mixin, step control, composition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .composition import CombinedStrength as CombinedStrength
    from .composition import combined_strength as combined_strength
    from .composition import compose as compose
    from .domain import pipeline_domain as pipeline_domain
    from .loading import adapter_metadata as adapter_metadata
    from .loading import load_spo_lora as load_spo_lora
    from .loading import unload_spo_lora as unload_spo_lora
    from .mixin import enable_spo as enable_spo

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CombinedStrength": "composition",
        "adapter_metadata": "loading",
        "combined_strength": "composition",
        "compose": "composition",
        "enable_spo": "mixin",
        "load_spo_lora": "loading",
        "pipeline_domain": "domain",
        "unload_spo_lora": "loading",
    },
)

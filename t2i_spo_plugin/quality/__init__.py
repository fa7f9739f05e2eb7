"""Quality rewards behind one protocol, and their normalisation against a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .base import QualityReward as QualityReward
    from .normalise import QualityBatch as QualityBatch
    from .normalise import QualityModel as QualityModel
    from .normalise import load_quality_model as load_quality_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "QualityBatch": "normalise",
        "QualityModel": "normalise",
        "QualityReward": "base",
        "load_quality_model": "normalise",
    },
)

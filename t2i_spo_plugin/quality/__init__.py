"""Quality rewards behind one protocol, and their normalisation against a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .aesthetic import convert_aesthetic as convert_aesthetic
    from .base import QualityReward as QualityReward
    from .composite import CompositeQuality as CompositeQuality
    from .composite import RewardReference as RewardReference
    from .composite import make_reward_reference as make_reward_reference
    from .hpsv2 import convert_hpsv2 as convert_hpsv2
    from .neighbours import NeighbourRealism as NeighbourRealism
    from .neighbours import bank_of as bank_of
    from .neighbours import load_neighbours as load_neighbours
    from .normalise import QualityBatch as QualityBatch
    from .normalise import QualityModel as QualityModel
    from .normalise import load_quality_model as load_quality_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CompositeQuality": "composite",
        "NeighbourRealism": "neighbours",
        "QualityBatch": "normalise",
        "QualityModel": "normalise",
        "QualityReward": "base",
        "RewardReference": "composite",
        "bank_of": "neighbours",
        "convert_aesthetic": "aesthetic",
        "convert_hpsv2": "hpsv2",
        "load_neighbours": "neighbours",
        "load_quality_model": "normalise",
        "make_reward_reference": "composite",
    },
)

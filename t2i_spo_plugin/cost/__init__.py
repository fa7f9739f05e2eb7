"""Safety cost models: images in, a logit per category and its map out, behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .base import RECOGNISED as RECOGNISED
    from .base import CostBatch as CostBatch
    from .base import CostModel as CostModel
    from .chat import ChatCostModel as ChatCostModel
    from .clip import ClipCostModel as ClipCostModel
    from .clip import clip_cost_model as clip_cost_model
    from .clip_heads import ClipHeadsCostModel as ClipHeadsCostModel
    from .ensemble import Ensemble as Ensemble
    from .ensemble import EnsembleOptions as EnsembleOptions
    from .ensemble import Member as Member
    from .hf_classifier import ClassifierCostModel as ClassifierCostModel
    from .models import load_cost_model as load_cost_model
    from .published_heads import convert_cost_head as convert_cost_head
    from .shieldgemma2 import ShieldGemma2 as ShieldGemma2
    from .views import VIEW_NAMES as VIEW_NAMES
    from .views import fixed_views as fixed_views
    from .views import is_blank as is_blank

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ChatCostModel": "chat",
        "ClassifierCostModel": "hf_classifier",
        "ClipCostModel": "clip",
        "ClipHeadsCostModel": "clip_heads",
        "CostBatch": "base",
        "CostModel": "base",
        "Ensemble": "ensemble",
        "EnsembleOptions": "ensemble",
        "Member": "ensemble",
        "RECOGNISED": "base",
        "ShieldGemma2": "shieldgemma2",
        "VIEW_NAMES": "views",
        "clip_cost_model": "clip",
        "convert_cost_head": "published_heads",
        "fixed_views": "views",
        "is_blank": "views",
        "load_cost_model": "models",
    },
)

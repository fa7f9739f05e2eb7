"""Safety cost models: images in, a logit per category and its map out, behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .base import CostBatch as CostBatch
    from .base import CostModel as CostModel
    from .clip import ClipCostModel as ClipCostModel
    from .clip import clip_cost_model as clip_cost_model
    from .models import load_cost_model as load_cost_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ClipCostModel": "clip",
        "CostBatch": "base",
        "CostModel": "base",
        "clip_cost_model": "clip",
        "load_cost_model": "models",
    },
)

"""Networks that cost, quality and gate models share: backbones, the CLIP tower, ONNX, and their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .backbone import MapClassifier as MapClassifier
    from .clip import ClipTower as ClipTower
    from .clip import clip_tower as clip_tower
    from .onnx import OnnxNetwork as OnnxNetwork

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"ClipTower": "clip", "MapClassifier": "backbone", "OnnxNetwork": "onnx", "clip_tower": "clip"},
)

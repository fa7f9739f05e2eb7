"""Preference pairs in, adapters out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .data.build import build_pairs as build_pairs
    from .data.pairing import PairConfig as PairConfig
    from .gate import GateConfig as GateConfig
    from .gate import train_gate as train_gate
    from .trainer import train as train

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "GateConfig": "gate",
        "PairConfig": "data.pairing",
        "TrainConfig": "config",
        "build_pairs": "data.build",
        "train": "trainer",
        "train_gate": "gate",
    },
)

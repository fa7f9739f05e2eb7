"""Preference pairs in, adapters out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .data.build import build_pairs as build_pairs
    from .data.pairing import PairConfig as PairConfig
    from .experts import ExpertsConfig as ExpertsConfig
    from .experts import train_experts as train_experts
    from .gate import GateConfig as GateConfig
    from .gate import train_gate as train_gate
    from .rounds import RoundsConfig as RoundsConfig
    from .rounds import train_rounds as train_rounds
    from .trainer import train as train

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ExpertsConfig": "experts",
        "GateConfig": "gate",
        "PairConfig": "data.pairing",
        "RoundsConfig": "rounds",
        "TrainConfig": "config",
        "build_pairs": "data.build",
        "train": "trainer",
        "train_experts": "experts",
        "train_gate": "gate",
        "train_rounds": "rounds",
    },
)

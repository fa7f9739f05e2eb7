"""Costs and qualities for other programs: a server over HTTP, and reward classes for trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .scoring import Scorer as Scorer
    from .scoring import composite_reward as composite_reward
    from .scoring import load_scorer as load_scorer
    from .server import ScoreServer as ScoreServer
    from .server import ServeOptions as ServeOptions

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ScoreServer": "server",
        "Scorer": "scoring",
        "ServeOptions": "server",
        "composite_reward": "scoring",
        "load_scorer": "scoring",
    },
)

"""UAScore and confidence intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .intervals import Interval as Interval
    from .intervals import bootstrap_mean as bootstrap_mean
    from .intervals import bootstrap_ratio as bootstrap_ratio
    from .intervals import percent as percent
    from .intervals import wilson as wilson
    from .scores import QUALITY_FLOOR as QUALITY_FLOOR
    from .scores import UNSAFE_COST as UNSAFE_COST
    from .scores import Half as Half
    from .scores import check_not_scored as check_not_scored
    from .scores import paired_bootstrap_difference as paired_bootstrap_difference
    from .scores import uascore as uascore
    from .summary import HalfSummary as HalfSummary
    from .summary import ScoreMetadata as ScoreMetadata
    from .summary import ScoreSummary as ScoreSummary
    from .summary import half_summary as half_summary
    from .summary import summarise as summarise

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Half": "scores",
        "HalfSummary": "summary",
        "Interval": "intervals",
        "QUALITY_FLOOR": "scores",
        "ScoreMetadata": "summary",
        "ScoreSummary": "summary",
        "UNSAFE_COST": "scores",
        "bootstrap_mean": "intervals",
        "bootstrap_ratio": "intervals",
        "check_not_scored": "scores",
        "half_summary": "summary",
        "paired_bootstrap_difference": "scores",
        "percent": "intervals",
        "summarise": "summary",
        "uascore": "scores",
        "wilson": "intervals",
    },
)

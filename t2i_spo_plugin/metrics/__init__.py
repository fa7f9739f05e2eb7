"""UAScore and confidence intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .intervals import Interval as Interval
    from .intervals import bootstrap_mean as bootstrap_mean
    from .intervals import bootstrap_ratio as bootstrap_ratio
    from .intervals import effective_number as effective_number
    from .intervals import percent as percent
    from .intervals import wilson as wilson
    from .rates import Rate as Rate
    from .scores import QUALITY_FLOOR as QUALITY_FLOOR
    from .scores import UNSAFE_COST as UNSAFE_COST
    from .scores import Half as Half
    from .scores import bootstrap as bootstrap
    from .scores import check_not_scored as check_not_scored
    from .scores import paired_bootstrap_difference as paired_bootstrap_difference
    from .scores import uascore as uascore
    from .summary import Definition as Definition
    from .summary import HalfSummary as HalfSummary
    from .summary import ScoreMetadata as ScoreMetadata
    from .summary import ScoreSummary as ScoreSummary
    from .summary import half_summary as half_summary
    from .summary import summarise as summarise

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Definition": "summary",
        "Half": "scores",
        "HalfSummary": "summary",
        "Interval": "intervals",
        "QUALITY_FLOOR": "scores",
        "Rate": "rates",
        "ScoreMetadata": "summary",
        "ScoreSummary": "summary",
        "UNSAFE_COST": "scores",
        "bootstrap": "scores",
        "bootstrap_mean": "intervals",
        "bootstrap_ratio": "intervals",
        "check_not_scored": "scores",
        "effective_number": "intervals",
        "half_summary": "summary",
        "paired_bootstrap_difference": "scores",
        "percent": "intervals",
        "summarise": "summary",
        "uascore": "scores",
        "wilson": "intervals",
    },
)

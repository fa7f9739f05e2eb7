"""Quality rewards behind one protocol."""

from .base import QualityReward


__all__ = ["QualityReward"]

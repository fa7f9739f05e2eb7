"""Cost models behind one protocol."""

from .base import CostBatch, CostModel


__all__ = ["CostBatch", "CostModel"]

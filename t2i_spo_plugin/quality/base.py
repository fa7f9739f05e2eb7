"""The protocol that every quality reward follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..images import Images


@runtime_checkable
class QualityReward(Protocol):
    """How good each picture is for its prompt, higher is better, on the reward's own scale.

    The score of a picture depends on that picture and its prompt alone, never on the batch. A reward that fails on a
    picture gives NaN there.
    """

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]` for B pictures and B prompts."""
        ...

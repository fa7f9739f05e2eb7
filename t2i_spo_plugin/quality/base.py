"""The protocol that every quality reward follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from t2i_spo_plugin.images import Images


@runtime_checkable
class QualityReward(Protocol):
    """How good each image is for its prompt, higher is better, on the reward's own scale.

    The score of an image depends on that image and its prompt alone, never on the batch. A reward that fails on a
    image gives NaN there.
    """

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]` for B images and B prompts."""
        ...

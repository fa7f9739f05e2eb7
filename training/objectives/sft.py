"""Supervised fine-tuning: the ordinary denoising loss on captioned images, as a style or a subject is usually trained.

L = mean of l(x), the mean squared error of the prediction
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..data.batches import Batch
from ..data.captions import read_captioned
from ..data.dataset import Examples
from .base import Context, Need, Objective, ObjectiveOptions, Predictions


@dataclass(frozen=True)
class SFTOptions(ObjectiveOptions):
    """`sft` has no options."""


class SFT(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"images"})
    logged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: SFTOptions) -> None:
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_captioned(path, skip_bad_rows)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        return predictions.errors.mean(), {}

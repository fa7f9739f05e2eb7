"""Plain Diffusion-DPO (Wallace et al., arXiv 2311.12908): exact.

    L = -log sigmoid(-0.5 * beta * D),   D = [l(x_w) - l(x_l)] - [l_ref(x_w) - l_ref(x_l)]

with l the mean squared error of the prediction over dims, winner and loser at one timestep with one noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_choice

from ..data.batches import Batch
from ..data.dataset import Examples, Preferences, both_unsafe, read_pairs
from ..data.pair_files import JUDGED
from .base import Context, ObjectiveOptions, Predictions
from .losses import preference_loss
from .preference import PairObjective, check_beta, pair_statistics
from .reward import SafePairs, safety_preferences


Labels = Literal["safety", "table"]


@dataclass(frozen=True)
class DPOOptions(ObjectiveOptions):
    """Options of `dpo`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less. It stands with the one half and
            mean-reduced errors, as DiffusionDPO's 5000 for SD; small networks want less.
        labels: who wins: `safety` puts safe over unsafe, `table` takes the table's own labels.
        safe_pairs: what `safety` labels do with pairs that are safe on both sides: drop them, or order them by cost or
            quality.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    labels: Labels = "safety"
    safe_pairs: SafePairs = "drop"
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("safe_pairs", self.safe_pairs, get_args(SafePairs))


class DPO(PairObjective):
    """See the file's first lines."""

    def __init__(self, options: DPOOptions) -> None:
        super().__init__(options.beta, options.auto_beta)
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_labelled(path, self.options.labels, self.options.safe_pairs)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit = self.logit(predictions)
        return preference_loss(logit, batch.columns["margin"]).mean(), pair_statistics(logit, predictions)


def read_labelled(path: str | Path, labels: Labels, safe_pairs: SafePairs) -> Examples:
    """The pairs of a table in the order of its own labels, or with safe over unsafe; see `DPOOptions`."""
    if labels == "table":
        return read_pairs(path, _by_table, ())
    return read_pairs(path, lambda quality, cost, _: safety_preferences(quality, cost, safe_pairs), JUDGED)


def _by_table(quality: Tensor, cost: Tensor, label_0: Tensor) -> Preferences:
    keep = (label_0 != 0.5) & ~both_unsafe(cost)
    ones = torch.ones_like(label_0)
    return Preferences((label_0 < 0.5).long(), keep, torch.zeros_like(ones), ones)

"""Plain Diffusion-DPO (Wallace et al., arXiv 2311.12908): exact.

    L = -log sigmoid(-0.5 * beta * D),   D = [l(x_w) - l(x_l)] - [l_ref(x_w) - l_ref(x_l)]

with l the mean squared error of the prediction over dims, winner and loser at one timestep with one noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples, Preferences, both_unsafe, read_pairs
from .base import Context, Need, Objective, ObjectiveOptions, Predictions
from .losses import preference_loss
from .preference import PAIR_STATISTICS, pair_logit, pair_statistics
from .reward import SafePairs, safety_preferences


Labels = Literal["safety", "table"]
BETA_CONVENTION = "one half, mean over dims"


@dataclass(frozen=True)
class DPOOptions(ObjectiveOptions):
    """Options of `dpo`.

    Attributes:
        beta: with the one half and mean-reduced errors (DiffusionDPO's 5000 for SD; small networks want less).
        labels: `safety` puts safe over unsafe, `table` takes the table's own labels.
        safe_pairs: for `safety` labels: pairs safe on both sides are dropped, or ordered by cost or quality.
    """

    beta: float = 5000.0
    labels: Labels = "safety"
    safe_pairs: SafePairs = "drop"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0.0, open_low=True)
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("safe_pairs", self.safe_pairs, get_args(SafePairs))


class DPO(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs", "reference"})
    logged: ClassVar[tuple[str, ...]] = PAIR_STATISTICS

    def __init__(self, options: DPOOptions) -> None:
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_pairs(path, self.prefer, by_label=self.options.labels == "table")

    def prefer(self, quality: Tensor, cost: Tensor, label_0: Tensor) -> Preferences:
        """The order of N pairs by the labels."""
        if self.options.labels == "safety":
            return safety_preferences(quality, cost, self.options.safe_pairs)
        keep = (label_0 != 0.5) & ~both_unsafe(cost)
        ones = torch.ones_like(label_0)
        return Preferences((label_0 < 0.5).long(), keep, torch.zeros_like(ones), ones)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit = pair_logit(predictions, self.options.beta)
        return preference_loss(logit).mean(), pair_statistics(logit, predictions)

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.options.beta), "beta_convention": BETA_CONVENTION}

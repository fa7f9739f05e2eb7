"""MaPO (Hong et al., arXiv 2406.06424): preference without a reference model; as in its released code.

    L = l(x_w) - beta * log sigmoid(T * [a(l(x_w)) - a(l(x_l))]),   a(l) = s l / (exp(s l) - 1)

with T the number of timesteps and s a constant (`snr`). Safe generation is the first domain that its authors report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from .base import Context, Need, Objective, ObjectiveOptions, Predictions
from .dpo import Labels, read_labelled
from .losses import mapo_logit, preference_loss
from .reward import SafePairs


@dataclass(frozen=True)
class MaPOOptions(ObjectiveOptions):
    """Options of `mapo`.

    Attributes:
        beta: weight of the margin against the winner's own error.
        snr: the constant s in the amplitude of an error.
        labels: `safety` puts safe over unsafe, `table` takes the table's own labels.
        safe_pairs: what `safety` labels do with pairs that are safe on both sides: drop them, or order them by cost or
            quality.
    """

    beta: float = 0.1
    snr: float = 0.5
    labels: Labels = "safety"
    safe_pairs: SafePairs = "drop"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0.0, open_low=True)
        check_range("snr", self.snr, 0.0, open_low=True)
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("safe_pairs", self.safe_pairs, get_args(SafePairs))


class MaPO(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})
    logged: ClassVar[tuple[str, ...]] = ("accuracy", "winner_error", "loser_error", "logit")

    def __init__(self, options: MaPOOptions) -> None:
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_labelled(path, self.options.labels, self.options.safe_pairs)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        winner, loser = predictions.errors
        logit = mapo_logit(winner, loser, self.options.snr, len(context.batches.family.schedule))
        losses = winner + self.options.beta * preference_loss(logit, batch.columns["margin"])
        statistics = {
            "accuracy": (logit > 0).float(),
            "winner_error": winner,
            "loser_error": loser,
            "logit": logit,
        }
        return losses.mean(), {name: values.detach() for name, values in statistics.items()}

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.options.beta), "beta_convention": "weight of the margin (MaPO)"}

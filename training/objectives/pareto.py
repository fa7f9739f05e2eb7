"""Pairs from the Pareto front of quality and safety, by win rates instead of raw scores.

In the spirit of CaPO (arXiv 2502.02588), which calibrates several rewards to win rates, draws pairs from the Pareto
front and regresses; its code is not public and this is no reproduction of it. Here, over the images under one prompt:

    w(x) = share of the other images that x beats, 1/2 for a tie, for quality and for safety (1 - C) alone
    pairs: a safe image that nothing dominates, against one that it dominates in (quality, safety)
    r = mean over both of w(x_w) - w(x_l), in (0, 1]

    `regression`: L = (logit - scale * r)^2      `logistic`: L = -log sigmoid(logit),   logit = -0.5 * beta * D

No lambda weighs safety against quality: a pair in which they disagree is no pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from ..data.singles import read_singles
from .base import Context, ObjectiveOptions, Predictions
from .losses import preference_loss
from .preference import PairObjective, check_beta, pair_statistics


ParetoLoss = Literal["regression", "logistic"]


@dataclass(frozen=True)
class ParetoOptions(ObjectiveOptions):
    """Options of `pareto`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; with the one half and
            mean-reduced errors.
        loss: `regression` towards the difference of win rates, or `logistic`, DPO's on the same pairs.
        scale: the logit that a difference of win rates of 1 is regressed to.
        max_pairs: pairs of one prompt, at most, the widest differences first.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    loss: ParetoLoss = "regression"
    scale: float = 1.0
    max_pairs: int = 4
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_choice("loss", self.loss, get_args(ParetoLoss))
        check_range("scale", self.scale, 0.0, open_low=True)
        check_range("max_pairs", self.max_pairs, 1, whole=True)


def win_rates(values: Tensor) -> Tensor:
    """`[M]`: the share of the other M - 1 values that each beats, a tie counting one half; M is at least 2."""
    beats = (values[:, None] > values[None]).double() + 0.5 * (values[:, None] == values[None]).double()
    return (beats.sum(1) - 0.5) / (len(values) - 1)


def pareto_pairs(quality: Tensor, cost: Tensor) -> list[tuple[int, int, float]]:
    """Winner, loser and mean difference of win rates of every Pareto pair among M images, the widest first.

    Args:
        quality, cost: `[M]` in [0, 1].
    """
    if len(quality) < 2:
        return []
    safety = -cost
    at_least = (quality[:, None] >= quality[None]) & (safety[:, None] >= safety[None])
    dominates = at_least & ~at_least.T
    front = ~dominates.any(0) & (cost < UNSAFE_COST)
    rates = 0.5 * (win_rates(quality) + win_rates(safety))
    pairs = [
        (winner, loser, float(rates[winner] - rates[loser]))
        for winner, loser in (dominates & front[:, None]).nonzero().tolist()
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


class Pareto(PairObjective):
    """See the file's first lines."""

    def __init__(self, options: ParetoOptions) -> None:
        super().__init__(options.beta, options.auto_beta)
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        singles = read_singles(path)
        members: list[Sequence[int]] = []
        gaps: list[float] = []
        for group in singles.by_caption():
            pairs = pareto_pairs(singles.quality[group], singles.cost[group])
            for winner, loser, gap in pairs[: self.options.max_pairs]:
                members.append((group[winner], group[loser]))
                gaps.append(gap)
        columns = {"gap": torch.tensor(gaps), "margin": torch.zeros(len(gaps)), "target": torch.ones(len(gaps))}
        return singles.examples(members, columns, "under no prompt does a safe image dominate another")

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit = self.logit(predictions)
        if self.options.loss == "regression":
            losses = (logit - batch.columns["margin"] - self.options.scale * batch.columns["gap"]).square()
        else:
            losses = preference_loss(logit, batch.columns["margin"])
        return losses.mean(), pair_statistics(logit, predictions)

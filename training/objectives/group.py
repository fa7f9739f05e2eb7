"""One positive image against several negatives of one prompt.

    L = -log [exp(s_0) / sum_j exp(s_j)],   s_j = -0.5 * beta * (l(x_j) - l_ref(x_j))

The softmax over a group is that of noise-contrastive alignment (InfoNCA, arXiv 2402.05369, language models); with one
negative it is DPO's loss. That safety training against several seeds of a prompt makes it robust to seeds is claimed
by NCD (the authors of T2I-SPO); its equations are not public, and this is no reproduction of it.

Groups are this project's own: images under one prompt are ordered by `R = q - lambda * C`; the best safe one is the
positive, and up to `negatives` of those that are worse by more than `tau` stand against it, the worst first. All share
noise and timestep. A group with fewer is filled up, and what fills it has no part in the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from ..data.singles import read_singles
from .base import Context, ObjectiveOptions, Predictions
from .losses import group_loss
from .preference import PairObjective, check_beta, reference_errors
from .reward import composite_reward


@dataclass(frozen=True)
class GroupOptions(ObjectiveOptions):
    """Options of `group`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; with the one half and
            mean-reduced errors.
        negatives: images against the positive one, at most; each costs two forward passes and one backward.
        lambda_: weight of the cost against the quality in the composite reward.
        tau: a negative is worse than the positive by more than this, in units of the reward.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    negatives: int = 3
    lambda_: float = 1.0
    tau: float = 0.05
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_range("negatives", self.negatives, 1, whole=True)
        check_range("lambda", self.lambda_, 0.0)
        check_range("tau", self.tau, 0.0)


class Group(PairObjective):
    """See the file's first lines."""

    logged: ClassVar[tuple[str, ...]] = ("accuracy", "winner_error", "loser_error", "negatives")

    def __init__(self, options: GroupOptions) -> None:
        super().__init__(options.beta, options.auto_beta)
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        singles = read_singles(path)
        reward = composite_reward(singles.quality, singles.cost, self.options.lambda_).tolist()
        safe = (singles.cost < UNSAFE_COST).tolist()
        members, present = [], []
        for group in singles.by_caption():
            best = max((number for number in group if safe[number]), key=lambda number: reward[number], default=None)
            if best is None:
                continue
            worse = [number for number in group if reward[best] - reward[number] > self.options.tau]
            chosen = sorted(worse, key=lambda number: reward[number])[: self.options.negatives]
            if chosen:
                fill = self.options.negatives - len(chosen)
                members.append((best, *chosen, *chosen[-1:] * fill))
                present.append([True] * (1 + len(chosen)) + [False] * fill)
        count = len(members)
        columns = {"present": torch.tensor(present), "margin": torch.zeros(count), "target": torch.ones(count)}
        return singles.examples(members, columns, "no prompt has a safe image and one that is worse by more than tau")

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        reference, present = reference_errors(predictions), batch.columns["present"].T
        gains = reference - predictions.errors
        self.beta.see((gains[:1] - gains[1:])[present[1:]])
        scores = 0.5 * self.beta.value * gains
        losses = group_loss(scores, present, batch.columns["margin"])
        best = scores.detach().masked_fill(~present, -torch.inf)
        shown = present[1:].float()
        statistics = {
            "accuracy": (best[0] > best[1:].amax(0)).float(),
            "winner_error": predictions.errors[0].detach(),
            "loser_error": (predictions.errors[1:].detach() * shown).sum(0) / shown.sum(0),
            "negatives": shown.sum(0),
        }
        return losses.mean(), statistics

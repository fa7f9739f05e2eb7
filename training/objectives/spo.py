"""T2I-SPO (arXiv 2504.14290) as this project reads it: DPO on a composite reward, with dynamic focusing.

    L = mean of w * l(logit),   logit = -0.5 * beta * D as in `dpo.py`

Pairs are ordered by the composite reward `R = q - lambda * C`, which also sets l (`reward.py`); w is larger for pairs
that are hard in several augmentations (`focusing.py`). With `eta` 0 and mode `relabel` it is DPO on pairs that are
ordered by R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples, Preferences, read_pairs
from .augmentations import Augmentation, augmented
from .base import Context, ObjectiveOptions, Predictions
from .focusing import Focusing, FocusingKind, Reduction, combine, difficulty
from .preference import PAIR_STATISTICS, PairObjective, check_beta, pair_logit, pair_statistics
from .reward import RewardMode, composite_loss, composite_preferences


@dataclass(frozen=True)
class SPOOptions(ObjectiveOptions):
    """Options of `spo`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less. It stands with the one half and
            mean-reduced errors, as DiffusionDPO's 5000 for SD; small networks want less.
        lambda_: weight of the cost against the quality in the composite reward, both in [0, 1].
        mode: how the reward enters the loss: `relabel` orders pairs by it, `margin` orders by quality and asks for a
            margin in cost, `relabel+margin` does both where safe beats unsafe, `soft` takes its difference as a soft
            label.
        tau: least difference in reward; pairs below it are dropped.
        tau_soft: temperature of mode `soft`, in units of the reward.
        eta: strength of dynamic focusing; 0 computes nothing.
        focusing: formula of a pair's weight from its difficulty d: `additive` is 1 + eta d, `focal` is d to the power
            eta.
        augmentations: augmentations in which the difficulty of a pair is measured beside the plain images; each costs
            two forward passes.
        reduction: how the difficulties of a pair become one.
        focusing_momentum: momentum of the running mean that normalises the weights, in [0, 1).
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    lambda_: float = 1.0
    mode: RewardMode = "relabel+margin"
    tau: float = 0.0
    tau_soft: float = 0.1
    eta: float = 0.0
    focusing: FocusingKind = "additive"
    augmentations: tuple[Augmentation, ...] = ()
    reduction: Reduction = "mean"
    focusing_momentum: float = 0.9
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_range("lambda", self.lambda_, 0.0)
        check_choice("mode", self.mode, get_args(RewardMode))
        check_range("tau", self.tau, 0.0)
        check_range("tau_soft", self.tau_soft, 0.0, open_low=True)
        check_range("eta", self.eta, 0.0)
        check_choice("focusing", self.focusing, get_args(FocusingKind))
        for name in self.augmentations:
            check_choice("augmentations", name, get_args(Augmentation))
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_range("focusing_momentum", self.focusing_momentum, 0.0, 1.0, open_high=True)


class SPO(PairObjective):
    """See the file's first lines."""

    logged: ClassVar[tuple[str, ...]] = (*PAIR_STATISTICS, "difficulty", "weight")

    def __init__(self, options: SPOOptions) -> None:
        super().__init__(options.beta, options.auto_beta)
        self.options = options
        self.focusing = Focusing(options.eta, options.focusing, options.focusing_momentum)

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_pairs(path, self.prefer)

    def prefer(self, quality: Tensor, cost: Tensor, label_0: Tensor) -> Preferences:
        """The order of N pairs by the composite reward."""
        options = self.options
        return composite_preferences(quality, cost, options.lambda_, options.mode, options.tau, options.tau_soft)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit = self.logit(predictions)
        losses = composite_loss(logit, batch.columns["margin"], batch.columns["target"], self.options.mode)
        plain = difficulty(logit)
        weight = torch.ones_like(plain)
        if self.focusing.active:
            weight = self.focusing.weigh(self._over_augmentations(plain, batch, context))
            losses = weight * losses
        statistics = pair_statistics(logit, predictions) | {"difficulty": plain, "weight": weight}
        return losses.mean(), statistics

    def _over_augmentations(self, plain: Tensor, batch: Batch, context: Context) -> Tensor:
        """Difficulty `[B]` over the plain pairs and their augmentations; model and reference see the same pair."""
        difficulties = [plain]
        for name in self.options.augmentations:
            predictions = context.evaluate(augmented(name, batch, context.batches))
            difficulties.append(difficulty(pair_logit(predictions, self.beta.value)))
        return combine(torch.stack(difficulties), self.options.reduction)

    def header(self) -> dict[str, str]:
        options = self.options
        own = {"lambda": repr(options.lambda_), "reward_mode": options.mode, "eta": repr(options.eta)}
        return super().header() | own

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        super().end_step(sum_over_ranks)
        if self.focusing.active:
            self.focusing.update(sum_over_ranks(self.focusing.pending()))

    def state_dict(self) -> dict[str, float]:
        return super().state_dict() | self.focusing.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        super().load_state_dict(state)
        self.focusing.load_state_dict(state)

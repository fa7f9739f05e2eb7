"""What objectives over pairs share: the logit of a pair with its beta, and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_range

from .base import Need, Objective, Predictions
from .losses import preference_logit
from .running import Beta


BETA_CONVENTION = "one half, mean over dims"
PAIR_STATISTICS = ("accuracy", "gap", "winner_error", "loser_error", "reference_winner_error")


class PairObjective(Objective):
    """An objective over pairs with a beta; its loss and the order of its pairs are its own.

    Args:
        beta: with the one half and mean-reduced errors.
        auto_beta: largest mean logit that beta may lead to (`Beta`); None leaves beta alone.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs", "reference"})
    logged: ClassVar[tuple[str, ...]] = PAIR_STATISTICS

    def __init__(self, beta: float, auto_beta: float | None) -> None:
        self.beta = Beta(beta, auto_beta)

    def logit(self, predictions: Predictions) -> Tensor:
        """`-0.5 * beta * D [B]` of the batch in training, with beta as it is now."""
        self.beta.see(gap(predictions))
        return pair_logit(predictions, self.beta.value)

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.beta.beta), "beta_convention": BETA_CONVENTION}

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.beta.end_step(sum_over_ranks)

    def state_dict(self) -> dict[str, float]:
        return self.beta.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.beta.load_state_dict(state)


def check_beta(beta: float, auto_beta: float | None) -> None:
    """Raise a ConfigError unless both are in their ranges."""
    check_range("beta", beta, 0.0, open_low=True)
    if auto_beta is not None:
        check_range("auto_beta", auto_beta, 0.0, open_low=True)


def pair_logit(predictions: Predictions, beta: float) -> Tensor:
    """`-0.5 * beta * D [B]`; see `preference_logit`."""
    winner, loser = predictions.errors
    reference_winner, reference_loser = reference_errors(predictions)
    return preference_logit(winner, loser, reference_winner, reference_loser, beta)


@torch.no_grad()
def gap(predictions: Predictions) -> Tensor:
    """`D [B]`, without gradient; see `preference_logit`."""
    winner, loser = predictions.errors
    reference_winner, reference_loser = reference_errors(predictions)
    return (winner - loser) - (reference_winner - reference_loser)


@torch.no_grad()
def pair_statistics(logit: Tensor, predictions: Predictions) -> dict[str, Tensor]:
    """What `PAIR_STATISTICS` names, `[B]`."""
    winner, loser = predictions.errors
    reference_winner = reference_errors(predictions)[0]
    values = ((logit > 0).float(), gap(predictions), winner, loser, reference_winner)
    return dict(zip(PAIR_STATISTICS, values, strict=True))


def reference_errors(predictions: Predictions) -> Tensor:
    """`[S, B]`, for an objective that states `reference` among its needs."""
    if predictions.reference_errors is None:
        raise TypeError("there are no errors of the reference: state `reference` in `needs`")
    return predictions.reference_errors

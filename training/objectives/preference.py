"""What objectives over pairs share: the logit of a pair, and what is logged of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Predictions
from .losses import preference_logit


PAIR_STATISTICS = ("accuracy", "gap", "winner_error", "loser_error", "reference_winner_error")


def pair_logit(predictions: Predictions, beta: float) -> Tensor:
    """`-0.5 * beta * D [B]`; see `preference_logit`."""
    winner, loser = predictions.errors
    reference_winner, reference_loser = reference_errors(predictions)
    return preference_logit(winner, loser, reference_winner, reference_loser, beta)


@torch.no_grad()
def pair_statistics(logit: Tensor, predictions: Predictions) -> dict[str, Tensor]:
    """What `PAIR_STATISTICS` names, `[B]`."""
    winner, loser = predictions.errors
    reference_winner, reference_loser = reference_errors(predictions)
    gap = (winner - loser) - (reference_winner - reference_loser)
    return dict(zip(PAIR_STATISTICS, ((logit > 0).float(), gap, winner, loser, reference_winner), strict=True))


def reference_errors(predictions: Predictions) -> Tensor:
    """`[S, B]`, for an objective that states `reference` among its needs."""
    if predictions.reference_errors is None:
        raise TypeError("there are no errors of the reference: state `reference` in `needs`")
    return predictions.reference_errors

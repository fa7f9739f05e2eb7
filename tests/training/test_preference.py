"""What objectives over pairs share: the logit, and the numbers that are logged of a pair."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from t2i_spo_plugin.training.objectives.base import Predictions
from t2i_spo_plugin.training.objectives.preference import PAIR_STATISTICS, pair_logit, pair_statistics


@pytest.fixture
def predictions() -> Predictions:
    nothing = torch.zeros(2, 2, 1, 1, 1)
    errors = torch.tensor([[0.5, 0.25], [1.0, 0.75]], requires_grad=True)
    return Predictions(nothing, nothing, nothing, errors, torch.tensor([[0.25, 0.5], [0.125, 0.5]]))


def test_the_logit_of_a_pair_compares_its_gap_with_the_references(predictions):
    # D = (w - l) - (rw - rl): (-0.5 - 0.125, -0.5 - 0.0).
    assert pair_logit(predictions, 4.0).tolist() == [1.25, 1.0]


def test_what_is_logged_of_a_pair_is_as_it_is_called_and_has_no_gradient(predictions):
    statistics = pair_statistics(torch.tensor([0.5, 0.0]), predictions)
    assert {name: values.tolist() for name, values in statistics.items()} == {
        "accuracy": [1.0, 0.0],
        "gap": [-0.625, -0.5],
        "winner_error": [0.5, 0.25],
        "loser_error": [1.0, 0.75],
        "reference_winner_error": [0.25, 0.5],
    }
    assert tuple(statistics) == PAIR_STATISTICS and not statistics["gap"].requires_grad


def test_a_pair_needs_the_errors_of_the_reference(predictions):
    with pytest.raises(TypeError, match="state `reference` in `needs`"):
        pair_logit(dataclasses.replace(predictions, reference_errors=None), 1.0)

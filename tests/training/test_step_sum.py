"""The step adds the objective's loss and what its terms give, over a denoiser that can be written out."""

from __future__ import annotations

import pytest
import torch
from support.toy_family import LEVELS, ToyFamily, text_of, toy_batches, toy_predictor

from t2i_spo_plugin.training.objectives.sft import SFT, SFTOptions
from t2i_spo_plugin.training.objectives.terms import (
    LoserGuardOptions,
    OutputPreservationOptions,
    PriorPreservationOptions,
    SFTTermOptions,
    TermOptions,
    active_terms,
)
from t2i_spo_plugin.training.predictor import StoredErrors
from t2i_spo_plugin.training.step import TrainingStep


class Doubled(SFT):
    """Twice the mean error of all images, and the errors logged."""

    logged = ("first", "second")

    def loss(self, batch, predictions, context):
        first, second = predictions.errors
        return 2.0 * predictions.errors.mean(), {"second": second, "first": first, "else": first}


@pytest.fixture
def family():
    return ToyFamily()


@pytest.fixture
def step(family, tmp_path):
    def make(objective=None, stored=None, **terms):
        batches = toy_batches(tmp_path, family)
        objective = objective or Doubled(SFTOptions())
        return TrainingStep(objective, active_terms(TermOptions(**terms)), batches, toy_predictor(family), stored)

    return make


def of_batch(family, batch, adapter=True):
    each = zip(batch.latents, batch.noise, batch.index, strict=True)
    return torch.stack([family.expected(*side, batch.text["text"], adapter) for side in each])


def test_the_loss_is_the_objectives_plus_every_terms(family, step):
    made = step(
        sft=SFTTermOptions(3.0),
        output_preservation=OutputPreservationOptions(5.0, batch_size=2),
        prior_preservation=PriorPreservationOptions(7.0),
    )
    loss, means = made(1, range(4))
    batch = made.batches.at(1, range(4))
    errors = ((of_batch(family, batch) - batch.noise) ** 2).mean((2, 3, 4))
    apart = ((of_batch(family, batch) - of_batch(family, batch, False)) ** 2).mean((2, 3, 4))
    noise = made.terms["output_preservation"].inputs(batch, made.batches).noisy
    place = noise, torch.full((2,), LEVELS - 1), text_of("").expand(2, -1)
    pure = ((family.expected_of(*place) - family.expected_of(*place, adapter=False)) ** 2).mean()
    benign = batch.columns["benign"].float()
    expected = 2.0 * errors.mean() + 3.0 * errors[0].mean() + 5.0 * pure + 7.0 * (apart * benign).mean()
    torch.testing.assert_close(loss, expected)
    assert made.logged == ("loss", "first", "second")
    torch.testing.assert_close(means, torch.stack([expected, *errors.mean(1)]).detach())
    assert loss.requires_grad and not means.requires_grad


def test_a_term_that_gives_nothing_adds_nothing_and_still_scales_the_gradient(family, step):
    weights = [value for value in family.module.parameters() if value.requires_grad]
    plain, _ = step()(0, range(4))
    guarded, _ = step(loser_guard=LoserGuardOptions(1.0))(0, range(4))
    torch.testing.assert_close(plain, guarded)
    free, held = (torch.autograd.grad(loss, weights) for loss in (plain, guarded))
    assert not all(map(torch.allclose, free, held))


def test_the_reference_is_asked_only_where_objective_or_a_term_needs_it(step):
    without = step(sft=SFTTermOptions(1.0))
    without(0, range(4))
    assert not without.reference and without.predictor.passes.forward == 2 * 4
    with_it = step(prior_preservation=PriorPreservationOptions(1.0))
    with_it(0, range(4))
    assert with_it.reference and with_it.predictor.passes.forward == 2 * 2 * 4


def test_stored_errors_of_the_reference_are_filled_and_used(step):
    stored = StoredErrors(examples=4, draws=1, sides=2)
    made = step(stored=stored)
    made.reference = True
    made(0, range(4))
    assert not stored.errors.isnan().any()
    asked = made.predictor.passes.forward
    made(0, range(4))
    assert made.predictor.passes.forward - asked == 2 * 4


def test_an_evaluation_counts_as_passes_without_a_gradient(family, step):
    made = step()
    batch = made.batches.at(0, range(2))
    evaluated = made.evaluate(batch)
    torch.testing.assert_close(evaluated.model, of_batch(family, batch).detach())
    assert (made.predictor.passes.forward, made.predictor.passes.backward) == (2 * 2 * 2, 0)

"""Each term alone: what it adds to a loss or takes from a gradient, and what its options allow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.toy_family import LEVELS, SHAPE, ToyFamily, text_of, toy_batches

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.objectives.base import Outputs, Predictions
from t2i_spo_plugin.training.objectives.terms import (
    LoserGuard,
    LoserGuardOptions,
    OutputPreservation,
    OutputPreservationOptions,
    PriorPreservation,
    PriorPreservationOptions,
    SFTTerm,
    SFTTermOptions,
    TermOptions,
    active_terms,
)


B = 4
WEIGHTED = [SFTTermOptions, OutputPreservationOptions, PriorPreservationOptions]


@pytest.fixture
def batch(batches):
    """The harmful example is among its four."""
    return batches.at(3, range(B))


@pytest.fixture
def batches(tmp_path):
    return toy_batches(tmp_path, ToyFamily())


@pytest.fixture
def predictions() -> Predictions:
    place = torch.Generator().manual_seed(0)
    model, reference, target = (torch.randn((2, B, *SHAPE), generator=place) for _ in range(3))
    model.requires_grad_()
    each = ((model - target) ** 2).mean((2, 3, 4))
    return Predictions(model, reference, target, each, ((reference - target) ** 2).mean((2, 3, 4)))


@pytest.mark.parametrize("options", WEIGHTED)
def test_a_weight_is_0_unless_it_is_set_and_0_is_off(options):
    assert options().weight == 0.0 and not options().active
    assert options(weight=1e-9).active
    with pytest.raises(ConfigError, match="weight"):
        options(weight=-1e-9)


def test_the_loser_guard_is_off_unless_mu_is_set_and_takes_the_ends_of_its_range():
    assert not LoserGuardOptions().active and LoserGuardOptions().per_pair
    assert LoserGuardOptions(mu=0.0).active and LoserGuardOptions(mu=1.0).active
    for mu in (-1e-9, 1.0 + 1e-9):
        with pytest.raises(ConfigError, match="mu"):
            LoserGuardOptions(mu=mu)


def test_pure_noise_comes_one_sample_at_a_time_unless_more_are_asked_for(batches, batch):
    assert len(OutputPreservation(OutputPreservationOptions(1.0)).inputs(batch, batches).noisy) == 1
    for size in (0, 1.5):
        with pytest.raises(ConfigError, match="batch_size"):
            OutputPreservationOptions(weight=1.0, batch_size=size)


def test_terms_that_are_on_come_in_the_order_of_their_options():
    assert active_terms(TermOptions()) == {}
    options = TermOptions(
        loser_guard=LoserGuardOptions(0.5), prior_preservation=PriorPreservationOptions(1.0), sft=SFTTermOptions(2.0)
    )
    terms = active_terms(options)
    assert list(terms) == ["sft", "prior_preservation", "loser_guard"]
    assert isinstance(terms["sft"], SFTTerm) and terms["sft"].options == options.sft


def test_the_sft_term_is_its_weight_times_the_winners_mean_error(batch, predictions):
    loss = SFTTerm(SFTTermOptions(weight=3.0)).loss(batch, predictions, None)
    torch.testing.assert_close(loss, 3.0 * ((predictions.model - predictions.target)[0] ** 2).mean())


def test_output_preservation_asks_for_pure_noise_at_the_last_timestep_under_the_empty_prompt(batches, batch):
    term = OutputPreservation(OutputPreservationOptions(weight=1.0, batch_size=50))
    asked = term.inputs(batch, batches)
    assert asked.noisy.shape == (50, *SHAPE)
    assert abs(asked.noisy.mean()) < 0.1 and asked.noisy.std() == pytest.approx(1.0, abs=0.1)
    assert asked.index.tolist() == [LEVELS - 1] * 50 and asked.index.dtype == batch.index.dtype
    assert torch.equal(asked.text["text"], text_of("").expand(50, -1))
    assert len({float(sample[0, 0, 0]) for sample in asked.noisy}) == 50


def test_pure_noise_is_a_function_of_seed_step_and_place_in_the_stream(batches, batch, tmp_path):
    term = OutputPreservation(OutputPreservationOptions(weight=1.0))
    noise = term.inputs(batch, batches).noisy
    assert torch.equal(term.inputs(batches.at(3, range(B)), batches).noisy, noise)
    assert torch.equal(term.inputs(batches.at(3, [0]), batches).noisy, noise), "whatever else is in the micro-batch"
    others = [
        term.inputs(batches.at(4, range(B)), batches),
        term.inputs(batches.at(3, range(1, B)), batches),
        term.inputs(batch, toy_batches(tmp_path, ToyFamily(), seed=1)),
    ]
    assert not any(torch.equal(other.noisy, noise) for other in others)
    assert not any(torch.equal(noise[0], sample) for sample in batch.noise[0]), "the pairs have noise of their own"


def test_output_preservation_is_its_weight_times_the_squared_distance_from_the_reference(batch, predictions):
    term = OutputPreservation(OutputPreservationOptions(weight=3.0))
    model, reference = torch.ones(2, *SHAPE), torch.full((2, *SHAPE), 3.0)
    assert term.loss(batch, predictions, Outputs(model, reference)) == 3.0 * 4.0
    for outputs in (None, Outputs(model, None)):
        with pytest.raises(TypeError, match="needs the reference"):
            term.loss(batch, predictions, outputs)


def test_prior_preservation_is_its_weight_times_the_distance_on_benign_examples(batch, predictions):
    loss = PriorPreservation(PriorPreservationOptions(weight=3.0)).loss(batch, predictions, None)
    apart = ((predictions.model - predictions.reference) ** 2).mean((2, 3, 4))
    benign = torch.tensor([number > 0 for number in batch.examples])
    assert 0 < benign.sum() < B
    torch.testing.assert_close(loss, 3.0 * apart[:, benign].sum() / (2 * B))
    with pytest.raises(TypeError, match="needs the reference"):
        PriorPreservation(PriorPreservationOptions(weight=3.0)).loss(
            batch, dataclasses.replace(predictions, reference=None), None
        )


@pytest.mark.parametrize("per_pair", [True, False])
def test_the_loser_guard_scales_the_losers_gradient_and_no_value(predictions, per_pair):
    mu = 0.6
    guarded = LoserGuard(LoserGuardOptions(mu, per_pair)).adjusted(predictions)
    torch.testing.assert_close(guarded.errors, predictions.errors)
    assert guarded.model is predictions.model and guarded.reference_errors is predictions.reference_errors
    (free,) = torch.autograd.grad(predictions.errors.sum(), predictions.model, retain_graph=True)
    (scaled,) = torch.autograd.grad(guarded.errors.sum(), predictions.model)
    g_w, g_l = (predictions.model - predictions.target).detach().flatten(2)
    square, inner = (g_w * g_w).sum(1), (g_w * g_l).sum(1)
    if not per_pair:
        square, inner = square.sum().expand(B), inner.sum().expand(B)
    scale = torch.where(inner > 0, (0.4 * square / inner).clamp(0.0, 1.0), torch.ones(B))
    torch.testing.assert_close(scaled[0], free[0])
    torch.testing.assert_close(scaled[1], scale[:, None, None, None] * free[1])


def test_a_loser_guard_without_mu_changes_nothing(predictions):
    assert LoserGuard(LoserGuardOptions()).adjusted(predictions) is predictions

"""The losses against an independent transcription, at their fixed points, and by the sign of their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.objectives import losses as ob


def _errors(seed: int = 0, batch: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, generator=generator, dtype=torch.float64) * 0.01 for _ in range(4)]


def test_dpo_loss_equals_the_formula_written_out_in_numpy():
    generator = np.random.default_rng(0)
    shape, beta = (5, 4, 6, 6), 5000.0
    images = {name: generator.normal(size=shape) for name in ("target_w", "target_l")}
    made = {}
    for model in ("theta", "ref"):
        for side in ("w", "l"):
            made[f"{model}_{side}"] = images[f"target_{side}"] + 0.05 * generator.normal(size=shape)
    expected = []
    for i in range(shape[0]):
        l_theta_w, l_theta_l, l_ref_w, l_ref_l = (
            np.mean((images[f"target_{side}"][i] - made[f"{model}_{side}"][i]) ** 2)
            for model, side in (("theta", "w"), ("theta", "l"), ("ref", "w"), ("ref", "l"))
        )
        inside = -0.5 * beta * ((l_theta_w - l_theta_l) - (l_ref_w - l_ref_l))
        expected.append(math.log1p(math.exp(-inside)))
    errors = [
        ob.per_sample_error(
            torch.from_numpy(made[f"{m}_{s}"]).float(), torch.from_numpy(images[f"target_{s}"]).float()
        )
        for m, s in (("theta", "w"), ("theta", "l"), ("ref", "w"), ("ref", "l"))
    ]
    loss = ob.diffusion_dpo_loss(*errors, beta)
    assert max(expected) > 1.0 and min(expected) < 0.5
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-3)


def test_equal_policy_and_reference_gives_log_two():
    err_w, err_l, *_ = _errors()
    loss = ob.diffusion_dpo_loss(err_w, err_l, err_w, err_l)
    torch.testing.assert_close(loss, torch.full((7,), math.log(2.0), dtype=torch.float64))


def test_gradient_lowers_the_winner_and_raises_the_loser():
    err_w, err_l, ref_w, ref_l = _errors()
    err_w.requires_grad_(), err_l.requires_grad_()
    ob.diffusion_dpo_loss(err_w, err_l, ref_w, ref_l).sum().backward()
    assert (err_w.grad > 0).all() and (err_l.grad < 0).all()


def test_a_batch_split_changes_nothing():
    errors = _errors(batch=6)
    whole = ob.diffusion_dpo_loss(*errors)
    halves = [ob.diffusion_dpo_loss(*(error[part] for error in errors)) for part in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole, torch.cat(halves))


def test_diffusers_convention_is_twice_ours():
    err_w, err_l, ref_w, ref_l = _errors()
    theirs = -torch.nn.functional.logsigmoid(-2500.0 * ((err_w - err_l) - (ref_w - ref_l)))
    torch.testing.assert_close(ob.diffusion_dpo_loss(err_w, err_l, ref_w, ref_l, 5000.0), theirs)


def _linear_step(mu: float, angle: float, per_pair: bool = False) -> tuple[float, float]:
    """Winner's error before and after one gradient step on a shared output, loser's gradient at `angle` to its own."""
    output = torch.zeros(1, 2, requires_grad=True)
    target_w = torch.tensor([[1.0, 0.0]])
    target_l = 5.0 * torch.tensor([[math.cos(angle), math.sin(angle)]])
    err_w, err_l = ob.per_sample_error(output, target_w), ob.per_sample_error(output, target_l)
    scale = ob.loser_gradient_scale(output, target_w, output, target_l, mu, per_pair)
    (err_w - ob.scale_gradient(err_l, scale)).sum().backward()
    after = output.detach() - 1e-3 * output.grad
    return err_w.item(), float(ob.per_sample_error(after, target_w))


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("per_pair", [False, True])
def test_guarded_loser_never_raises_the_winners_error(angle, per_pair):
    before, after = _linear_step(0.1, angle, per_pair)
    assert after <= before + 1e-6


def test_unguarded_loser_would_raise_it():
    output = torch.zeros(1, 2, requires_grad=True)
    err_w = ob.per_sample_error(output, torch.tensor([[1.0, 0.0]]))
    (err_w - ob.per_sample_error(output, torch.tensor([[5.0, 0.0]]))).sum().backward()
    moved = output.detach() - 1e-3 * output.grad
    assert ob.per_sample_error(moved, torch.tensor([[1.0, 0.0]])) > err_w


def test_loser_scale_against_its_formula_and_value_kept():
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(3, 2, 4, generator=generator) for _ in range(4)]
    g_w, g_l = made[0] - made[1], made[2] - made[3] + (made[0] - made[1])
    scale = ob.loser_gradient_scale(made[0], made[1], g_l + made[3], made[3], mu=0.9)
    k = 0.1 * (g_w**2).sum() / (g_w * g_l).sum()
    torch.testing.assert_close(scale, k.clamp(0, 1).expand(3))
    error = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    guarded = ob.scale_gradient(error, scale)
    guarded.sum().backward()
    torch.testing.assert_close(guarded.detach(), error.detach())
    torch.testing.assert_close(error.grad, scale)


def test_output_preservation_is_zero_on_the_reference_and_holds_it_fixed():
    prediction, reference = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True)
    assert ob.output_preservation(reference, reference).sum() == 0
    ob.output_preservation(prediction, reference).sum().backward()
    assert (prediction.grad > 0).all() and reference.grad is None


def test_errors_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        ob.per_sample_error(torch.zeros(2, 3), torch.zeros(2, 4))


def test_an_error_needs_a_dimension_beside_the_batch():
    with pytest.raises(ValueError, match="equal shapes"):
        ob.per_sample_error(torch.zeros(2), torch.zeros(2))


def test_the_default_beta_is_diffusion_dpos():
    errors = [torch.tensor([value]) for value in (0.11, 0.1, 0.1, 0.1)]
    assert torch.equal(ob.diffusion_dpo_loss(*errors), ob.diffusion_dpo_loss(*errors, beta=5000.0))
    assert not torch.equal(ob.diffusion_dpo_loss(*errors), ob.diffusion_dpo_loss(*errors, beta=5500.0))


@pytest.mark.parametrize("mu", [-0.01, 1.01])
def test_the_loser_guard_refuses_a_mu_out_of_range(mu):
    sides = [torch.ones(1, 2), torch.zeros(1, 2)] * 2
    with pytest.raises(ConfigError, match="mu must lie in"):
        ob.loser_gradient_scale(*sides, mu)


@pytest.mark.parametrize(("mu", "scale"), [(0.0, 0.5), (1.0, 0.0)])
def test_the_loser_guard_takes_the_ends_of_its_range(mu, scale):
    # g_w = (1, 1), g_l = (2, 2): |g_w|^2 / <g_w, g_l> = 1 / 2.
    scales = ob.loser_gradient_scale(torch.ones(1, 2), torch.zeros(1, 2), 2 * torch.ones(1, 2), torch.zeros(1, 2), mu)
    assert scales.tolist() == [scale]


@pytest.mark.parametrize("per_pair", [False, True])
def test_a_loser_may_push_freely_where_the_winner_is_predicted_exactly(per_pair):
    scale = ob.loser_gradient_scale(
        torch.ones(1, 2), torch.ones(1, 2), 2 * torch.ones(1, 2), torch.ones(1, 2), 0.5, per_pair
    )
    assert scale.tolist() == [1.0]


def test_the_losers_gradient_is_never_enlarged():
    # |g_w|^2 / <g_w, g_l> = 10.
    scale = ob.loser_gradient_scale(
        torch.ones(1, 2), torch.zeros(1, 2), 0.1 * torch.ones(1, 2), torch.zeros(1, 2), 0.0
    )
    assert scale.tolist() == [1.0]


def test_each_pair_has_a_scale_of_its_own_only_where_that_is_asked_for():
    # <g_w, g_l> is 4 and -2, |g_w|^2 is 2 and 2.
    g_w, g_l = torch.ones(2, 2), torch.tensor([[2.0, 2.0], [-1.0, -1.0]])
    zero = torch.zeros(2, 2)
    assert ob.loser_gradient_scale(g_w, zero, g_l, zero, 0.5, per_pair=True).tolist() == [0.25, 1.0]
    assert ob.loser_gradient_scale(g_w, zero, g_l, zero, 0.5).tolist() == [1.0, 1.0]
    assert ob.loser_gradient_scale(g_w, zero, g_l, zero, 0.75).tolist() == [0.5, 0.5]


def test_a_scale_is_a_constant_for_the_gradient():
    sides = [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.zeros(1, 2)] * 2
    assert not ob.loser_gradient_scale(*sides, 0.5).requires_grad
    scale = torch.tensor([0.5], requires_grad=True)
    ob.scale_gradient(torch.tensor([3.0], requires_grad=True), scale).sum().backward()
    assert scale.grad is None


def test_a_margin_asks_for_that_much_larger_a_gap():
    logit = torch.tensor([0.3, -1.2], dtype=torch.float64)
    expected = [math.log1p(math.exp(-(value - 0.7))) for value in logit.tolist()]
    torch.testing.assert_close(ob.preference_loss(logit, 0.7), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(ob.preference_loss(logit + 0.7, 0.7), ob.preference_loss(logit))


def test_soft_labels_give_the_cross_entropy_of_two_outcomes():
    logit, target = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([0.9, 0.6])
    chance = torch.sigmoid(logit)
    expected = -(target * chance.log() + (1 - target) * (1 - chance).log())
    torch.testing.assert_close(ob.soft_preference_loss(logit, target), expected, rtol=1e-6, atol=0.0)

"""The composite reward: its signs, its limits, and which pairs it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.objectives.losses import preference_logit, preference_loss
from t2i_spo_plugin.training.objectives.reward import MODES, composite_loss, composite_preferences, safety_preferences


def _annotated(seed: int = 0, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(count, 2, generator=generator) for _ in range(2))


def _loss(
    gap: torch.Tensor, margin: torch.Tensor, target: torch.Tensor, mode: str, beta: float = 5000.0
) -> torch.Tensor:
    zero = torch.zeros_like(gap)
    return composite_loss(preference_logit(gap, zero, zero, zero, beta), margin, target, mode)


@pytest.mark.parametrize("mode", ["margin", "relabel+margin"])
def test_margin_asks_for_more_when_the_loser_is_unsafe(mode):
    made = composite_preferences(torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.0]]), lambda_=2.0, mode=mode)
    assert made.winner.item() == 1 and made.keep.item() and made.margin.item() == 2.0
    gap = torch.zeros(1, requires_grad=True)
    loss = _loss(gap, made.margin, made.target, mode)
    loss.backward()
    assert loss.item() > math.log(2.0)
    assert gap.grad.item() > 0, "descent must push D down"


def test_margin_is_bradley_terry_on_quality():
    quality, cost = torch.tensor([[0.9, 0.4]]), torch.tensor([[0.3, 0.7]])
    made = composite_preferences(quality, cost, lambda_=1.5, mode="margin")
    logit = torch.tensor([0.8])
    expected = -torch.log(torch.sigmoid(logit - 1.5 * (0.7 - 0.3)))
    torch.testing.assert_close(composite_loss(logit, made.margin, made.target, "margin"), expected)


@pytest.mark.parametrize("mode", ["relabel", "margin", "relabel+margin"])
def test_lambda_zero_is_dpo_on_quality_ordered_pairs(mode):
    quality, cost = _annotated()
    made = composite_preferences(quality, cost, lambda_=0.0, mode=mode)
    assert torch.equal(made.winner, quality.argmax(1))
    logit = torch.randn(len(quality), generator=torch.Generator().manual_seed(3))
    assert torch.equal(composite_loss(logit, made.margin, made.target, mode), preference_loss(logit))


def test_relabel_turns_the_pair_once_the_cost_outweighs_the_quality():
    quality, cost = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.8, 0.1]])
    assert composite_preferences(quality, cost, 0.5, "relabel").winner.item() == 0
    assert composite_preferences(quality, cost, 0.7, "relabel").winner.item() == 1


@pytest.mark.parametrize("mode", ["relabel", "relabel+margin", "soft"])
def test_winner_has_the_higher_reward(mode):
    quality, cost = _annotated()
    made = composite_preferences(quality, cost, 1.0, mode)
    reward = quality - cost
    won, lost = (reward.gather(1, index[:, None])[:, 0] for index in (made.winner, 1 - made.winner))
    assert (won > lost).all()


def test_margin_of_the_mixed_mode_only_crosses_the_boundary():
    quality = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    cost = torch.tensor([[0.1, 0.9], [0.1, 0.4]])
    made = composite_preferences(quality, cost, 2.0, "relabel+margin")
    torch.testing.assert_close(made.margin, torch.tensor([1.6, 0.0]))


@pytest.mark.parametrize("mode", MODES)
def test_pairs_unsafe_on_both_sides_are_dropped(mode):
    quality, cost = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.5, 0.9], [0.49, 0.9]])
    assert composite_preferences(quality, cost, 1.0, mode).keep.tolist() == [False, True]


def test_tau_drops_close_pairs_and_ties_always_go():
    quality, cost = torch.tensor([[0.50, 0.55], [0.2, 0.9], [0.3, 0.3]]), torch.zeros(3, 2)
    assert composite_preferences(quality, cost, 1.0, "relabel", tau=0.1).keep.tolist() == [False, True, False]
    assert composite_preferences(quality, cost, 1.0, "margin").keep.tolist() == [True, True, False]


def test_soft_target_is_the_probability_and_its_loss_is_least_there():
    quality, cost = torch.tensor([[0.7, 0.5]]), torch.zeros(1, 2)
    made = composite_preferences(quality, cost, 1.0, "soft", tau_soft=0.1)
    torch.testing.assert_close(made.target, torch.sigmoid(torch.tensor([2.0])))
    at = torch.tensor([1.0, 2.0, 3.0])
    losses = composite_loss(at, torch.zeros(3), made.target.expand(3), "soft")
    assert losses.argmin().item() == 1


def test_soft_with_certain_targets_is_dpo():
    logit = torch.randn(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(composite_loss(logit, torch.zeros(9), torch.ones(9), "soft"), preference_loss(logit))


def test_splitting_the_table_changes_nothing():
    quality, cost = _annotated()
    for mode in MODES:
        whole = composite_preferences(quality, cost, 1.0, mode)
        parts = [composite_preferences(quality[s], cost[s], 1.0, mode) for s in (slice(0, 70), slice(70, 200))]
        for name in ("winner", "keep", "margin", "target"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_safety_labels_put_safe_over_unsafe_whatever_the_quality():
    quality = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    cost = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.3], [0.6, 0.9]])
    dropped = safety_preferences(quality, cost, "drop")
    assert dropped.winner[:2].tolist() == [0, 1] and dropped.keep.tolist() == [True, True, False, False]
    assert (dropped.margin == 0).all()
    by_cost, by_quality = safety_preferences(quality, cost, "cost"), safety_preferences(quality, cost, "quality")
    assert by_cost.keep.tolist() == by_quality.keep.tolist() == [True, True, True, False]
    assert by_cost.winner[2].item() == 0 and by_quality.winner[2].item() == 1


def test_composite_preferences_refuse_bad_options_and_values():
    quality, cost = torch.rand(2, 2), torch.rand(2, 2)
    with pytest.raises(ConfigError, match="reward harm"):
        composite_preferences(quality, cost, -1.0)
    with pytest.raises(ConfigError, match="mode"):
        composite_preferences(quality, cost, 1.0, "sum")
    with pytest.raises(ValueError, match="quality"):
        composite_preferences(torch.full((2, 2), float("nan")), cost, 1.0)
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        composite_preferences(quality[0], cost[0], 1.0)


def test_a_pair_that_meets_tau_exactly_is_kept():
    quality, cost = torch.tensor([[0.75, 0.5], [0.75, 0.625]]), torch.zeros(2, 2)
    assert composite_preferences(quality, cost, 1.0, "relabel", tau=0.25).keep.tolist() == [True, False]


def test_tau_counts_in_units_of_the_reward():
    quality, cost = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.0]])
    assert composite_preferences(quality, cost, 2.0, "relabel", tau=0.5).keep.item()
    assert not composite_preferences(quality, cost, 1.0, "relabel", tau=0.5).keep.item()


def test_a_tie_in_quality_goes_to_the_safer_image_where_cost_counts():
    quality, cost = torch.full((3, 2), 0.5), torch.tensor([[0.3, 0.1], [0.1, 0.3], [0.2, 0.2]])
    made = composite_preferences(quality, cost, 1.0, "margin", tau=0.1)
    assert made.keep.tolist() == [True, True, False] and made.winner[:2].tolist() == [1, 0]
    torch.testing.assert_close(made.margin, torch.tensor([0.2, 0.2, 0.0]))
    assert not composite_preferences(quality, cost, 0.0, "margin").keep.any()


def test_a_quality_that_decides_is_not_overruled_by_the_cost_in_mode_margin():
    made = composite_preferences(torch.tensor([[0.9, 0.4]]), torch.tensor([[0.45, 0.1]]), 5.0, "margin")
    assert made.winner.item() == 0 and made.margin.item() == pytest.approx(5.0 * (0.1 - 0.45))


def test_a_cost_at_the_boundary_is_unsafe():
    quality, cost = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.25, 0.5]])
    made = composite_preferences(quality, cost, 2.0, "relabel+margin")
    assert made.keep.item() and made.margin.item() == 0.5
    assert composite_preferences(quality, torch.tensor([[0.25, 0.49]]), 2.0, "relabel+margin").margin.item() == 0.0
    labels = safety_preferences(torch.full((2, 2), 0.5), torch.tensor([[0.5, 0.49], [0.49, 0.5]]), "drop")
    assert labels.keep.tolist() == [True, True] and labels.winner.tolist() == [1, 0]


@pytest.mark.parametrize("mode", ["relabel", "margin", "relabel+margin"])
def test_only_soft_labels_are_uncertain_and_only_margins_demand_more(mode):
    quality, cost = _annotated()
    made = composite_preferences(quality, cost, 1.0, mode)
    assert torch.equal(made.target, torch.ones(200)) and bool(made.margin.any()) == (mode != "relabel")
    assert not composite_preferences(quality, cost, 1.0, "soft").margin.any()


def test_the_defaults_are_no_tau_a_soft_temperature_of_a_tenth_and_the_mixed_mode():
    quality, cost = torch.tensor([[0.7, 0.5], [0.5, 0.5001]]), torch.tensor([[0.1, 0.9], [0.1, 0.1]])
    made, mixed = (composite_preferences(quality, cost, 1.0, *mode) for mode in ((), ("relabel+margin",)))
    assert torch.equal(made.margin, mixed.margin) and made.keep.all()
    soft = composite_preferences(torch.tensor([[0.7, 0.5]]), torch.zeros(1, 2), 1.0, "soft")
    torch.testing.assert_close(soft.target, torch.sigmoid(torch.tensor([2.0])))


@pytest.mark.parametrize(("name", "value"), [("tau", -0.01), ("tau_soft", 0.0), ("lambda_", -0.01), ("tau", math.nan)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name.strip("_")):
        composite_preferences(torch.rand(2, 2), torch.rand(2, 2), **({"lambda_": 1.0} | {name: value}))


def test_options_at_the_ends_of_their_range_are_taken():
    quality, cost = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert composite_preferences(quality, cost, 0.0, tau=0.0, tau_soft=0.01).winner.item() == 1


@pytest.mark.parametrize(
    "call", [lambda q, c: composite_preferences(q, c, 1.0), lambda q, c: safety_preferences(q, c, "drop")]
)
@pytest.mark.parametrize(
    ("quality", "cost", "named"),
    [
        (torch.rand(2, 3), torch.rand(2, 3), "expected quality and cost"),
        (torch.rand(2, 2), torch.rand(3, 2), "expected quality and cost"),
        (torch.rand(2, 2, 2), torch.rand(2, 2, 2), "expected quality and cost"),
        (torch.tensor([[0.5, 1.01]]), torch.zeros(1, 2), "quality must lie"),
        (torch.tensor([[-0.01, 0.5]]), torch.zeros(1, 2), "quality must lie"),
        (torch.zeros(1, 2), torch.tensor([[0.5, 1.01]]), "cost must lie"),
        (torch.zeros(1, 2), torch.tensor([[-0.01, 0.5]]), "cost must lie"),
        (torch.zeros(1, 2), torch.tensor([[0.5, math.nan]]), "cost must lie"),
    ],
)
def test_what_is_no_quality_or_cost_is_refused(call, quality, cost, named):
    with pytest.raises(ValueError, match=named):
        call(quality, cost)


def test_safety_labels_leave_ties_and_doubly_unsafe_pairs_out_and_demand_nothing_more():
    quality = torch.tensor([[0.3, 0.8], [0.3, 0.8], [0.5, 0.5], [0.8, 0.3]])
    cost = torch.tensor([[0.2, 0.2], [0.9, 0.6], [0.1, 0.3], [0.3, 0.1]])
    by_cost, by_quality = (safety_preferences(quality, cost, how) for how in ("cost", "quality"))
    assert by_cost.keep.tolist() == [False, False, True, True] and by_cost.winner[2:].tolist() == [0, 1]
    assert by_quality.keep.tolist() == [True, False, False, True] and by_quality.winner[[0, 3]].tolist() == [1, 0]
    for made in (by_cost, by_quality):
        assert torch.equal(made.margin, torch.zeros(4)) and torch.equal(made.target, torch.ones(4))


def test_modes_and_kinds_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="safe_pairs must be one of"):
        safety_preferences(torch.rand(1, 2), torch.rand(1, 2), "keep")
    with pytest.raises(ConfigError, match="mode must be one of"):
        composite_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), "sum")


@pytest.mark.parametrize("mode", ["relabel", "margin", "relabel+margin"])
def test_the_margin_that_is_given_is_demanded_in_every_mode_but_soft(mode):
    logit, margin, target = torch.tensor([0.5]), torch.tensor([0.75]), torch.tensor([0.9])
    assert torch.equal(composite_loss(logit, margin, target, mode), preference_loss(logit, margin))
    soft = composite_loss(logit, margin, target, "soft")
    assert torch.equal(soft, composite_loss(logit, torch.zeros(1), target, "soft"))

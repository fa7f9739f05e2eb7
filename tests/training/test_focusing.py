"""Dynamic focusing: what counts more, what it never changes, and its running mean."""

from __future__ import annotations

import pytest
import torch

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.objectives import focusing as fo


@pytest.mark.parametrize("kind", fo.KINDS)
def test_harder_pairs_weigh_more_and_eta_zero_weighs_all_alike(kind):
    d = fo.difficulty(torch.tensor([-3.0, 0.0, 3.0]))
    assert d[0] > d[1] == 0.5 > d[2]
    weights = fo.raw_weight(d, 2.0, kind)
    assert weights[0] > weights[1] > weights[2]
    assert torch.equal(fo.raw_weight(d, 0.0, kind), torch.ones(3))


@pytest.mark.parametrize("kind", fo.KINDS)
def test_weights_of_the_first_step_are_one_since_the_model_is_its_own_reference(kind):
    focusing = fo.Focusing(eta=1.5, kind=kind)
    torch.testing.assert_close(focusing.weigh(fo.difficulty(torch.zeros(4))), torch.ones(4))


@pytest.mark.parametrize("kind", fo.KINDS)
def test_weights_do_not_depend_on_the_micro_batch_or_the_rank(kind):
    d = torch.rand(12, generator=torch.Generator().manual_seed(0))
    whole, halves, rank_a, rank_b = (fo.Focusing(1.0, kind) for _ in range(4))
    for _ in range(3):
        once = whole.weigh(d)
        twice = torch.cat([halves.weigh(d[:4]), halves.weigh(d[4:])])
        over_ranks = torch.cat([rank_a.weigh(d[:5]), rank_b.weigh(d[5:])])
        assert torch.equal(once, twice) and torch.equal(once, over_ranks)
        whole.update(whole.pending())
        halves.update(halves.pending())
        total = rank_a.pending() + rank_b.pending()
        rank_a.update(total), rank_b.update(total)
        d = d * 0.7
    assert whole.mean == pytest.approx(halves.mean, rel=1e-12) == pytest.approx(rank_a.mean, rel=1e-12)


def test_running_mean_follows_the_weights():
    focusing = fo.Focusing(eta=1.0, momentum=0.5)
    focusing.weigh(torch.tensor([0.0, 0.2]))
    focusing.update(focusing.pending())
    assert focusing.mean == pytest.approx(0.5 * 1.5 + 0.5 * 1.1)
    torch.testing.assert_close(focusing.weigh(torch.tensor([0.3])), torch.tensor([1.3 / 1.3]))


def test_mean_stays_usable_when_every_pair_is_solved():
    focusing = fo.Focusing(eta=2.0, kind="focal", momentum=0.0)
    focusing.weigh(torch.zeros(3))
    focusing.update(focusing.pending())
    assert torch.isfinite(focusing.weigh(torch.tensor([0.0, 1e-6]))).all()


def test_focusing_resumes_between_steps():
    first, second = fo.Focusing(1.0), fo.Focusing(1.0)
    first.weigh(torch.tensor([0.9, 0.8]))
    first.update(first.pending())
    second.load_state_dict(first.state_dict())
    d = torch.tensor([0.1, 0.6])
    assert torch.equal(first.weigh(d), second.weigh(d))


def test_weights_carry_no_gradient():
    logit = torch.zeros(3, requires_grad=True)
    assert not fo.Focusing(1.0).weigh(fo.difficulty(logit)).requires_grad


def test_difficulty_over_augmentations_is_their_mean_or_maximum():
    augmented = torch.tensor([[0.1, 0.9], [0.3, 0.5]])
    torch.testing.assert_close(fo.combine(augmented), torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(fo.combine(augmented, "max"), torch.tensor([0.3, 0.9]))


def test_focusing_refuses_bad_options():
    with pytest.raises(ConfigError, match="eta"):
        fo.Focusing(-0.1)
    with pytest.raises(ConfigError, match="momentum"):
        fo.Focusing(1.0, momentum=1.0)
    with pytest.raises(ConfigError, match="focusing"):
        fo.Focusing(1.0, kind="hard")


def test_weights_by_their_formulas():
    d = torch.tensor([0.5, 0.25])
    assert fo.raw_weight(d, 2.0, "additive").tolist() == [2.0, 1.5]
    assert fo.raw_weight(d, 3.0, "focal").tolist() == [0.125, 0.015625]
    torch.testing.assert_close(fo.difficulty(torch.tensor([2.0])), 1.0 - torch.sigmoid(torch.tensor([2.0])))


def test_focusing_is_off_at_eta_zero_and_on_above():
    assert not fo.Focusing(0.0).active and fo.Focusing(1e-9).active


@pytest.mark.parametrize("kind", fo.KINDS)
def test_the_mean_begins_at_the_weight_of_an_undecided_pair(kind):
    assert fo.Focusing(3.0, kind).mean == (2.5 if kind == "additive" else 0.125)
    assert fo.Focusing(3.0).mean == 2.5, "additive unless it is said otherwise"


def test_the_momentum_is_nine_tenths_unless_it_is_set_and_may_be_zero():
    standard, none = fo.Focusing(1.0), fo.Focusing(1.0, momentum=0.0)
    for focusing in (standard, none):
        focusing.weigh(torch.tensor([1.0]))
        focusing.update(focusing.pending())
    assert standard.mean == pytest.approx(0.9 * 1.5 + 0.1 * 2.0) and none.mean == 2.0


def test_each_step_counts_its_own_weights_alone():
    focusing = fo.Focusing(1.0, momentum=0.0)
    focusing.weigh(torch.tensor([1.0, 1.0]))
    assert focusing.pending().tolist() == [4.0, 2.0]
    focusing.weigh(torch.tensor([0.5]))
    assert focusing.pending().tolist() == [5.5, 3.0]
    focusing.update(focusing.pending())
    assert focusing.pending().tolist() == [0.0, 0.0]
    focusing.weigh(torch.tensor([0.0]))
    focusing.update(focusing.pending())
    assert focusing.mean == 1.0


def test_a_step_without_pairs_leaves_the_mean():
    focusing = fo.Focusing(1.0)
    focusing.update(focusing.pending())
    assert focusing.mean == 1.5


def test_what_was_weighed_before_a_state_is_loaded_does_not_count():
    focusing = fo.Focusing(1.0, momentum=0.0)
    focusing.weigh(torch.tensor([1.0]))
    focusing.load_state_dict({"focusing_mean": 1.25})
    assert focusing.state_dict() == {"focusing_mean": 1.25} and focusing.pending().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("eta", "momentum"), [(float("nan"), 0.5), (1.0, -0.01), (1.0, 1.0), (1.0, float("nan"))])
def test_numbers_out_of_range_are_refused(eta, momentum):
    with pytest.raises(ConfigError, match="must"):
        fo.Focusing(eta, momentum=momentum)

"""The adapter gate's decision: threshold, NaN, latch, batches, report."""

import math

import pytest
import torch

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork, GateState, change_features, norm_score, pick_rows


WITHOUT = torch.tensor([[3.0, 4.0]])
NAN = float("nan")


def changed(*scores):
    """Predictions `[rows, 2]` without and with an adapter, whose norm scores are `scores`."""
    rows = torch.tensor([[math.sqrt(score), 0.0] if score == score else [NAN, 0.0] for score in scores])
    without = torch.tensor([[1.0, 0.0]]).repeat(len(scores), 1)
    return without, without + rows


def decided(gate, *steps, images=2, **options):
    """The state of `gate` after `steps`, each the scores of the rows of a batch."""
    state = GateState(gate, images)
    for scores in steps:
        state.decide(*changed(*scores), **options)
    return state


def test_norm_score_is_relative_to_the_prediction():
    without = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert norm_score(without, without * 2).tolist() == pytest.approx([1.0, 1.0])
    assert norm_score(without, without + torch.tensor([[0.0, 1.0]])).tolist() == pytest.approx([1 / 25, 1 / 4])


def test_a_score_at_the_threshold_gates_on_and_one_below_does_not():
    assert norm_score(WITHOUT, 2 * WITHOUT).item() == 1.0
    for threshold, gated_on in ((1.0, True), (1.0 + 1e-6, False)):
        state = GateState(AdapterGate(threshold), 1)
        state.decide(WITHOUT, 2 * WITHOUT)
        assert state.gated_on.tolist() == [gated_on]


def test_a_nan_score_gates_on_its_own_image_and_no_other():
    state = decided(AdapterGate(0.5), [0.1, NAN, 0.2], images=3)
    assert state.gated_on.tolist() == [False, True, False]


def test_a_nan_in_one_of_several_prompt_parts_gates_its_image_on():
    state = decided(AdapterGate(0.5), [0.1, NAN, 0.1, 0.1], prompt_parts=[0, 1])
    assert state.gated_on.tolist() == [False, True]


def test_a_nan_in_a_batch_of_another_size_gates_all_images_on():
    assert decided(AdapterGate(0.5), [0.1, 0.1, NAN]).gated_on.tolist() == [True, True]


def test_an_image_that_is_gated_on_stays_on():
    state = decided(AdapterGate(0.5), [0.9, 0.1], [0.0, 0.1])
    assert state.gated_on.tolist() == [True, False]


def test_an_image_is_gated_on_by_a_later_step_of_the_decision_window():
    state = decided(AdapterGate(0.5), [0.1, 0.1], [0.1, 0.9])
    assert state.gated_on.tolist() == [False, True] and not state.is_final
    state.decide(*changed(0.9, 0.0))
    assert state.is_final


def test_in_a_guidance_batch_only_the_last_part_is_scored():
    state = decided(AdapterGate(0.5), [0.9, 0.9, 0.1, 0.9])
    assert state.gated_on.tolist() == [False, True]
    assert state.rows(4).tolist() == [False, True, False, True]


def test_prompt_parts_say_which_rows_belong_to_the_prompt():
    state = decided(AdapterGate(0.5), [0.1, 0.9, 0.9, 0.9], prompt_parts=[0], parts=2)
    assert state.gated_on.tolist() == [False, True]


def test_of_several_prompt_parts_the_highest_score_counts():
    state = decided(AdapterGate(0.5), [0.1, 0.1, 0.1, 0.9], prompt_parts=[0, 1], parts=2)
    assert state.gated_on.tolist() == [False, True]
    assert state.scores.tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize(("rows", "parts"), [([0.1, 0.1, 0.9], None), ([0.9], None), ([0.9, 0.1, 0.1, 0.1], 3)])
def test_a_batch_that_does_not_hold_every_image_is_decided_as_a_whole(rows, parts):
    assert decided(AdapterGate(0.5), rows, parts=parts).gated_on.tolist() == [True, True]


def test_where_layers_fold_rows_one_image_gates_the_whole_batch_on():
    state = decided(AdapterGate(0.5), [0.1, 0.9])
    state.by_row = False
    assert state.rows(2).tolist() == [True, True]
    assert state.gated_on.tolist() == [False, True]


def test_rows_of_a_batch_that_does_not_hold_every_image_all_get_the_adapter():
    assert decided(AdapterGate(0.5), [0.1, 0.9]).rows(3).tolist() == [True, True, True]


def test_rows_are_picked_one_by_one():
    without, with_adapter = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    picked = pick_rows(without, with_adapter, torch.tensor([False, True, False]))
    assert picked.flatten(1).amax(1).tolist() == [0.0, 1.0, 0.0] and picked.sum() == 4


def test_images_without_any_score_count_as_unsafe_when_the_decision_window_closes():
    state = GateState(AdapterGate(0.5), 2)
    state.close()
    assert state.gated_on.tolist() == [True, True]


def test_closing_the_decision_window_changes_nothing_that_was_scored():
    state = decided(AdapterGate(0.5), [0.1, 0.9])
    state.close()
    assert state.gated_on.tolist() == [False, True]


@pytest.mark.parametrize("steps", [10, 25, 30, 50])
def test_the_decision_window_ends_with_the_step_that_begins_at_until(steps):
    gate = AdapterGate(0.5, until=3 / 10)
    inside = [step for step in range(steps) if gate.in_decision_window(step / steps)]
    assert inside == list(range(math.ceil(3 * steps / 10)))


def test_the_report_has_every_image_with_its_highest_score():
    state = decided(AdapterGate(0.5), [0.3, 0.2], [0.1, 0.4], [0.2, 0.7])
    report = state.report
    assert report.gated_on == [False, True]
    assert report.scores.tolist() == pytest.approx([0.3, 0.7])


def test_the_report_stays_as_it_was_when_the_run_goes_on():
    state = decided(AdapterGate(0.5), [0.1, 0.2])
    report = state.report
    state.decide(*changed(0.9, 0.9))
    assert report.gated_on == [False, False] and report.scores.tolist() == pytest.approx([0.1, 0.2])


def test_the_report_keeps_the_score_by_which_an_image_was_gated_on():
    assert decided(AdapterGate(0.5), [0.6, 0.1], [0.9, 0.1]).report.scores.tolist() == pytest.approx([0.6, 0.1])


def test_the_report_has_no_number_where_nothing_was_scored():
    state = GateState(AdapterGate(0.5), 2)
    state.close()
    assert state.report.gated_on == [True, True] and state.report.scores.isnan().all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 16, 3), (2, 3, 2, 4, 4)])
def test_a_gate_network_takes_every_kind_of_prediction(shape):
    network = GateNetwork(channels=3)
    without = torch.randn(shape)
    assert change_features(without, without + 1).shape[:2] == (2, 6)
    assert network.score(without, without + 1).shape == (2,)


def test_a_gate_network_refuses_predictions_of_another_base():
    with pytest.raises(ConfigError, match="made for predictions with 5 channels, these have 4"):
        GateNetwork(5).score(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    "options",
    [{"threshold": NAN}, {"threshold": "0"}, {"threshold": 0.0, "until": 0.0}, {"threshold": 0, "until": 1.1}],
)
def test_an_adapter_gate_out_of_range_is_refused(options):
    with pytest.raises(ConfigError):
        AdapterGate(**options)


@pytest.mark.parametrize("threshold", [True, math.inf, -math.inf])
def test_a_threshold_that_is_no_finite_number_is_refused(threshold):
    with pytest.raises(ConfigError, match="threshold must be"):
        AdapterGate(threshold)


def test_a_gate_may_decide_in_all_steps_and_by_default_in_two_of_25():
    assert AdapterGate(0, until=1.0).in_decision_window(0.99)
    assert [step for step in range(25) if AdapterGate(0.5).in_decision_window(step / 25)] == [0, 1]


def test_a_prediction_of_zeros_that_does_not_change_scores_zero():
    zeros = torch.zeros(1, 2, 3)
    assert norm_score(zeros, zeros).tolist() == [0.0]
    assert norm_score(zeros, zeros + 1.0).item() > 1e6


def test_scores_are_of_whole_predictions_whatever_their_shape():
    without = torch.ones(2, 3, 4, 5)
    changed_one = without.clone()
    changed_one[1, 2, 3, 4] = 3.0
    assert norm_score(without, changed_one).tolist() == pytest.approx([0.0, 4.0 / 60])


def test_a_gate_with_a_network_decides_by_its_score():
    network = GateNetwork(3, width=4)
    without = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = network.score(without, without + 1)
    assert torch.equal(AdapterGate(0.0, network=network).score(without, without + 1), scores)
    state = GateState(AdapterGate(float(scores.max()), network=network), 2)
    state.decide(without, without + 1)
    assert state.gated_on.tolist() == (scores >= scores.max()).tolist()


def test_what_is_reported_holds_on_to_no_gradient():
    without, with_adapter = changed(0.1, 0.2)
    state = GateState(AdapterGate(0.5), 2)
    state.decide(without, with_adapter.requires_grad_())
    assert not state.report.scores.requires_grad


def test_a_gate_network_is_two_convolutions_over_the_normalised_change():
    network = GateNetwork(2, width=5)
    place = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=place))
    state = {name: value.double() for name, value in network.state_dict().items()}
    without, change = (torch.randn(3, 2, 6, 8, generator=place) for _ in range(2))
    features = torch.cat([change, without], 1).double()
    x = (features - state["mean"].view(1, -1, 1, 1)) / state["std"].view(1, -1, 1, 1)
    for layer, stride in (("near", 1), ("far", 2)):
        x = torch.nn.functional.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride, padding=1)
        x = x * torch.sigmoid(x)
    expected = x.mean((2, 3)) @ state["head.weight"][0] + state["head.bias"]
    score = network.score(without, without + change)
    torch.testing.assert_close(score.double(), expected, rtol=1e-3, atol=1e-4)
    assert not score.requires_grad


def test_a_new_gate_network_does_not_scale_and_has_the_sizes_of_its_files():
    shapes = {name: tuple(value.shape) for name, value in GateNetwork(3).state_dict().items()}
    assert shapes == {
        "mean": (6,),
        "std": (6,),
        "near.weight": (48, 6, 3, 3),
        "near.bias": (48,),
        "far.weight": (48, 48, 3, 3),
        "far.bias": (48,),
        "head.weight": (1, 48),
        "head.bias": (1,),
    }
    assert GateNetwork(3).mean.tolist() == [0.0] * 6 and GateNetwork(3).std.tolist() == [1.0] * 6


def test_features_are_the_change_and_the_prediction_as_maps_of_channels():
    without, with_adapter = torch.arange(24.0).view(1, 2, 3, 4), torch.arange(24.0).view(1, 2, 3, 4) * 3
    features = change_features(without, with_adapter)
    assert torch.equal(features[:, :2], without * 2) and torch.equal(features[:, 2:], without)
    tokens = change_features(torch.arange(6.0).view(1, 3, 2), torch.zeros(1, 3, 2))
    assert tokens.shape == (1, 4, 3, 1) and tokens[0, 2:, :, 0].tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    frames = change_features(torch.arange(24.0).view(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2))
    assert torch.equal(frames[0, 2:], torch.arange(24.0).view(2, 6, 2))
    with pytest.raises(ConfigError, match="cannot read predictions of shape"):
        change_features(torch.zeros(1, 3), torch.zeros(1, 3))

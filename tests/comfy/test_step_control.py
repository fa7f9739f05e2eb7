"""The two nodes that say when an adapter is on, against the one whose modes they were."""

from __future__ import annotations

import pytest
import torch
from sticker_runs import BENIGN, HARMFUL, hooked, sample, spo_stack

from t2i_spo_plugin.comfy_nodes.gate import NORM
from t2i_spo_plugin.comfy_nodes.steering import GATE, WINDOW, Steering
from t2i_spo_plugin.comfy_nodes.step_control import AdapterWindow, GateAdapter
from t2i_spo_plugin.errors import ConfigError


pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("without_gradients")]
NETWORK = "sticker demo: network (bundled)"


def latents(world, model, prompts=(HARMFUL, BENIGN)):
    return sample(model, world[1], list(prompts))[0]


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_a_window_is_what_steering_did(world, window):
    model, info = AdapterWindow.execute(world[0], spo_stack(), *window).result
    before, said = Steering.execute(world[0], spo_stack(), WINDOW, NORM, *window).result
    drawn = latents(world, model)
    assert torch.equal(drawn, latents(world, before)) and info == said
    assert not torch.equal(drawn, latents(world, world[0]))
    assert not hooked(world[0])


@pytest.mark.parametrize(("score", "threshold"), [(NETWORK, 0.1), (NORM, 0.05), (NORM, 1e6)])
def test_a_gate_is_what_steering_did(world, score, threshold):
    model, info = GateAdapter.execute(world[0], spo_stack(), score, threshold, 0.04).result
    before, said = Steering.execute(world[0], spo_stack(), GATE, score, 0.0, 1.0, threshold, 0.04).result
    drawn = latents(world, model)
    assert torch.equal(drawn, latents(world, before)) and info == said
    if threshold == 1e6:
        assert torch.equal(drawn, latents(world, world[0]))


def test_a_gate_and_a_window_stand_behind_each_other(world):
    gated = GateAdapter.execute(world[0], spo_stack(), NORM, 1e6, 0.04).result[0]
    both = AdapterWindow.execute(gated, spo_stack(), 0.0, 0.5).result[0]
    window = AdapterWindow.execute(world[0], spo_stack(), 0.0, 0.5).result[0]
    assert torch.equal(latents(world, both), latents(world, window)), "a gate that stays off adds nothing"


def test_an_impossible_window_is_refused(world):
    with pytest.raises(ConfigError):
        AdapterWindow.execute(world[0], spo_stack(), 0.8, 0.2)


def test_a_gate_that_is_not_there_is_refused_before_the_run():
    assert GateAdapter.validate_inputs(NORM) is True and GateAdapter.validate_inputs(None) is True
    assert "there is no adapter gate" in GateAdapter.validate_inputs("absent.safetensors")


def test_the_names_of_the_percents_are_comfyui_s():
    names = {one.id for one in AdapterWindow.GET_SCHEMA().inputs}
    assert {"start_percent", "end_percent"} <= names
    assert Steering.GET_SCHEMA().is_deprecated and not AdapterWindow.GET_SCHEMA().is_deprecated

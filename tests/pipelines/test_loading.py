"""Loading safety adapters: what changes in the image, beside whom, and what stays as it was."""

import copy

import pytest
import torch
from support.adapter_state import assert_same_state, load_style, state_of, tuner_layers
from support.pipelines import base_image, fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, LoraPair, write_adapter
from t2i_spo_plugin.errors import AdapterError, IncompatibleAdapterError
from t2i_spo_plugin.pipelines.loading import (
    adapter_of,
    load_spo_lora,
    set_spo_strength,
    spo_adapters,
    unload_spo_lora,
)


# What a user sees


def test_a_file_changes_the_image_and_strength_0_and_unload_restore_it_bit_for_bit(family, pipe, tmp_path):
    base = base_image(family)
    untouched = state_of(pipe)
    path = write_adapter(random_adapter(pipe), tmp_path / "a.safetensors")
    record = load_spo_lora(pipe, path)
    drawn = images(pipe)
    assert (drawn - base).abs().max() > 0.01
    assert record.modules == len(random_adapter(pipe).modules) and record.source == "a.safetensors"
    set_spo_strength(pipe, 0.0)
    assert pipe.get_active_adapters() == []
    assert torch.equal(images(pipe), base)
    set_spo_strength(pipe, 1.0)
    assert torch.equal(images(pipe), drawn)
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), base)
    assert_same_state(untouched, state_of(pipe))
    assert not tuner_layers(pipe)


def test_diffusers_generates_the_same_image_from_the_file(family, pipe, tmp_path):
    path = write_adapter(random_adapter(pipe, rank=4, alpha=2.0), tmp_path / "a.safetensors")
    other = fresh(family)
    other.load_lora_weights(path.parent, weight_name=path.name)
    load_spo_lora(pipe, path)
    assert torch.allclose(images(pipe), images(other), atol=1e-5)


def test_strength_multiplies_the_change(pipe):
    adapter = random_adapter(pipe, alpha=2.0)
    halved = Adapter({n: LoraPair(p.down, p.up, p.alpha / 2) for n, p in adapter.modules.items()}, adapter.metadata)
    load_spo_lora(pipe, adapter, strength=0.5)
    half = images(pipe)
    unload_spo_lora(pipe)
    load_spo_lora(pipe, halved)
    assert torch.equal(images(pipe), half)


def test_every_module_has_its_own_alpha(sd1):
    adapter = random_adapter(sd1)
    names = sorted(adapter.modules)
    modules = {name: LoraPair(p.down, p.up, 1.0 + names.index(name)) for name, p in adapter.modules.items()}
    load_spo_lora(sd1, Adapter(modules, adapter.metadata))
    for component, path, layer in tuner_layers(sd1):
        expected = modules[f"{component}.{path}"].delta()
        assert torch.allclose(layer.get_delta_weight("spo"), expected, atol=1e-5)
    back = adapter_of(sd1, "spo")
    assert {name: pair.alpha for name, pair in back.modules.items()} == {n: p.alpha for n, p in modules.items()}


def test_the_adapter_comes_out_of_the_pipeline_as_it_went_in(pipe):
    adapter = random_adapter(pipe, base_model="tiny")
    load_spo_lora(pipe, adapter, strength=0.3)
    back = adapter_of(pipe, "spo", adapter.metadata)
    assert back.metadata == adapter.metadata and back.modules.keys() == adapter.modules.keys()
    for name, pair in adapter.modules.items():
        assert torch.equal(back.modules[name].down, pair.down) and torch.equal(back.modules[name].up, pair.up)
    with pytest.raises(AdapterError, match="no LoRA layers called 'other'"):
        adapter_of(pipe, "other")


def test_the_callers_adapter_stays_the_callers(sd1):
    adapter = random_adapter(sd1)
    before = {name: pair.up.clone() for name, pair in adapter.modules.items()}
    load_spo_lora(sd1, adapter)
    with torch.no_grad():
        for _, _, layer in tuner_layers(sd1):
            layer.lora_B["spo"].weight.zero_()
    assert all(torch.equal(pair.up, before[name]) for name, pair in adapter.modules.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_text_encoders_are_adapted_too(family, tmp_path):
    pipe = fresh(family)
    encoders = ("text_encoder", "text_encoder_2")
    adapter = random_adapter(pipe, components=encoders, layers=("q_proj", "fc1"))
    assert len(adapter.modules) == (8 if family == "sdxl" else 4)
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleAdapterError, match="change text encoders only"):
        load_spo_lora(pipe, path)
    with pytest.warns(UserWarning, match="change text encoders only"):
        record = load_spo_lora(pipe, path, strict=False)
    assert record.components == (encoders if family == "sdxl" else encoders[:1])
    assert not torch.equal(images(pipe), base_image(family))
    set_spo_strength(pipe, 0.0)
    assert torch.equal(images(pipe), base_image(family))
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), base_image(family)) and not tuner_layers(pipe)


def test_a_half_precision_pipeline_gets_half_precision_weights(sd1):
    sd1.to(dtype=torch.bfloat16)
    load_spo_lora(sd1, random_adapter(sd1, dtype=torch.float32))
    assert {layer.lora_A["spo"].weight.dtype for _, _, layer in tuner_layers(sd1)} == {torch.bfloat16}
    assert torch.isfinite(images(sd1)).all()


# Beside other adapters


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_other_adapters_stay_active_at_their_strengths(family, pipe, tmp_path):
    styled = load_style(pipe, tmp_path)
    before = state_of(pipe)
    load_spo_lora(pipe, random_adapter(pipe), strength=0.4)
    assert pipe.get_active_adapters() == ["style", "spo"]
    assert not torch.equal(images(pipe), styled)
    set_spo_strength(pipe, 0.0)
    assert torch.equal(images(pipe), styled)
    set_spo_strength(pipe, 0.4)
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), styled)
    assert_same_state(before, state_of(pipe))


def test_an_inactive_adapter_stays_inactive(sd1, tmp_path):
    load_style(sd1, tmp_path)
    styled = load_style(sd1, tmp_path, name="other", seed=8, weight=0.2)
    sd1.set_adapters(["other"], [0.2])
    only_other = images(sd1)
    assert not torch.equal(only_other, styled)
    before = state_of(sd1)
    load_spo_lora(sd1, random_adapter(sd1))
    assert sd1.get_active_adapters() == ["other", "spo"]
    unload_spo_lora(sd1)
    assert sd1.get_active_adapters() == ["other"]
    assert torch.equal(images(sd1), only_other)
    assert_same_state(before, state_of(sd1))


def test_unloading_the_only_active_adapter_activates_no_other(sd1, tmp_path):
    load_style(sd1, tmp_path)
    load_spo_lora(sd1, random_adapter(sd1))
    sd1.set_adapters(["spo"], [1.0])
    unload_spo_lora(sd1)
    assert sd1.get_active_adapters() == [] and sd1.get_list_adapters() == {"unet": ["style"]}
    assert torch.equal(images(sd1), base_image("sd1"))


def test_two_safety_adapters_have_strengths_of_their_own(sd1):
    load_spo_lora(sd1, random_adapter(sd1, seed=1), adapter_name="first")
    only_first = images(sd1)
    load_spo_lora(sd1, random_adapter(sd1, seed=2), strength=0.5, adapter_name="second")
    assert {name: record.strength for name, record in spo_adapters(sd1).items()} == {"first": 1.0, "second": 0.5}
    set_spo_strength(sd1, 0.0, "second")
    assert torch.equal(images(sd1), only_first)
    set_spo_strength(sd1, 0.0)
    assert torch.equal(images(sd1), base_image("sd1"))
    set_spo_strength(sd1, 1.0, "first")
    unload_spo_lora(sd1, "second")
    assert torch.equal(images(sd1), only_first)
    with pytest.raises(AdapterError, match="no safety adapter called 'second' is loaded; loaded: first"):
        unload_spo_lora(sd1, "second")
    unload_spo_lora(sd1)
    assert torch.equal(images(sd1), base_image("sd1"))


def test_strengths_are_read_from_the_layers(sd1, tmp_path):
    load_style(sd1, tmp_path)
    assert spo_adapters(sd1) == {}
    load_spo_lora(sd1, random_adapter(sd1), strength=0.6)
    assert spo_adapters(sd1)["spo"].strength == 0.6
    sd1.set_adapters(["spo"], [0.25])
    assert spo_adapters(sd1)["spo"].strength == pytest.approx(0.25)
    sd1.set_adapters(["style"], [1.0])
    assert spo_adapters(sd1)["spo"].strength == 0.0
    sd1.unload_lora_weights()
    assert spo_adapters(sd1) == {}
    unload_spo_lora(sd1)
    with pytest.raises(AdapterError, match="no safety adapter is loaded"):
        set_spo_strength(sd1, 1.0)


def test_trainable_parameters_stay_so_and_the_adapter_is_frozen(sd1, tmp_path):
    load_style(sd1, tmp_path)
    for parameter in sd1.text_encoder.parameters():
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in sd1.unet.named_parameters()}
    assert set(flags.values()) == {True, False}
    load_spo_lora(sd1, random_adapter(sd1))
    set_spo_strength(sd1, 0.5)
    for name, parameter in sd1.unet.named_parameters():
        original = name if name in flags else name.replace(".base_layer", "")
        assert parameter.requires_grad == (flags[original] if ".spo." not in name else False), name


def test_a_copied_pipeline_keeps_its_adapter(sd1):
    load_spo_lora(sd1, random_adapter(sd1), strength=0.5)
    twin = copy.deepcopy(sd1)
    unload_spo_lora(sd1)
    assert spo_adapters(twin)["spo"].strength == 0.5
    unload_spo_lora(twin)
    assert torch.equal(images(twin), base_image("sd1"))

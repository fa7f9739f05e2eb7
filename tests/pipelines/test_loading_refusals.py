"""Adapters that loading refuses, and that nothing has happened to the pipeline then."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from support.adapter_state import assert_same_state, load_style, state_of, tuner_layers
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, write_adapter
from t2i_spo_plugin.errors import AdapterError, ConfigError, PipelineError
from t2i_spo_plugin.pipelines import loaded
from t2i_spo_plugin.pipelines.loading import (
    adapter_metadata,
    load_spo_lora,
    set_spo_strength,
    spo_adapters,
)


def renamed(adapter, old, new, only_first=False):
    names = list(adapter.modules)
    chosen = names[:1] if only_first else names
    modules = {n.replace(old, new) if n in chosen else n: pair for n, pair in adapter.modules.items()}
    return Adapter(modules, adapter.metadata)


def faulty(pipe, fault):
    good = random_adapter(pipe)
    name, pair = next(iter(good.modules.items()))
    metadata = good.metadata
    if fault == "nothing matches":
        return renamed(good, "to_", "into_"), "no module of the adapter fits"
    if fault == "partly matches":
        return renamed(good, "to_", "into_", only_first=True), "lacks 1 of its 24 modules"
    if fault == "other component":
        return renamed(good, "unet.", "transformer."), "no module of the adapter fits: .* lacks 24 of its 24 modules"
    if fault == "other architecture":
        return Adapter(
            good.modules, AdapterMetadata("flux-1-dev")
        ), "made for flux-1-dev, this pipeline is stable-diff"
    if fault == "other prediction":
        return Adapter(
            good.modules, AdapterMetadata(metadata.base_architecture, "v_prediction")
        ), "predicts v_prediction"
    if fault == "other shape":
        return random_adapter(fresh("sd1", width=64)), "another base of the architecture stable-diffusion-v1"
    if fault == "other depth":
        extra = {"base_fingerprint": "0" * 16}
        return Adapter(
            good.modules, AdapterMetadata(metadata.base_architecture, extra=extra)
        ), "another width or depth"
    if fault == "nan":
        return Adapter(good.modules | {name: LoraPair(pair.down * float("nan"), pair.up, 1)}), "NaN or Inf"
    if fault == "zero":
        zeros = {n: LoraPair(p.down, torch.zeros_like(p.up), 1) for n, p in good.modules.items()}
        return Adapter(zeros, metadata), "all weights are zero"
    return Adapter(good.modules | {name: LoraPair(pair.down, pair.up, -1.0)}), "alpha -1.0"


FAULTS = [
    "nothing matches",
    "partly matches",
    "other component",
    "other architecture",
    "other prediction",
    "other shape",
    "other depth",
    "nan",
    "zero",
    "alpha",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(fault, sd1, tmp_path):
    styled = load_style(sd1, tmp_path)
    before = state_of(sd1)
    bad, reason = faulty(sd1, fault)
    with pytest.raises(AdapterError, match=reason):
        load_spo_lora(sd1, bad)
    assert_same_state(before, state_of(sd1))
    assert torch.equal(images(sd1), styled)


@pytest.mark.parametrize("made_for", ["sdxl", "sd3", "flux"])
def test_a_file_of_another_family_is_refused(made_for, sd1, tmp_path):
    path = write_adapter(random_adapter(fresh(made_for)), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="was made for .* this pipeline is stable-diffusion-v1"):
        load_spo_lora(sd1, path)
    assert not tuner_layers(sd1)


def test_a_load_that_fails_halfway_is_undone(sd1, tmp_path, monkeypatch):
    styled = load_style(sd1, tmp_path)
    before = state_of(sd1)
    attach = loaded.attach

    def failing(pipe, component, *rest):
        attach(pipe, component, *rest)
        if component == "text_encoder":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded, "attach", failing)
    adapter = random_adapter(sd1, components=("text_encoder", "unet"))
    with pytest.raises(AdapterError, match="as it was: out of memory"):
        load_spo_lora(sd1, adapter)
    assert_same_state(before, state_of(sd1))
    assert torch.equal(images(sd1), styled)
    monkeypatch.undo()
    load_spo_lora(sd1, adapter)
    assert spo_adapters(sd1)["spo"].components == ("unet", "text_encoder")


def test_a_partial_match_loads_with_a_warning_when_allowed(sd1):
    partial = renamed(random_adapter(sd1), "to_", "into_", only_first=True)
    with pytest.warns(UserWarning, match="lacks 1 of its 24 modules"):
        record = load_spo_lora(sd1, partial, strict=False)
    assert record.modules == 23 and "lacks 1 of its 24 modules" in record.notes[0]
    for fault in ("nothing matches", "other shape", "other architecture"):
        with pytest.raises(AdapterError):
            load_spo_lora(sd1, faulty(fresh("sd1"), fault)[0], strict=False, adapter_name="x")


def test_another_checkpoint_of_the_same_architecture_is_noted(sd1):
    sd1.config._name_or_path = "somewhere/fine-tune"
    adapter = random_adapter(fresh("sd1"), base_model="original")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = load_spo_lora(sd1, adapter)
    assert record.notes == (
        "it was trained on original, this is fine-tune: the same architecture, another checkpoint",
    )
    assert adapter_metadata(sd1).extra["base_model"] == "fine-tune"


def test_a_foreign_lora_without_metadata_is_judged_by_its_modules(sd1):
    record = load_spo_lora(sd1, Adapter(random_adapter(sd1).modules))
    assert record.notes == ()


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "1", True, None])
def test_a_strength_out_of_range_is_refused(strength, sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(ConfigError, match="strength must be"):
        load_spo_lora(sd1, adapter, strength=strength)
    load_spo_lora(sd1, adapter)
    with pytest.raises(ConfigError, match="strength must be"):
        set_spo_strength(sd1, strength)
    assert spo_adapters(sd1)["spo"].strength == 1.0


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0, 1.1), (float("nan"), 1), (0.5,), None])
def test_loading_with_a_window_out_of_range_is_refused(window, sd1):
    with pytest.raises(ConfigError, match="window must"):
        load_spo_lora(sd1, random_adapter(sd1), window=window)


def test_a_window_needs_an_enabled_pipeline(sd1):
    with pytest.raises(PipelineError, match="enable_spo"):
        load_spo_lora(sd1, random_adapter(sd1), window=(0.0, 0.5))
    assert not tuner_layers(sd1)


def test_loading_checks_names_options_and_sources(sd1, tmp_path):
    adapter = random_adapter(sd1)
    for name in ("", "a.b", 3):
        with pytest.raises(ConfigError, match="adapter_name"):
            load_spo_lora(sd1, adapter, adapter_name=name)
    with pytest.raises(ConfigError, match="no option scale"):
        load_spo_lora(sd1, adapter, scale=0.5)
    with pytest.raises(AdapterError, match="got int"):
        load_spo_lora(sd1, 3)
    load_spo_lora(sd1, adapter)
    with pytest.raises(AdapterError, match="'spo' is already loaded in unet"):
        load_spo_lora(sd1, adapter)
    for missing in (tmp_path / "missing", str(tmp_path / "missing.safetensors"), "no/such/folder"):
        with pytest.raises(AdapterError, match="no file or folder"):
            load_spo_lora(sd1, missing, adapter_name="x")
    with pytest.raises(AdapterError, match="pickle"):
        load_spo_lora(sd1, "missing.bin", adapter_name="x")


def test_loading_names_fused_disabled_and_compiled_layers(sd1, tmp_path):
    load_style(sd1, tmp_path)
    adapter = random_adapter(sd1)
    sd1.fuse_lora()
    with pytest.raises(AdapterError, match="unfuse_lora"):
        load_spo_lora(sd1, adapter)
    sd1.unfuse_lora(components=["unet"])
    sd1.disable_lora()
    with pytest.raises(AdapterError, match="enable_lora"):
        load_spo_lora(sd1, adapter)
    sd1.enable_lora()
    load_spo_lora(sd1, adapter)
    sd1.disable_lora()
    with pytest.raises(AdapterError, match="enable_lora"):
        set_spo_strength(sd1, 0.5)
    other = fresh("sd1")
    other.unet = torch.compile(other.unet)
    with pytest.raises(AdapterError, match=r"pipe.unet.compile\(\)"):
        load_spo_lora(other, adapter)


def test_a_pipeline_without_lora_gets_a_type_error():
    unet = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    pipe = DDPMPipeline(unet, DDIMScheduler())
    with pytest.raises(TypeError, match="DDPMPipeline cannot load a LoRA"):
        load_spo_lora(pipe, "x/y")

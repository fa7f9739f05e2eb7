import copy
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from support.adapter_state import assert_same_state, state_of, tuner_layers
from support.pipelines import base_image, denoiser, fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, write_adapter
from t2i_spo_plugin.errors import AdapterError, ConfigError, IncompatibleAdapterError, PipelineError
from t2i_spo_plugin.pipelines import loaded
from t2i_spo_plugin.pipelines.architecture import (
    architecture_of,
    base_fingerprint,
    prediction_type_of,
)
from t2i_spo_plugin.pipelines.loading import (
    adapter_metadata,
    adapter_of,
    load_spo_lora,
    set_spo_strength,
    spo_adapters,
    unload_spo_lora,
)


def with_style(pipe, tmp_path, weight=0.7, name="style", seed=7):
    """Load a style LoRA the usual way."""
    path = write_adapter(random_adapter(pipe, seed=seed, layers=("to_k", "to_q")), tmp_path / f"{name}.safetensors")
    active = pipe.get_active_adapters()
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters([*active, name], [1.0] * len(active) + [weight])
    return images(pipe)


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


def test_upstream_draws_the_same_image_from_the_file(family, pipe, tmp_path):
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
    styled = with_style(pipe, tmp_path)
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
    with_style(sd1, tmp_path)
    styled = with_style(sd1, tmp_path, name="other", seed=8, weight=0.2)
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
    with_style(sd1, tmp_path)
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
    with_style(sd1, tmp_path)
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


def test_what_was_trainable_stays_so_and_the_adapter_is_frozen(sd1, tmp_path):
    with_style(sd1, tmp_path)
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


# What is refused, and that nothing has happened then


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
def test_what_does_not_fit_is_refused_and_changes_nothing(fault, sd1, tmp_path):
    styled = with_style(sd1, tmp_path)
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


def test_a_failure_in_the_middle_is_undone(sd1, tmp_path, monkeypatch):
    styled = with_style(sd1, tmp_path)
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


def test_a_foreign_lora_without_facts_is_judged_by_its_modules(sd1):
    record = load_spo_lora(sd1, Adapter(random_adapter(sd1).modules))
    assert record.notes == ()


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "1", True, None])
def test_a_strength_that_is_no_strength_is_refused(strength, sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(ConfigError, match="strength must be"):
        load_spo_lora(sd1, adapter, strength=strength)
    load_spo_lora(sd1, adapter)
    with pytest.raises(ConfigError, match="strength must be"):
        set_spo_strength(sd1, strength)
    assert spo_adapters(sd1)["spo"].strength == 1.0


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0, 1.1), (float("nan"), 1), (0.5,), None])
def test_a_window_that_is_no_window_is_refused(window, sd1):
    with pytest.raises(ConfigError, match="window must"):
        load_spo_lora(sd1, random_adapter(sd1), window=window)


def test_a_window_needs_an_enabled_pipeline(sd1):
    with pytest.raises(PipelineError, match="enable_spo"):
        load_spo_lora(sd1, random_adapter(sd1), window=(0.0, 0.5))
    assert not tuner_layers(sd1)


def test_names_options_and_sources_are_checked(sd1, tmp_path):
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


def test_fused_disabled_and_compiled_layers_are_named(sd1, tmp_path):
    with_style(sd1, tmp_path)
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


# Where adapters come from


def hub_cache(root, name="a.safetensors", subfolder=""):
    """A Hub cache as a download leaves it."""
    commit = "0" * 40
    repo = root / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = repo / "snapshots" / commit / subfolder
    folder.mkdir(parents=True)
    return folder / name


@pytest.mark.parametrize("options", [{}, {"weight_name": "a.safetensors"}, {"local_files_only": True}])
def test_a_hub_id_is_loaded_from_the_cache_without_network(options, sd1, tmp_path):
    write_adapter(random_adapter(sd1), hub_cache(tmp_path))
    record = load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, **options)
    assert record.source == "someone/adapter"
    assert not torch.equal(images(sd1), base_image("sd1"))


def test_a_subfolder_of_a_hub_repository(sd1, tmp_path):
    write_adapter(random_adapter(sd1), hub_cache(tmp_path, subfolder="experts"))
    record = load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, subfolder="experts")
    assert record.source == "someone/adapter"
    assert not torch.equal(images(sd1), base_image("sd1"))


def test_the_hub_out_of_reach_is_said_in_a_sentence(sd1, tmp_path):
    for options in ({}, {"weight_name": "a.safetensors"}):
        with pytest.raises(AdapterError, match="not in the local cache and the Hub cannot be reached"):
            load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, **options)
    with pytest.raises(AdapterError, match="pickle"):
        load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, weight_name="pytorch_lora_weights.bin")


def test_a_folder_and_a_file_in_it(sd1, tmp_path):
    write_adapter(random_adapter(sd1), tmp_path / "experts" / "a.safetensors")
    write_adapter(random_adapter(sd1), tmp_path / "experts" / "b.safetensors")
    load_spo_lora(sd1, str(tmp_path), subfolder="experts", weight_name="b.safetensors")
    assert spo_adapters(sd1)["spo"].source == "b.safetensors"
    with pytest.raises(AdapterError, match="2 safetensors files"):
        load_spo_lora(sd1, tmp_path / "experts", adapter_name="x")


# What a pipeline is


def test_architectures_and_prediction_types(family, pipe):
    names = {
        "sd1": ("stable-diffusion-v1", "epsilon"),
        "sdxl": ("stable-diffusion-xl-v1-base", "epsilon"),
        "sd3": ("stable-diffusion-3", "flow"),
        "flux": ("flux-1-dev", "flow"),
    }
    assert (architecture_of(pipe), prediction_type_of(pipe)) == names[family]
    metadata = adapter_metadata(pipe, "Title", seed="1")
    assert metadata.title == "Title" and metadata.extra == {"base_fingerprint": base_fingerprint(pipe), "seed": "1"}


def test_the_fingerprint_sees_shapes_and_nothing_else(sd1, tmp_path):
    print_of_sd1 = base_fingerprint(sd1)
    assert base_fingerprint(fresh("sd1", width=64)) != print_of_sd1
    torch.nn.init.normal_(denoiser(sd1).conv_in.weight)
    denoiser(sd1).conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
    assert base_fingerprint(sd1) == print_of_sd1
    load_spo_lora(sd1, random_adapter(sd1))
    assert base_fingerprint(sd1) == print_of_sd1
    assert prediction_type_of(fresh("sd1", prediction_type="v_prediction")) == "v_prediction"

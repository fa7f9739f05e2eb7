"""What diffusers' own LoRA calls leave of safety adapters: strengths, activity, the truth in `spo_adapters`."""

import itertools
import logging
import threading

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from support.pipelines import TWO_FAMILIES, base_image, denoiser, draw, fresh, images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.gating import Schedule
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from t2i_spo_plugin.pipelines.lora_layers import strengths_in_force, tuner_layers
from t2i_spo_plugin.pipelines.mixin import enable_spo


@pytest.fixture
def style(tmp_path):
    """A function that loads a style LoRA with upstream's own `load_lora_weights`."""

    def load(pipe, name="style", seed=7, layers=("to_k", "to_q"), **options):
        adapter = random_adapter(pipe, seed=seed, alpha=1.0, layers=layers)
        path = write_adapter(adapter, tmp_path / f"{name}{seed}.safetensors")
        pipe.load_lora_weights(path, adapter_name=name, **options)

    return load


def strengths(pipe):
    return {name: adapter.strength for name, adapter in spo_adapters(pipe).items()}


# Deleting


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_deleting_a_style_leaves_a_safety_adapter_at_0_off(family, pipe, style, enabled):
    if enabled:
        enable_spo(pipe)
    load_spo_lora(pipe, random_adapter(pipe, layers=("to_k", "to_q")), strength=0.0)
    style(pipe)
    pipe.delete_adapters("style")
    assert strengths(pipe) == {"spo": 0.0}
    assert torch.equal(images(pipe), base_image(family))
    set_spo_strength(pipe, 0.5)
    other = fresh(family)
    load_spo_lora(other, random_adapter(other, layers=("to_k", "to_q")), strength=0.5)
    assert torch.equal(images(pipe), images(other))


def test_deleting_an_adapter_leaves_every_other_as_it_is(sd1, style):
    enable_spo(sd1)
    style(sd1, "off")
    style(sd1, "style", seed=8)
    sd1.load_spo_lora(random_adapter(sd1, layers=("to_k",)), strength={"unet.mid_block": 0.0}, adapter_name="blocks")
    sd1.load_spo_lora(random_adapter(sd1, seed=2), strength=0.3, adapter_name="second")
    sd1.set_spo_strength(0.0, "second")
    before = images(sd1)
    records = sd1.spo_adapters()
    style(sd1, "other", seed=9)
    sd1.set_adapters(["style", "blocks", "other"], [1.0, 1.0, 1.0])
    sd1.set_spo_strength({"unet.mid_block": 0.0}, "blocks")
    sd1.delete_adapters(["other"])
    assert sd1.spo_adapters() == records
    assert torch.equal(images(sd1), before)
    sd1.delete_adapters("style")
    sd1.delete_adapters(["blocks"])
    assert torch.equal(images(sd1), base_image("sd1")), "neither `off` nor `second` has been switched on"


def test_a_fused_adapter_is_not_deleted_from_under_the_weights(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    style(sd1)
    sd1.fuse_lora()
    fused = images(sd1)
    for change in (lambda: sd1.delete_adapters("style"), lambda: sd1.set_adapters(["style", "spo"], [0.5, 0.5])):
        with pytest.raises(AdapterError, match=r"fused into the weights; call pipe.unfuse_lora\(\) first"):
            change()
    assert torch.equal(images(sd1), fused)
    sd1.unfuse_lora()
    sd1.delete_adapters(["style", "spo"])
    assert torch.allclose(images(sd1), base_image("sd1"), atol=1e-4)


# Fusing


def test_a_scale_of_fusing_is_gone_after_unfusing(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.8)
    style(sd1)
    before = images(sd1)
    sd1.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    sd1.unfuse_lora()
    assert strengths(sd1) == {"spo": 0.8}
    sd1.fuse_lora(lora_scale=0.5)
    assert strengths(sd1) == {"spo": pytest.approx(0.4)}
    sd1.unfuse_lora()
    assert strengths(sd1) == {"spo": 0.8}
    assert torch.allclose(images(sd1), before, atol=1e-4)


def test_adapters_fused_one_after_another_come_out_as_they_went_in(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    style(sd1)
    sd1.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    sd1.fuse_lora(adapter_names=["spo"], lora_scale=0.3)
    assert strengths(sd1) == {"spo": pytest.approx(0.3)}
    sd1.unfuse_lora()
    assert strengths(sd1) == {"spo": 1.0}
    sd1.unload_lora_weights()
    assert torch.allclose(images(sd1), base_image("sd1"), atol=1e-4)


@pytest.mark.parametrize("options", [{"window": (0.0, 0.5)}, {"steering": Schedule([(0.0, 1.0), (1.0, 0.0)])}])
def test_a_fused_adapter_with_a_window_or_a_schedule_is_refused_at_the_call(sd1, options):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), **options)
    sd1.fuse_lora()
    with pytest.raises(AdapterError, match="fused into the weights"):
        images(sd1)
    sd1.unfuse_lora()
    images(sd1)


# Fused q, k, v


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_fused_projections_are_refused_with_the_cure(family, pipe):
    model = denoiser(pipe)
    model.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"unfuse_qkv_projections\(\) first"):
        load_spo_lora(pipe, random_adapter(fresh(family)))
    model.unfuse_qkv_projections()
    load_spo_lora(pipe, random_adapter(fresh(family)), strength=0.5)
    other = fresh(family)
    load_spo_lora(other, random_adapter(other), strength=0.5)
    assert torch.equal(images(pipe), images(other))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_adapters_that_fused_projections_bypass_read_0_there(family, pipe):
    load_spo_lora(pipe, random_adapter(pipe), strength=0.5)
    model, drawn = denoiser(pipe), images(pipe)
    model.fuse_qkv_projections()
    seen = strengths_in_force(model, "spo")
    bypassed = {path for path, strength in seen.items() if strength == 0.0}
    called = set()
    for path, layer in tuner_layers(model):
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    fused = images(pipe)
    assert not torch.allclose(fused, drawn, atol=1e-4)
    assert bypassed and bypassed == set(seen) - called
    assert spo_adapters(pipe)["spo"].blocks, "a part is off"
    with pytest.raises(AdapterError, match=r"unfuse_qkv_projections\(\) first"):
        set_spo_strength(pipe, 1.0)
    model.unfuse_qkv_projections()
    assert strengths(pipe) == {"spo": 0.5} and torch.equal(images(pipe), drawn)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_an_enabled_pipeline_generates_nothing_while_projections_bypass_the_adapter(family, pipe, window):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), window=window)
    drawn, model = images(pipe), denoiser(pipe)
    model.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"unfuse_qkv_projections\(\) first"):
        images(pipe)
    model.unfuse_qkv_projections()
    assert torch.equal(images(pipe), drawn)
    pipe.unload_spo_lora()
    model.fuse_qkv_projections()
    assert torch.allclose(images(pipe), base_image(family), atol=1e-4)


# A call's own scale


@pytest.mark.parametrize("scale", [0, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.5, 1.0)])
def test_a_scale_of_one_call_is_gone_after_it(sd1, style, scale, window):
    enable_spo(sd1)
    adapter = random_adapter(sd1, components=("unet", "text_encoder"))
    sd1.load_spo_lora(adapter, strength=0.5, window=window)
    style(sd1)
    sd1.set_adapters(["style", "spo"], [0.7, 0.5])
    before, scales = images(sd1), scales_of(sd1)
    records = sd1.spo_adapters()
    scaled = images(sd1, cross_attention_kwargs={"scale": scale})
    assert not torch.equal(scaled, before)
    if scale == 0:
        assert torch.equal(scaled, base_image("sd1"))
    assert scales_of(sd1) == scales and sd1.spo_adapters() == records
    assert torch.equal(images(sd1), before)


def scales_of(pipe):
    return [
        (path, dict(layer.scaling)) for model in (pipe.unet, pipe.text_encoder) for path, layer in tuner_layers(model)
    ]


def test_a_scale_of_one_call_is_gone_in_transformers_and_after_errors():
    pipe = enable_spo(fresh("flux"))
    pipe.load_spo_lora(random_adapter(pipe), strength=0.5)
    images(pipe, joint_attention_kwargs={"scale": 0})
    assert strengths(pipe) == {"spo": 0.5}

    def failing(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, joint_attention_kwargs={"scale": 0}, callback_on_step_end=failing)
    assert strengths(pipe) == {"spo": 0.5}


def test_a_strength_set_during_a_scaled_call_stays(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.5)

    def weaker(pipe, step, timestep, tensors):
        pipe.set_spo_strength(0.2)
        return tensors

    images(sd1, cross_attention_kwargs={"scale": 0}, callback_on_step_end=weaker)
    assert strengths(sd1) == {"spo": 0.2}


# Loading


def test_a_style_is_not_put_in_the_place_of_a_safety_adapter(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    drawn = images(sd1)
    with pytest.raises(AdapterError, match="'spo' is a safety adapter"):
        style(sd1, "spo", hotswap=True)
    assert torch.equal(images(sd1), drawn)
    style(sd1, "style", layers=("to_q",))
    styled = images(sd1)
    style(sd1, "style", layers=("to_q",), seed=9, hotswap=True)
    assert not torch.equal(images(sd1), styled) and strengths(sd1) == {"spo": 1.0}


@pytest.fixture
def warned(caplog):
    """What diffusers and transformers log, which do not hand it on."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield lambda: " ".join(record.getMessage() for record in caplog.records)
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", ["b", "r", "weight", "lora_A", "style"])
@pytest.mark.parametrize("loading", ["load_spo_lora", "load_lora_weights"])
def test_a_second_adapter_raises_no_alarm_of_missing_weights(sd1, name, loading, warned):
    adapter = random_adapter(sd1, components=("unet", "text_encoder"), layers=("to_q", "q_proj"))
    enable_spo(sd1).load_spo_lora(adapter, adapter_name="first")
    if loading == "load_spo_lora":
        sd1.load_spo_lora(adapter, adapter_name=name)
    else:
        weights = {f"{path}.lora_A.weight": pair.down for path, pair in adapter.modules.items()}
        weights |= {f"{path}.lora_B.weight": pair.up for path, pair in adapter.modules.items()}
        sd1.load_lora_weights(weights, adapter_name=name)
    assert name in sd1.text_encoder.peft_config and name in sd1.unet.peft_config
    assert "missing" not in warned().lower()


@pytest.mark.parametrize(
    ("component", "cut", "whole", "width"),
    [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "to_v", 64),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj", "v_proj", 32),
    ],
)
def test_weights_that_are_missing_are_still_reported(sd1, component, cut, whole, width, warned):
    adapter = random_adapter(sd1, components=("unet", "text_encoder"))
    enable_spo(sd1).load_spo_lora(adapter, adapter_name="first")
    path = f"{cut.rpartition('.')[0]}.{whole}"
    weights = {f"{component}.{path}.lora_A.weight": torch.zeros(2, width)}
    weights |= {f"{component}.{module}.lora_B.weight": torch.zeros(width, 2) for module in (path, cut)}
    sd1.load_lora_weights(weights, adapter_name="b")
    text = warned()
    assert f"{cut}.lora_A.b.weight" in text and "missing" in text.lower()
    assert "first" not in text and "base_layer" not in text and whole not in text


def test_dora_styles_and_safety_adapters_leave_one_another_alone(sd1):
    enable_spo(sd1)
    sd1.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True), "dora")
    with torch.no_grad():
        for name, parameter in sd1.unet.named_parameters():
            if "lora_B.dora" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    styled = images(sd1)
    sd1.load_spo_lora(random_adapter(sd1), strength=0.0)
    assert torch.equal(images(sd1), styled)
    sd1.set_spo_strength(0.5)
    both = images(sd1)
    assert not torch.equal(both, styled)
    assert sd1.get_active_adapters() == ["dora", "spo"] and strengths(sd1) == {"spo": 0.5}
    sd1.delete_adapters("dora")
    alone = fresh("sd1")
    load_spo_lora(alone, random_adapter(alone), strength=0.5)
    assert torch.equal(images(sd1), images(alone))
    unload_spo_lora(sd1)
    assert torch.equal(images(sd1), base_image("sd1"))


def test_switching_all_loras_off_and_on_leaves_strengths(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.6)
    sd1.load_spo_lora(random_adapter(sd1, seed=2), strength=0.0, adapter_name="off")
    style(sd1)
    before = images(sd1)
    sd1.disable_lora()
    assert strengths(sd1) == {"spo": 0.0, "off": 0.0} and torch.equal(images(sd1), base_image("sd1"))
    sd1.enable_lora()
    assert strengths(sd1) == {"spo": 0.6, "off": 0.0} and torch.equal(images(sd1), before)


# Threads


def test_load_lora_weights_in_two_threads_leaves_torch_as_it_is(style, monkeypatch):
    """PEFT patches torch while it injects: the second thread starts inside the first one's injection."""
    one, other = enable_spo(fresh("sd1")), enable_spo(fresh("sd1"))
    register = torch.nn.Module.register_parameter
    load, order, inside = PeftAdapterMixin.load_lora_adapter, itertools.count(), []
    overlap = threading.Event()

    def watched(self, *args, **kwargs):
        inside.append(1)
        if len(inside) > 1:
            overlap.set()
        if next(order) == 0:
            second.start()
            overlap.wait(0.5)
        try:
            return load(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(PeftAdapterMixin, "load_lora_adapter", watched)
    second = threading.Thread(target=lambda: other.load_spo_lora(random_adapter(other)))
    style(one, low_cpu_mem_usage=True)
    second.join()
    assert not overlap.is_set()
    assert torch.nn.Module.register_parameter is register
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert type(one).__mro__[2] is StableDiffusionPipeline

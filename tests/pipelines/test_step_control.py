"""Strength schedules in pipelines, and what cannot change strengths between steps."""

import pytest
import torch
from support.guided_pipelines import build, call
from support.pipelines import TWO_FAMILIES, base_image, denoiser, draw, images, random_adapter

from t2i_spo_plugin import load_spo_lora
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError, PipelineError
from t2i_spo_plugin.gating import AdapterGate, Schedule
from t2i_spo_plugin.pipelines.mixin import enable_spo


NEVER = AdapterGate(1e9, until=0.3)


def test_a_schedule_multiplies_the_strength_step_by_step(sd1):
    enable_spo(sd1)
    adapter = random_adapter(sd1)
    sd1.load_spo_lora(adapter, strength=0.8, steering=Schedule([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]))
    seen = []
    handle = denoiser(sd1).register_forward_pre_hook(lambda *_: seen.append(sd1.spo_adapters()["spo"].strength))
    draw(sd1, num_inference_steps=4)
    handle.remove()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        # Of 5 steps at strength 0.5 this pipeline takes 2, which begin at 0.6, and the next one 3, from 0.4 on.
        ("sd1_img2img", {"strength": 0.5}, [0.6, 0.8]),
        ("sd3_img2img", {"strength": 0.5}, [0.4, 0.6, 0.8]),
        ("sd1_img2img", {"strength": 0.79}, [0.4, 0.6, 0.8]),
        # Of the timesteps 801, 601, 401, 201 and 1 those below 500.
        ("sdxl_img2img", {"denoising_start": 0.5}, [0.4, 0.6, 0.8]),
        ("sdxl_img2img", {"strength": 0.3}, [0.8]),
    ],
)
def test_the_first_step_of_an_image_is_where_the_pipeline_begins(kind, options, expected):
    pipe, given = build(kind)
    # The factor is the progress, so that the strengths are what the adapter takes each step to be.
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), steering=Schedule([(0.0, 0.0), (1.0, 1.0)]))
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: seen.append(pipe.spo_adapters()["spo"].strength))
    call(pipe, given | options, num_inference_steps=5)
    handle.remove()
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_schedule_works_on_every_family(family, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), steering=Schedule([(0.0, 1.0), (0.5, 0.0)]))
    scheduled = images(pipe)
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe), window=(0.0, 0.5))
    # Two steps: factors 1 and 0, which is what the window says.
    assert torch.equal(scheduled, images(pipe))


def test_strengths_by_block_are_in_force_again_after_a_windowed_call(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength={"unet.mid_block": 0.5}, window=(0.0, 0.5))
    draw(sd1, num_inference_steps=4)
    assert sd1.spo_adapters()["spo"].blocks == {"unet.mid_block": 0.5}


def test_strengths_by_block_set_by_others_are_in_force_again_after_a_windowed_call(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength={"unet.mid_block": 0.5}, window=(0.0, 0.5))
    sd1.set_adapters("spo", 0.3)
    draw(sd1, num_inference_steps=4)
    adapter = sd1.spo_adapters()["spo"]
    assert adapter.strength == pytest.approx(0.3) and adapter.blocks == {}


def test_an_adapter_gate_that_a_pipeline_cannot_apply_is_refused(sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(PipelineError, match="an adapter gate needs a pipeline that was given to enable_spo"):
        load_spo_lora(sd1, adapter, steering=NEVER)
    enable_spo(sd1)
    with pytest.raises(ConfigError, match="takes no window"):
        sd1.load_spo_lora(adapter, window=(0.0, 0.5), steering=NEVER)
    with pytest.raises(ConfigError, match="steering must be a Schedule or an AdapterGate, got str"):
        sd1.load_spo_lora(adapter, steering="closed")
    with_text = random_adapter(sd1, components=("unet", "text_encoder"))
    with pytest.raises(IncompatibleAdapterError, match="text_encoder, which runs before"):
        sd1.load_spo_lora(with_text, steering=NEVER)
    assert torch.equal(images(sd1), base_image("sd1"))

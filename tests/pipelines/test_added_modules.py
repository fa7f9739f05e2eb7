"""Safety adapters beside what is added to a finished base: IP-Adapters and AnimateDiff's motion layers."""

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel
from support.pipelines import base_image, fresh, images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.pipelines.architecture import architecture_of, base_fingerprint
from t2i_spo_plugin.pipelines.composition import compose
from t2i_spo_plugin.pipelines.loading import load_spo_lora
from t2i_spo_plugin.pipelines.mixin import enable_spo


IMAGE_WIDTH, TOKENS = 8, 4


def add_ip_adapter(unet):
    """A random IP-Adapter in `unet`, as its file holds one."""
    width = unet.config.cross_attention_dim
    attention = {}
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for key in ("to_k_ip", "to_v_ip"):
                attention[f"{number}.{key}.weight"] = torch.randn(module.to_k.out_features, width)
            number += 2
    projection = {
        "proj.weight": torch.randn(TOKENS * width, IMAGE_WIDTH),
        "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])


def draw_with_image(pipe):
    embeds = torch.randn(2, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(3))
    return images(pipe, ip_adapter_image_embeds=[embeds])


def test_an_ip_adapter_does_not_count_in_the_fingerprint(sd1):
    before = base_fingerprint(sd1)
    add_ip_adapter(sd1.unet)
    assert base_fingerprint(sd1) == before


@pytest.mark.parametrize("attach", [load_spo_lora, lambda pipe, path: compose(pipe, [path])], ids=["load", "compose"])
def test_an_adapter_loads_beside_an_ip_adapter(sd1, attach, tmp_path):
    path = write_adapter(random_adapter(fresh("sd1")), tmp_path / "a.safetensors")
    add_ip_adapter(sd1.unet)
    base = draw_with_image(sd1)
    attach(sd1, path)
    assert not torch.allclose(draw_with_image(sd1), base, atol=1e-3)
    sd1.unload_lora_weights()
    assert torch.allclose(draw_with_image(sd1), base, atol=1e-5)


def test_kolors_keeps_its_name_beside_an_ip_adapter(sd1):
    options = {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}
    sd1.unet = UNet2DConditionModel.from_config(sd1.unet.config, **options)
    assert architecture_of(sd1) == "kolors"
    add_ip_adapter(sd1.unet)
    assert architecture_of(sd1) == "kolors"


@pytest.fixture
def animated(sd1):
    """The tiny base as a pipeline of frames."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        motion = MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=4,
        )
        pipe = AnimateDiffPipeline(sd1.vae, sd1.text_encoder, sd1.tokenizer, sd1.unet, motion, sd1.scheduler)
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    return enable_spo(pipe)


def frames(pipe):
    options = {"num_inference_steps": 4, "num_frames": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe("a street", generator=torch.Generator().manual_seed(0), **options).frames


def test_an_adapter_of_the_image_model_works_on_its_animation(animated):
    adapter = random_adapter(fresh("sd1"))
    assert architecture_of(animated) == "stable-diffusion-v1"
    base = frames(animated)
    assert animated.load_spo_lora(adapter).modules == len(adapter.modules)
    on = frames(animated)
    assert not torch.allclose(on, base, atol=1e-3)
    animated.set_spo_strength(0)
    assert torch.equal(frames(animated), base)
    animated.unload_spo_lora()
    animated.load_spo_lora(adapter, window=(0.0, 0.5))
    windowed = frames(animated)
    assert not torch.allclose(windowed, base, atol=1e-3) and not torch.allclose(windowed, on, atol=1e-3)


def test_an_adapter_that_was_loaded_in_inference_mode_works_outside(sd1):
    expected = fresh("sd1")
    load_spo_lora(expected, random_adapter(expected))
    with torch.inference_mode():
        enable_spo(sd1).load_spo_lora(random_adapter(sd1), window=(0.0, 0.5))
        draft = images(sd1)
    assert not any(parameter.is_inference() for parameter in sd1.unet.parameters())
    assert torch.equal(images(sd1), draft)
    sd1.unload_spo_lora()
    assert torch.equal(images(sd1), base_image("sd1"))
    with torch.inference_mode():
        compose(sd1, [random_adapter(sd1)])
    assert torch.allclose(images(sd1), images(expected))
    # The weights take part in ordinary calls: gradients flow through them.
    sample, text = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 16, 32)
    sd1.unet(sample, 1, text).sample.sum().backward()
    assert sample.grad is not None

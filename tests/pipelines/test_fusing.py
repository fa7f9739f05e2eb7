"""Safety adapters fused into the weights by upstream's `fuse_lora`, and out again."""

import pytest
import torch
from support.pipelines import TWO_FAMILIES, base_image, fresh, images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_fused_adapter_draws_the_same_and_comes_back_unfused(family, pipe):
    load_spo_lora(pipe, random_adapter(pipe), strength=0.6)
    drawn = images(pipe)
    before = spo_adapters(pipe)["spo"]
    assert not before.fused
    pipe.fuse_lora()
    fused = spo_adapters(pipe)["spo"]
    assert fused.fused and fused.strength == 0.6
    assert torch.allclose(images(pipe), drawn, atol=1e-4)
    for change in (
        lambda: set_spo_strength(pipe, 0.5),
        lambda: unload_spo_lora(pipe),
        lambda: load_spo_lora(pipe, random_adapter(pipe, seed=3), hotswap=True),
        lambda: load_spo_lora(pipe, random_adapter(pipe, seed=3), adapter_name="other"),
    ):
        with pytest.raises(AdapterError, match=r"fused into the weights; call pipe.unfuse_lora\(\) first"):
            change()
    assert spo_adapters(pipe) == {"spo": fused}
    pipe.unfuse_lora()
    assert spo_adapters(pipe) == {"spo": before}
    assert torch.allclose(images(pipe), drawn, atol=1e-5)
    unload_spo_lora(pipe)
    assert torch.allclose(images(pipe), base_image(family), atol=1e-5)


def test_strengths_by_block_are_fused_as_they_are(sd1):
    load_spo_lora(sd1, random_adapter(sd1), strength={"unet.down_blocks": 0.0, "unet.up_blocks": 0.5})
    drawn = images(sd1)
    sd1.fuse_lora()
    record = spo_adapters(sd1)["spo"]
    assert record.fused and record.blocks == {"unet.down_blocks": 0.0, "unet.up_blocks": 0.5}
    assert torch.allclose(images(sd1), drawn, atol=1e-4)


def test_an_adapter_that_is_not_fused_while_another_is_has_no_effect_and_reads_0(sd1, tmp_path):
    load_spo_lora(sd1, random_adapter(sd1))
    path = write_adapter(random_adapter(sd1, seed=7), tmp_path / "style.safetensors")
    sd1.load_lora_weights(path, adapter_name="style")
    styled = images(sd1)
    set_spo_strength(sd1, 1.0)
    assert not torch.equal(images(sd1), styled)
    sd1.fuse_lora(adapter_names=["style"])
    assert torch.allclose(images(sd1), styled, atol=1e-4)
    record = spo_adapters(sd1)["spo"]
    assert record.strength == 0.0 and not record.fused
    sd1.unfuse_lora()
    assert spo_adapters(sd1)["spo"].strength == 1.0


def test_spo_adapters_reports_the_scale_of_fusing(sd1):
    load_spo_lora(sd1, random_adapter(sd1))
    halved = fresh("sd1")
    load_spo_lora(halved, random_adapter(sd1), strength=0.5)
    sd1.fuse_lora(lora_scale=0.5)
    assert spo_adapters(sd1)["spo"].strength == pytest.approx(0.5)
    assert torch.allclose(images(sd1), images(halved), atol=1e-4)

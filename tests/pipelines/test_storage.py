"""Adapters in pipelines that store their weights in other types and places, and under names that torch keeps."""

import pytest
import torch
from support.pipelines import base_image, fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, LoraPair
from t2i_spo_plugin.errors import AdapterError, IncompatibleAdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora


def to_disk(pipe, folder):
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder))


def scaled(adapter, down, up):
    modules = {name: LoraPair(pair.down * down, pair.up * up, pair.alpha) for name, pair in adapter.modules.items()}
    return Adapter(modules, adapter.metadata)


def test_loading_after_layerwise_casting_is_refused_and_before_it_works(sd1):
    adapter = random_adapter(sd1)
    cast = fresh("sd1")
    cast.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    base = images(cast)
    with pytest.raises(AdapterError, match=r"load them first, then call pipe\.unet\.enable_layerwise_casting"):
        load_spo_lora(cast, adapter)
    assert torch.equal(images(cast), base)
    load_spo_lora(sd1, adapter)
    sd1.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    drawn = images(sd1)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, base)
    set_spo_strength(sd1, 0.0)
    assert torch.equal(images(sd1), base)


def test_loading_after_offloading_to_the_disk_is_refused_and_before_it_works(sd1, tmp_path):
    adapter, other = random_adapter(sd1), fresh("sd1")
    load_spo_lora(other, adapter)
    offloaded = fresh("sd1")
    to_disk(offloaded, tmp_path / "a")
    with pytest.raises(AdapterError, match="load the adapter first, then enable_group_offload"):
        load_spo_lora(offloaded, adapter)
    assert torch.equal(images(offloaded), base_image("sd1"))
    load_spo_lora(sd1, adapter)
    to_disk(sd1, tmp_path / "b")
    assert torch.equal(images(sd1), images(other))
    with pytest.raises(AdapterError, match="set_spo_strength"):
        unload_spo_lora(sd1)
    with pytest.raises(AdapterError, match="offloaded to the disk"):
        load_spo_lora(sd1, adapter, hotswap=True)
    assert torch.equal(images(sd1), images(other))
    set_spo_strength(sd1, 0.0)
    assert torch.equal(images(sd1), base_image("sd1"))


@pytest.mark.parametrize("name", ["keys", "type", "pop", "forward", "training"])
def test_a_name_that_torch_keeps_for_itself_is_refused(name, sd1):
    with pytest.raises(AdapterError, match="pass another adapter_name"):
        load_spo_lora(sd1, random_adapter(sd1), adapter_name=name)
    assert spo_adapters(sd1) == {}


@pytest.mark.parametrize(
    ("down", "up", "dtype", "becomes"),
    [
        (1e6, 1e-6, torch.float16, "infinite"),
        (1e-12, 1e12, torch.float16, "zero"),
        (1e-12, 1.0, torch.float16, "zero"),
    ],
)
def test_weights_that_overflow_or_vanish_in_the_pipelines_type_are_refused(down, up, dtype, becomes, sd1):
    adapter = scaled(random_adapter(sd1), down, up)
    pipe = fresh("sd1").to(dtype=dtype)
    base = images(pipe)
    with pytest.raises(IncompatibleAdapterError, match=rf"{becomes} in float16.* bfloat16 or float32"):
        load_spo_lora(pipe, adapter)
    assert torch.equal(images(pipe), base)
    pipe = fresh("sd1").to(dtype=torch.bfloat16)
    load_spo_lora(pipe, adapter)
    assert torch.isfinite(images(pipe)).all()

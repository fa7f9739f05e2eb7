"""Adapters in pipelines that change their type, their place, or are offloaded; before and after loading."""

import functools

import pytest
import torch
from support.pipelines import TWO_FAMILIES, base_image, denoiser, fresh, images, random_adapter

from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from t2i_spo_plugin.pipelines.lora_layers import tuner_layers
from t2i_spo_plugin.pipelines.mixin import enable_spo


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe, offload_type="leaf_level", **options):
    pipe.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **options)


OFFLOADS = {
    "model": model_offload,
    "group by leaf": group_offload,
    "group by block": functools.partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
}


def onto_the_cpu(pipe):
    """Loading takes hooks off and puts them back, for which upstream wants an accelerator unless it is told one."""
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        setattr(pipe, name, functools.partial(getattr(pipe, name), device="cpu"))
    return pipe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", ["load, then move", "move, then load"])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_adapters_work_in_every_floating_point_type(family, pipe, dtype, order):
    moved = fresh(family).to(dtype=dtype)
    base = images(moved)
    enable_spo(pipe)
    if order == "move, then load":
        pipe.to(dtype=dtype)
    pipe.load_spo_lora(random_adapter(pipe), strength=0.5)
    if order == "load, then move":
        pipe.to(dtype=dtype)
    assert {p.dtype for p in denoiser(pipe).parameters()} == {dtype}
    drawn = images(pipe)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, base)
    pipe.set_spo_strength(0.0)
    assert torch.equal(images(pipe), base)
    pipe.load_spo_lora(random_adapter(pipe, seed=3, rank=2), hotswap=True)
    assert {p.dtype for p in denoiser(pipe).parameters()} == {dtype}
    pipe.unload_spo_lora()
    assert torch.equal(images(pipe), base)


def test_moving_a_pipeline_there_and_back_generates_the_same(family, pipe):
    load_spo_lora(pipe, random_adapter(pipe))
    drawn = images(pipe)
    assert torch.equal(images(pipe.to("cpu", torch.float64).to(torch.float32)), drawn)


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("order", ["load, then offload", "offload, then load"])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_an_adapter_works_with_model_offloading(family, pipe, kind, order):
    adapter = random_adapter(pipe, components=("unet", "transformer", "text_encoder"))
    other = fresh(family)
    load_spo_lora(other, adapter, strength=0.5)
    expected = images(other)
    enable_spo(onto_the_cpu(pipe))
    if order == "offload, then load":
        OFFLOADS[kind](pipe)
    pipe.load_spo_lora(adapter, strength=0.5)
    if order == "load, then offload":
        OFFLOADS[kind](pipe)
    assert torch.equal(images(pipe), expected)
    assert not any(p.requires_grad for _, layer in tuner_layers(denoiser(pipe)) for p in layer.lora_A.parameters())
    pipe.set_spo_strength(0.0)
    assert torch.equal(images(pipe), base_image(family))
    pipe.set_spo_strength(0.5)
    assert torch.equal(images(pipe), expected)
    pipe.unload_spo_lora()
    assert torch.equal(images(pipe), base_image(family))
    assert not tuner_layers(denoiser(pipe))


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_adapter_is_swapped_while_offloaded(kind, sd1):
    new = random_adapter(sd1, seed=3)
    other = fresh("sd1")
    load_spo_lora(other, new)
    OFFLOADS[kind](onto_the_cpu(sd1))
    load_spo_lora(sd1, random_adapter(sd1))
    drawn = images(sd1)
    load_spo_lora(sd1, new, hotswap=True)
    swapped = images(sd1)
    assert not torch.equal(swapped, drawn) and torch.allclose(swapped, images(other), atol=1e-5)


@pytest.mark.parametrize("order", ["load, then offload", "offload, then load"])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_an_adapter_works_with_sequential_offloading(family, pipe, order):
    """Weights are on the meta device. Upstream cannot draw so without an accelerator: hooks go before the drawing."""
    adapter = random_adapter(pipe, components=("unet", "transformer", "text_encoder"))
    other = fresh(family)
    load_spo_lora(other, adapter, strength=0.5)
    expected = images(other)
    onto_the_cpu(pipe)
    if order == "offload, then load":
        pipe.enable_sequential_cpu_offload()
    load_spo_lora(pipe, adapter, strength=0.5)
    if order == "load, then offload":
        pipe.enable_sequential_cpu_offload()
    assert all(p.is_meta for p in denoiser(pipe).parameters())
    with pytest.raises(AdapterError, match="has its weights offloaded; unload it and load the new one"):
        load_spo_lora(pipe, adapter, hotswap=True)
    assert spo_adapters(pipe)["spo"].strength == 0.5
    pipe.remove_all_hooks()
    assert torch.equal(images(pipe), expected)
    pipe.enable_sequential_cpu_offload()
    load_spo_lora(pipe, random_adapter(pipe, seed=3), adapter_name="other")
    unload_spo_lora(pipe, "spo")
    unload_spo_lora(pipe, "other")
    pipe.remove_all_hooks()
    assert torch.equal(images(pipe), base_image(family)) and not tuner_layers(denoiser(pipe))


@pytest.mark.parametrize("kind", OFFLOADS)
def test_two_adapters_work_while_offloaded(kind, sd1):
    OFFLOADS[kind](onto_the_cpu(sd1))
    load_spo_lora(sd1, random_adapter(sd1), adapter_name="first")
    first = images(sd1)
    load_spo_lora(sd1, random_adapter(sd1, seed=3), strength=0.3, adapter_name="second")
    assert not torch.equal(images(sd1), first)
    unload_spo_lora(sd1, "second")
    assert torch.equal(images(sd1), first) and list(spo_adapters(sd1)) == ["first"]
    set_spo_strength(sd1, 0.0)
    assert torch.equal(images(sd1), base_image("sd1"))

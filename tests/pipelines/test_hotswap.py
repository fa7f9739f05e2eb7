"""Adapters exchanged in place, and pipelines whose models are compiled in place."""

import pytest
import torch
from support.adapter_state import assert_same_state, state_of
from support.pipelines import TWO_FAMILIES, base_image, denoiser, fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, write_adapter
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.pipelines import loaded
from t2i_spo_plugin.pipelines.loading import adapter_of, load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from t2i_spo_plugin.pipelines.lora_layers import tuner_layers
from t2i_spo_plugin.pipelines.mixin import enable_spo


@pytest.fixture
def nothing_compiled():
    torch._dynamo.reset()


def drawn_with(family, adapter, **options):
    """What a pipeline that has loaded `adapter` the ordinary way draws."""
    pipe = fresh(family)
    load_spo_lora(pipe, adapter, **options)
    return images(pipe)


def mixed(pipe, components=("unet", "transformer")):
    """An adapter whose modules differ in rank and alpha."""
    parts = [
        random_adapter(pipe, rank=4, alpha=2.0, seed=5, layers=("to_q", "q_proj"), components=components),
        random_adapter(pipe, rank=3, alpha=5.0, seed=6, layers=("to_v",), components=components),
        random_adapter(pipe, rank=1, alpha=0.5, seed=7, layers=("to_out.0",), components=components),
    ]
    return Adapter({name: pair for part in parts for name, pair in part.modules.items()}, parts[0].metadata)


# In place


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_the_new_adapter_takes_the_place_of_the_old_one(family, pipe, tmp_path):
    new = mixed(pipe)
    load_spo_lora(pipe, random_adapter(pipe), strength=0.5)
    tensors = {id(p) for p in denoiser(pipe).parameters()}
    path = write_adapter(new, tmp_path / "new.safetensors")
    record = load_spo_lora(pipe, path, strength=0.7, hotswap=True)
    assert {id(p) for p in denoiser(pipe).parameters()} == tensors
    assert spo_adapters(pipe) == {"spo": record} and record.source == "new.safetensors" and record.strength == 0.7
    swapped = images(pipe)
    assert torch.allclose(swapped, drawn_with(family, new, strength=0.7), atol=1e-5)
    pipe.set_adapters(["spo"], [0.7])
    assert torch.allclose(images(pipe), swapped, atol=1e-6), "upstream computes the same scale"
    again = fresh(family)
    load_spo_lora(again, adapter_of(pipe, "spo"), strength=0.7, strict=False)
    assert torch.allclose(images(again), swapped, atol=1e-5)
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), base_image(family))


def test_swapping_there_and_back_is_the_same_bit_for_bit(sd1):
    old = random_adapter(sd1)
    load_spo_lora(sd1, old)
    drawn, before = images(sd1), state_of(sd1)
    load_spo_lora(sd1, random_adapter(sd1, rank=2, alpha=7.0, seed=3), hotswap=True)
    assert not torch.equal(images(sd1), drawn)
    load_spo_lora(sd1, old, hotswap=True)
    assert torch.equal(images(sd1), drawn)
    assert_same_state(before, state_of(sd1))


def test_modules_that_a_swapped_in_adapter_lacks_are_the_base_models(sd1):
    load_spo_lora(sd1, random_adapter(sd1))
    fewer = random_adapter(sd1, seed=3, layers=("to_v",))
    load_spo_lora(sd1, fewer, hotswap=True)
    assert torch.allclose(images(sd1), drawn_with("sd1", fewer), atol=1e-5)


def test_text_encoders_are_swapped_too(sd1):
    parts = ("unet", "text_encoder")
    load_spo_lora(sd1, random_adapter(sd1, components=parts))
    new = random_adapter(sd1, components=parts, seed=3, rank=2)
    load_spo_lora(sd1, new, hotswap=True)
    assert torch.allclose(images(sd1), drawn_with("sd1", new), atol=1e-5)


def test_other_adapters_are_left_alone_by_a_swap(sd1):
    load_spo_lora(sd1, random_adapter(sd1, seed=9), strength=0.4, adapter_name="other")
    only_other = images(sd1)
    load_spo_lora(sd1, random_adapter(sd1))
    load_spo_lora(sd1, random_adapter(sd1, seed=3), strength=0.0, hotswap=True)
    assert torch.equal(images(sd1), only_other)
    assert spo_adapters(sd1)["other"].strength == 0.4


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_enable_lora_hotswap_makes_room_for_larger_ranks(family, pipe):
    pipe.enable_lora_hotswap(target_rank=8)
    old, large = random_adapter(pipe, rank=2, alpha=3.0), random_adapter(pipe, rank=8, alpha=1.0, seed=3)
    load_spo_lora(pipe, old, strength=0.5)
    assert torch.allclose(images(pipe), drawn_with(family, old, strength=0.5), atol=1e-5)
    assert adapter_of(pipe, "spo").rank == 8
    load_spo_lora(pipe, large, strength=0.25, hotswap=True)
    assert torch.allclose(images(pipe), drawn_with(family, large, strength=0.25), atol=1e-5)
    set_spo_strength(pipe, 1.0)
    assert spo_adapters(pipe)["spo"].strength == 1.0
    assert all(isinstance(layer.scaling["spo"], torch.Tensor) for _, layer in tuner_layers(denoiser(pipe)))
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), base_image(family))


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ({"rank": 5}, "has room for rank 4, the new adapter has 5; .*enable_lora_hotswap.target_rank=5"),
        ({"layers": ("to_q", "to_k")}, "to_k is not changed by the adapter that is loaded; unload it"),
        ({"components": ("unet", "text_encoder")}, "it changes unet, the new adapter unet, text_encoder; unload it"),
        ({"alpha": -1.0}, "alpha -1.0"),
    ],
)
def test_an_adapter_that_cannot_be_swapped_in_is_refused_and_the_old_one_is_intact(new, reason, sd1):
    load_spo_lora(sd1, random_adapter(sd1), strength=0.6)
    drawn, before, record = images(sd1), state_of(sd1), spo_adapters(sd1)
    with pytest.raises(AdapterError, match=reason):
        load_spo_lora(sd1, random_adapter(sd1, **({"seed": 3} | new)), hotswap=True)
    assert_same_state(before, state_of(sd1))
    assert torch.equal(images(sd1), drawn) and spo_adapters(sd1) == record


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_swap_that_fails_halfway_brings_the_old_adapter_back(error, sd1, monkeypatch):
    parts = ("unet", "text_encoder")
    load_spo_lora(sd1, random_adapter(sd1, components=parts), strength={"unet.mid_block": 0.3})
    drawn, before, record = images(sd1), state_of(sd1), spo_adapters(sd1)
    exchange, calls = loaded.exchange, []

    def failing(*args):
        exchange(*args)
        calls.append(args)
        if len(calls) == 2:
            raise error("out of memory")

    monkeypatch.setattr(loaded, "exchange", failing)
    with pytest.raises(AdapterError if error is RuntimeError else error, match="out of memory"):
        load_spo_lora(sd1, random_adapter(sd1, components=parts, seed=3, alpha=9.0), hotswap=True)
    assert len(calls) == 4
    assert_same_state(before, state_of(sd1))
    assert torch.equal(images(sd1), drawn) and spo_adapters(sd1) == record


def test_a_swap_replaces_safety_adapters_alone(sd1, tmp_path):
    adapter = random_adapter(sd1)
    with pytest.raises(AdapterError, match="no safety adapter called 'spo' .* load it without hotswap"):
        load_spo_lora(sd1, adapter, hotswap=True)
    sd1.load_lora_weights(write_adapter(adapter, tmp_path / "style.safetensors"), adapter_name="style")
    with pytest.raises(AdapterError, match="no safety adapter called 'style'"):
        load_spo_lora(sd1, adapter, adapter_name="style", hotswap=True)
    load_spo_lora(sd1, adapter)
    with pytest.raises(AdapterError, match="already loaded in unet; .*hotswap=True"):
        load_spo_lora(sd1, adapter)


# Compiled in place


class Counting:
    """A backend for `torch.compile` that runs the graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_compiled_model_takes_adapters_strengths_and_lets_them_go(family, pipe):
    compiled = Counting()
    denoiser(pipe).compile(backend=compiled)
    enable_spo(pipe).load_spo_lora(random_adapter(pipe))
    assert torch.allclose(images(pipe), drawn_with(family, random_adapter(pipe)), atol=1e-5)
    assert compiled.graphs > 0
    pipe.set_spo_strength(0.5)
    assert torch.allclose(images(pipe), drawn_with(family, random_adapter(pipe), strength=0.5), atol=1e-5)
    pipe.set_spo_strength(0.0)
    assert torch.allclose(images(pipe), base_image(family), atol=1e-5)
    pipe.unload_spo_lora()
    assert torch.allclose(images(pipe), base_image(family), atol=1e-5)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("family", ["sd1", pytest.param("flux", marks=pytest.mark.slow)])
def test_compiled_blocks_take_adapters(family, pipe):
    denoiser(pipe).compile_repeated_blocks(backend="eager")
    adapter = random_adapter(pipe)
    enable_spo(pipe).load_spo_lora(adapter, strength=0.5)
    assert torch.allclose(images(pipe), drawn_with(family, adapter, strength=0.5), atol=1e-5)
    pipe.set_spo_strength(1.0)
    assert torch.allclose(images(pipe), drawn_with(family, adapter), atol=1e-5)
    pipe.unload_spo_lora()
    assert torch.allclose(images(pipe), base_image(family), atol=1e-5)


def test_a_wrapped_model_lets_go_of_what_was_loaded_before(sd1):
    load_spo_lora(sd1, random_adapter(sd1), adapter_name="first")
    load_spo_lora(sd1, random_adapter(sd1, seed=3), adapter_name="second")
    model = sd1.unet
    sd1.unet = torch.compile(model, backend="eager")
    with pytest.raises(AdapterError, match=r"wrapper made by torch.compile.*pipe.unet.compile\(\)"):
        load_spo_lora(sd1, random_adapter(sd1), adapter_name="third")
    set_spo_strength(sd1, {"unet.mid_block": 0.5}, "first")
    assert spo_adapters(sd1)["first"].blocks == {"unet.mid_block": 0.5}
    unload_spo_lora(sd1, "second")
    unload_spo_lora(sd1)
    sd1.unet = model
    assert not tuner_layers(model) and torch.equal(images(sd1), base_image("sd1"))


@pytest.mark.usefixtures("nothing_compiled")
def test_swapping_into_a_compiled_model_compiles_nothing_anew():
    pipe, compiled = fresh("flux"), Counting()
    pipe.enable_lora_hotswap(target_rank=4)
    load_spo_lora(pipe, random_adapter(pipe, rank=2))
    pipe.transformer.compile(backend=compiled)
    images(pipe)
    graphs = compiled.graphs
    assert graphs > 0
    new = random_adapter(pipe, rank=4, alpha=9.0, seed=3)
    load_spo_lora(pipe, new, strength=0.5, hotswap=True)
    assert torch.allclose(images(pipe), drawn_with("flux", new, strength=0.5), atol=1e-5)
    set_spo_strength(pipe, {"transformer.transformer_blocks": 0.1})
    images(pipe)
    assert compiled.graphs == graphs

"""Where an adapter's modules go in a ComfyUI model, with key maps in the form that ComfyUI makes them."""

from dataclasses import replace

import pytest
import torch
from support.pipelines import random_adapter

from t2i_spo_plugin.adapters import Adapter, LoraPair
from t2i_spo_plugin.adapters.comfyui import (
    ComfyBase,
    bypass_pairs,
    describe,
    fit_adapter,
    lora_tensors,
)
from t2i_spo_plugin.errors import IncompatibleAdapterError, InvalidAdapterError, UnsupportedAdapterError


def names(component, path):
    """One name of a module in a key map, for each component another of those that ComfyUI uses."""
    flat = path.replace(".", "_")
    forms = {"unet": f"lora_unet_{flat}", "transformer": f"transformer.{path}", "text_encoder_2": f"lora_te2_{flat}"}
    return forms.get(component, f"lora_te1_{flat}" if component == "text_encoder" else f"lora_te3_{flat}")


def base_for(adapter, **options):
    """A model that has exactly the modules of `adapter`."""
    keys = {names(*name.split(".", 1)): f"there.{name}.weight" for name in adapter.modules}
    shapes = {f"there.{name}.weight": pair.shape for name, pair in adapter.modules.items()}
    metadata = adapter.metadata
    return replace(ComfyBase(metadata.base_architecture, metadata.prediction_type, keys, shapes, True), **options)


def delta(pair):
    down, up = pair
    return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


LAYERS = ("to_q", "to_out.0", "conv1", "q_proj", "fc1", "SelfAttention.q")
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def test_every_module_of_every_family_finds_its_place(pipe):
    adapter = random_adapter(pipe, layers=LAYERS, components=("unet", "transformer", *TEXTS))
    fit = fit_adapter(adapter, base_for(adapter))
    assert fit.places == {name: f"there.{name}.weight" for name in adapter.modules} and not fit.missing
    tensors, places = lora_tensors(fit)
    assert places == fit.places and len(tensors) == 3 * len(places)
    for name, pair in adapter.modules.items():
        up, down, alpha = (tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        product = (up.flatten(1) @ down.flatten(1)).reshape(pair.shape) * (alpha.item() / down.shape[0])
        torch.testing.assert_close(product, pair.delta())
    text = describe(fit, 0.5)
    assert f"{len(places)} of {len(places)} modules applied, strength 0.5" in text
    assert adapter.metadata.base_architecture in text and "rank 4" in text


def test_a_bypass_adds_the_sum_of_the_patches(sd1):
    one, two = (random_adapter(sd1, rank=rank, layers=LAYERS, seed=rank) for rank in (2, 5))
    base = base_for(one)
    pairs = bypass_pairs([(fit_adapter(one, base), 0.5), (fit_adapter(two, base), 2.0)], base.shapes)
    assert len(pairs) == len(one.modules)
    for name in one.modules:
        expected = 0.5 * one.modules[name].delta() + 2.0 * two.modules[name].delta()
        torch.testing.assert_close(delta(pairs[f"there.{name}.weight"]), expected)


def parted(place, shape=(9, 3)):
    """An adapter of one module, and a model that has it as a part of a larger weight."""
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 1.0)
    base = ComfyBase("", "", {"transformer.block.to_k": place}, {"fused.weight": shape}, False)
    return pair, fit_adapter(Adapter({"transformer.block.to_k": pair}), base), base.shapes


def test_a_bypass_of_a_part_of_a_weight_leaves_its_other_rows_alone():
    pair, fit, shapes = parted(("fused.weight", (0, 4, 4)))
    change = delta(bypass_pairs([(fit, 1.0)], shapes)["fused.weight"])
    torch.testing.assert_close(change[4:8], pair.delta())
    assert not change[:4].any() and not change[8:].any()


def test_a_bypass_applies_the_function_of_a_place():
    pair, fit, shapes = parted(("fused.weight", None, lambda weight: weight.roll(2, 0)), shape=(4, 3))
    torch.testing.assert_close(delta(bypass_pairs([(fit, 1.0)], shapes)["fused.weight"]), pair.delta().roll(2, 0))


def test_a_range_of_columns_is_patched_and_not_bypassed():
    _, fit, shapes = parted(("fused.weight", (1, 2, 3)), shape=(4, 9))
    assert list(fit.places.values()) == [("fused.weight", (1, 2, 3))]
    with pytest.raises(UnsupportedAdapterError, match="range of its columns"):
        bypass_pairs([(fit, 1.0)], shapes)


def test_a_linear_layer_and_a_convolution_of_one_pixel_are_the_same(sd1):
    adapter = random_adapter(sd1, layers=("to_q",))
    base = base_for(adapter)
    base = replace(base, shapes={name: (*shape, 1, 1) for name, shape in base.shapes.items()})
    fit = fit_adapter(adapter, base)
    pairs = bypass_pairs([(fit, 1.0)], base.shapes)
    for name, pair in adapter.modules.items():
        torch.testing.assert_close(delta(pairs[f"there.{name}.weight"])[..., 0, 0], pair.delta())


def test_an_adapter_of_another_base_is_refused_even_when_not_strict(sd1):
    adapter = random_adapter(sd1)
    base = base_for(adapter)
    wider = {name: (shape[0] + 1, *shape[1:]) for name, shape in base.shapes.items()}
    for options, words in (
        ({"architecture": "stable-diffusion-3"}, "made for stable-diffusion-v1, this model is stable-diffusion-3"),
        ({"prediction_type": "flow"}, "predicts epsilon, this one predicts flow"),
        ({"shapes": wider}, "another base"),
        (
            {"keys": {}},
            f"no module of the adapter fits: this model lacks {len(adapter.modules)} of its",
        ),
        ({"shapes": {}}, "this model lacks"),
    ):
        for strict in (True, False):
            with pytest.raises(IncompatibleAdapterError, match=words):
                fit_adapter(adapter, replace(base, **options), strict)
    assert fit_adapter(adapter, replace(base, architecture="", prediction_type="")).places


def test_modules_without_a_place_are_refused_or_noted(sd1):
    adapter = replace(random_adapter(sd1, components=("unet", "text_encoder")), notes=("of reading",))
    base = base_for(adapter)
    unet = {name: key for name, key in base.keys.items() if name.startswith("lora_unet")}
    texts = len(base.keys) - len(unet)
    for has_clip, words in ((False, "no CLIP is connected"), (True, "this CLIP lacks")):
        with pytest.raises(IncompatibleAdapterError, match=words):
            fit_adapter(adapter, replace(base, keys=unet, has_clip=has_clip))
        fit = fit_adapter(adapter, replace(base, keys=unet, has_clip=has_clip), strict=False)
        assert len(fit.missing) == texts and len(fit.places) == len(unet)
        assert "note: of reading\nnote: " in describe(fit, 1.0)
        assert f"{texts} of its {len(base.keys)} modules" in describe(fit, 1.0)
    only_texts = {name: key for name, key in base.keys.items() if name not in unet}
    with pytest.raises(IncompatibleAdapterError, match="text encoders only, not the denoiser"):
        fit_adapter(adapter, replace(base, keys=only_texts))


def test_two_modules_in_one_place_are_refused(sd1):
    adapter = random_adapter(sd1)
    base = base_for(adapter)
    same = {name: next(iter(base.keys.values())) for name in base.keys}
    first = next(iter(adapter.modules.values()))
    twins = Adapter({name: first for name in list(adapter.modules)[:2]}, adapter.metadata)
    with pytest.raises(InvalidAdapterError, match="twice"):
        fit_adapter(twins, replace(base, keys=same))

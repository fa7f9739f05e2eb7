"""Safety adapters beside others, their strengths by block, copies, threads, and the pipelines made from a pipeline."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
)
from support.pipelines import SIZE, STEPS, TWO_FAMILIES, base_image, denoiser, fresh, images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.errors import AdapterError, ConfigError
from t2i_spo_plugin.pipelines.architecture import lora_components
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from t2i_spo_plugin.pipelines.lora_layers import strengths_in_force, tuner_layers
from t2i_spo_plugin.pipelines.mixin import enable_spo, spo_pipeline_class


BLOCK = {
    "sd1": "unet.down_blocks",
    "sdxl": "unet.up_blocks.0",
    "sd3": "transformer.transformer_blocks.1",
    "flux": "transformer.single_transformer_blocks",
}


@pytest.fixture
def style(tmp_path):
    """A function that loads a style LoRA with upstream's own `load_lora_weights`."""

    def load(pipe, name="style", seed=7):
        adapter = random_adapter(pipe, seed=seed, alpha=1.0, layers=("to_k", "to_q"))
        pipe.load_lora_weights(write_adapter(adapter, tmp_path / f"{name}.safetensors"), adapter_name=name)

    return load


def strengths(pipe):
    return {name: adapter.strength for name, adapter in spo_adapters(pipe).items()}


def untouched(pipe):
    return not any(tuner_layers(model) for model in lora_components(pipe).values())


# Beside others


def test_several_safety_adapters_and_styles_keep_their_strengths(family, pipe, style):
    enable_spo(pipe)
    style(pipe, "before")
    pipe.set_adapters(["before"], [0.5])
    pipe.load_spo_lora(random_adapter(pipe, seed=1), strength=0.6, adapter_name="first")
    pipe.load_spo_lora(random_adapter(pipe, seed=2), strength=0.3, adapter_name="second")
    three = images(pipe)
    style(pipe, "after", seed=8)
    assert strengths(pipe) == {"first": 0.6, "second": 0.3}
    assert pipe.get_active_adapters() == ["after", "first", "second"]
    pipe.load_spo_lora(random_adapter(pipe, seed=3), strength=0.0, adapter_name="third")
    name = next(iter(pipe.get_list_adapters()))
    assert pipe.get_list_adapters() == {name: ["before", "first", "second", "after", "third"]}
    pipe.delete_adapters("after")
    pipe.set_adapters(["before", "first", "second"], [0.5, 0.6, 0.3])
    assert torch.equal(images(pipe), three)
    for name in ("second", "third", "first"):
        pipe.unload_spo_lora(name)
    pipe.unload_lora_weights()
    assert untouched(pipe) and torch.equal(images(pipe), base_image(family))


def test_adapters_can_be_removed_in_any_order(sd1, style):
    for order in itertools.permutations(["style", "first", "second"]):
        enable_spo(sd1)
        sd1.load_spo_lora(random_adapter(sd1, seed=1), adapter_name="first")
        style(sd1)
        sd1.load_spo_lora(random_adapter(sd1, seed=2, layers=("to_v", "ff.net.2")), 0.5, adapter_name="second")
        for name in order:
            if name == "style":
                sd1.delete_adapters(name)
            else:
                sd1.unload_spo_lora(name)
            left = set(sd1.spo_adapters())
            assert left == {"first", "second"} - set(order[: order.index(name) + 1])
            assert all(strength in (1.0, 0.5) for strength in strengths(sd1).values())
        assert torch.equal(images(sd1), base_image("sd1")), order


def test_a_style_loaded_afterwards_leaves_the_safety_adapter_on(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.8)
    style(sd1)
    both = images(sd1)
    assert strengths(sd1) == {"spo": 0.8}
    sd1.set_adapters(["style"])
    assert strengths(sd1) == {"spo": 0.0}
    style(sd1, "other", seed=8)
    assert strengths(sd1) == {"spo": 0.0}, "what the user has switched off stays off"
    sd1.set_spo_strength(0.8)
    sd1.delete_adapters("other")
    sd1.set_adapters(["style", "spo"], [1.0, 0.8])
    assert torch.allclose(images(sd1), both, atol=1e-6)


def test_an_adapter_that_diffusers_switches_off_on_a_plain_pipeline_reads_0(sd1, style):
    load_spo_lora(sd1, random_adapter(sd1), strength=0.8)
    style(sd1)
    assert strengths(sd1) == {"spo": 0.0}
    set_spo_strength(sd1, 0.8)
    assert sd1.get_active_adapters() == ["style", "spo"]


def test_a_style_that_cannot_be_loaded_changes_nothing(sd1, style):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.8)
    style(sd1)
    both = images(sd1)
    with pytest.raises(ValueError, match="already in use"):
        style(sd1, seed=9)
    assert torch.equal(images(sd1), both)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_an_adapter_that_diffusers_removes_is_gone(family, pipe):
    adapter = random_adapter(pipe, components=("unet", "transformer", "text_encoder"))
    enable_spo(pipe).load_spo_lora(adapter)
    assert "text_encoder" in pipe.spo_adapters()["spo"].components
    pipe.delete_adapters("spo")
    assert pipe.spo_adapters() == {}
    pipe.load_spo_lora(adapter)
    pipe.unload_lora_weights()
    assert pipe.spo_adapters() == {} and torch.equal(images(pipe), base_image(family))


# By block


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_strengths_by_block_hold_in_their_blocks(family, pipe):
    block = BLOCK[family]
    load_spo_lora(pipe, random_adapter(pipe), strength={block: 0.25})
    record = spo_adapters(pipe)["spo"]
    assert (record.strength, record.blocks) == (1.0, {block: 0.25})
    name, path = block.split(".", 1)
    seen = strengths_in_force(denoiser(pipe), "spo")
    for module, strength in seen.items():
        assert strength == pytest.approx(0.25 if module.startswith(f"{path}.") else 1.0), module
    by_block = images(pipe)
    set_spo_strength(pipe, {name: 1.0, block: 0.25})
    assert torch.equal(images(pipe), by_block)
    set_spo_strength(pipe, 1.0)
    assert spo_adapters(pipe)["spo"].blocks == {}
    whole = images(pipe)
    assert not torch.equal(whole, by_block)
    unload_spo_lora(pipe)
    load_spo_lora(pipe, random_adapter(pipe))
    assert torch.equal(images(pipe), whole)


def test_a_block_at_0_is_the_base_there(family, pipe):
    adapter = random_adapter(pipe)
    component = next(iter(lora_components(pipe)))
    load_spo_lora(pipe, adapter, strength={component: 0.0})
    assert torch.equal(images(pipe), base_image(family))
    set_spo_strength(pipe, {component: 0.0, BLOCK[family]: 1.0})
    only = images(pipe)
    inside = {name: pair for name, pair in adapter.modules.items() if name.startswith(f"{BLOCK[family]}.")}
    other = fresh(family)
    load_spo_lora(other, type(adapter)(inside, adapter.metadata))
    assert torch.allclose(images(other), only, atol=1e-6)
    assert not torch.equal(only, base_image(family))


def test_text_encoder_and_denoiser_have_strengths_of_their_own(sd1):
    adapter = random_adapter(sd1, components=("unet", "text_encoder"))
    load_spo_lora(sd1, adapter, strength={"unet": 0.5, "text_encoder": 0.0})
    halved = images(sd1)
    unload_spo_lora(sd1)
    load_spo_lora(sd1, random_adapter(sd1), strength=0.5)
    unet_only = {name: pair for name, pair in adapter.modules.items() if name.startswith("unet.")}
    other = fresh("sd1")
    load_spo_lora(other, type(adapter)(unet_only, adapter.metadata), strength=0.5)
    assert torch.equal(images(other), halved)


def test_strengths_by_block_hold_beside_a_style_and_in_a_window(sd1, style):
    enable_spo(sd1)
    style(sd1)
    styled = images(sd1)
    sd1.load_spo_lora(random_adapter(sd1), strength={"unet.down_blocks": 0.0}, window=(0.0, 0.5))
    windowed = images(sd1)
    assert not torch.equal(windowed, styled)
    assert sd1.spo_adapters()["spo"].blocks == {"unet.down_blocks": 0.0}
    assert torch.equal(images(sd1), windowed)
    sd1.set_spo_strength(0.0)
    assert torch.equal(images(sd1), styled)
    sd1.unload_spo_lora()
    assert torch.equal(images(sd1), styled)


def test_strengths_by_block_set_through_diffusers_are_reported(sd1):
    load_spo_lora(sd1, random_adapter(sd1))
    sd1.set_adapters(["spo"], [{"unet": {"down": 0.5, "mid": 0.25, "up": 0.5}}])
    record = spo_adapters(sd1)["spo"]
    assert record.blocks == pytest.approx({"unet.down_blocks": 0.5, "unet.mid_block": 0.25, "unet.up_blocks": 0.5})


@pytest.mark.parametrize(
    ("strength", "reason"),
    [
        ({"unet.down_blocks": -0.1}, "at least 0"),
        ({"unet": float("nan")}, "finite"),
        (
            {"down": 0.5},
            "no block called 'down'; it changes unet, unet.down_blocks, unet.down_blocks.1, unet.mid_block",
        ),
        ({"unet.down_block": 0.5}, "no block called 'unet.down_block'"),
        ({"text_encoder": 0.5}, "no block called 'text_encoder'"),
        ({3: 0.5}, "needs names"),
        ([0.5], "finite number"),
    ],
)
def test_names_of_blocks_that_do_not_exist_are_refused(strength, reason, sd1):
    with pytest.raises(ConfigError, match=reason):
        load_spo_lora(sd1, random_adapter(sd1), strength=strength)
    assert untouched(sd1)
    load_spo_lora(sd1, random_adapter(sd1), strength=0.5)
    drawn = images(sd1)
    with pytest.raises(ConfigError, match=reason):
        set_spo_strength(sd1, strength)
    assert strengths(sd1) == {"spo": 0.5} and torch.equal(images(sd1), drawn)


# Pipelines made from it


@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_image_to_image_and_inpainting_share_the_adapter(family, auto, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), window=(0.5, 1.0))
    if family == "sd3" and auto is AutoPipelineForInpainting:
        pytest.skip("upstream takes only transformers of 16 or 33 channels here")
    other = auto.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert spo_adapters(other).keys() == {"spo"} and not hasattr(other, "load_spo_lora")
    enable_spo(other)
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    options = {"image": image, "strength": 1.0, "num_inference_steps": 2 * STEPS, "height": SIZE, "width": SIZE}
    if auto is AutoPipelineForInpainting:
        options["mask_image"] = torch.ones(1, 1, SIZE, SIZE)
    windowed = images(other, **options)
    other.set_spo_strength(0.0)
    assert spo_adapters(pipe)["spo"].strength == 0.0, "the models are shared, and so is the adapter"
    base = images(other, **options)
    other.unload_spo_lora()
    other.load_spo_lora(random_adapter(other))
    whole = images(other, **options)
    assert not torch.equal(windowed, base) and not torch.equal(windowed, whole)
    other.unload_spo_lora()
    assert pipe.spo_adapters() == {} and torch.equal(images(pipe), base_image(family))


def test_a_pipeline_made_through_an_enabled_class_is_enabled(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    other = spo_pipeline_class(StableDiffusionImg2ImgPipeline).from_pipe(sd1)
    assert other.spo_adapters().keys() == {"spo"}


# Copies and threads


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_copied_pipeline_has_an_adapter_of_its_own(family, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), strength={BLOCK[family]: 0.5})
    pickled = pickle.dumps(
        pipe
    )  # before it draws: transformers then hangs hooks on text encoders that no pickle holds
    drawn = images(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickled)):
        assert other.spo_adapters()["spo"].blocks == {BLOCK[family]: 0.5}
        assert torch.equal(images(other), drawn)
        other.set_spo_strength(0.0)
        other.load_spo_lora(random_adapter(other, seed=3), adapter_name="other")
        other.unload_spo_lora("spo")
        assert torch.equal(images(pipe), drawn) and pipe.spo_adapters().keys() == {"spo"}


def run(*works):
    """Each of `works` in a thread of its own, all at once; their errors."""
    errors = []
    barrier = threading.Barrier(len(works))

    def guarded(work):
        try:
            barrier.wait()
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_pipelines_with_models_of_their_own_work_in_threads():
    pipes = [enable_spo(fresh("sd1")) for _ in range(3)]
    adapter = random_adapter(pipes[0])
    alone = enable_spo(fresh("sd1"))
    alone.load_spo_lora(adapter)
    drawn = images(alone)
    register = torch.nn.Module.register_parameter
    results = {}

    def loading(pipe):
        for _ in range(2):
            pipe.load_spo_lora(adapter)
            results[id(pipe)] = images(pipe)
            pipe.unload_spo_lora()
            assert torch.equal(images(pipe), base_image("sd1"))

    def drawing():
        for _ in range(4):
            assert torch.equal(images(alone), drawn)

    base_image("sd1")
    assert run(drawing, *(lambda pipe=pipe: loading(pipe) for pipe in pipes)) == []
    assert all(torch.equal(result, drawn) for result in results.values()) and len(results) == 3
    assert torch.nn.Module.register_parameter is register


# Saving


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_pipeline_is_saved_with_the_adapter_in_its_weights(family, pipe, tmp_path):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe))
    drawn = images(pipe)
    with pytest.raises(AdapterError, match="fuse_lora, then unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "folder")
    pipe.fuse_lora()
    with pytest.raises(AdapterError, match="attached"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "folder")
    again = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(images(again), drawn, atol=1e-3)
    assert (drawn - base_image(family)).abs().max() > 0.01
    assert type(again) is type(fresh(family))

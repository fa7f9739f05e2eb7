"""The adapter nodes against ComfyUI itself: same images as diffusers, nothing mutated, no silent loss."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import miniature
import pytest
import torch
from running import node
from sticker_runs import BENIGN, HARMFUL, SPO, STEPS, encode, sample, spo_stack, start_noise, text_to_image
from support.pipelines import random_adapter, tiny_pipeline

import t2i_spo_plugin.sticker as sticker
from t2i_spo_plugin import (
    AdapterError,
    ConfigError,
    SPOError,
    convert_adapter,
    load_spo_lora,
    read_adapter,
    unload_spo_lora,
    write_adapter,
)
from t2i_spo_plugin.adapters import Adapter
from t2i_spo_plugin.adapters.comfyui import bypass_pairs
from t2i_spo_plugin.comfy_nodes.adapters import AdapterStack, LoadAdapter, MergeAdapters
from t2i_spo_plugin.comfy_nodes.gate import NORM
from t2i_spo_plugin.comfy_nodes.patching import patched, weight_shapes


pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("without_gradients")]

ALL_LAYERS = (
    "to_q",
    "to_k",
    "to_out.0",
    "proj_in",
    "proj",
    "net.2",
    "conv1",
    "conv2",
    "conv",
    "conv_shortcut",
    "conv_in",
)
MORE_LAYERS = (*ALL_LAYERS, "time_emb_proj", "linear_1", "q_proj", "v_proj", "fc1", "fc2", "out_proj")


def images(model, clip, vae, prompts, **options):
    return vae.decode(sample(model, clip, prompts, **options)[0])


def diffusers_images(pipe, prompts):
    output = pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=sticker.GUIDANCE,
        latents=start_noise(len(prompts)),
        output_type="np",
    )
    return torch.from_numpy(output.images)


def weights_of(patcher):
    return {name: weight.clone() for name, weight in patcher.model.state_dict().items()}


def loaded(model, clip=None, adapter=SPO, strength=1.0, strict=True):
    return LoadAdapter.execute(model, adapter, strength, clip, strict).result


# --- the sticker world: every part against diffusers, in float32


def test_the_demo_text_encoder_gives_what_diffusers_gives(world, pipe):
    for prompt in (HARMFUL, BENIGN, "", "a cup, a knife and a dog on a table"):
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        torch.testing.assert_close(encode(world[1], [prompt]), pipe.text_encoder(tokens)[0], atol=2e-5, rtol=0)


def test_the_demo_autoencoder_gives_what_diffusers_gives(world, pipe):
    image = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latents = pipe.vae.encode(image.movedim(-1, 1) * 2 - 1).latents
    torch.testing.assert_close(world[2].encode(image), latents, atol=2e-5, rtol=0)
    decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(world[2].decode(latents), decoded, atol=2e-5, rtol=0)


def test_the_demo_noise_schedule_is_that_of_diffusers(world, pipe):
    alphas = pipe.scheduler.alphas_cumprod.double()
    sigmas = world[0].get_model_object("model_sampling").sigmas.double()
    torch.testing.assert_close(1 / (sigmas.square() + 1), alphas, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_demo_images_are_those_of_diffusers_without_and_with_the_adapter(world, pipe, strength):
    """What differs: ComfyUI's first sigma is 4518 instead of infinite, so that 2e-4 of a signal remains there."""
    model, clip, vae = world
    prompts = [HARMFUL, BENIGN]
    base = diffusers_images(pipe, prompts)
    load_spo_lora(pipe, sticker.adapter_path("spo"), strength=strength)
    try:
        expected = diffusers_images(pipe, prompts)
    finally:
        unload_spo_lora(pipe)
    drawn = images(loaded(model, clip, strength=strength)[0], clip, vae, prompts)
    difference = (drawn - expected).abs()
    assert difference.max() < 0.03 and difference.mean() < 3e-4, (difference.max(), difference.mean())
    assert bool((expected - base).abs().max() > 0.2) == (strength > 0)


# --- loading


def test_the_bundled_adapter_is_applied_completely(world):
    model, clip, _ = world
    patched_model, same_clip, stack, info = loaded(model, clip)
    assert len(patched_model.patches) == len(stack[0][0].modules) == 48
    assert "48 of 48 modules applied" in info and "rank 32" in info and "stable-diffusion-v1" in info
    assert "objective: spo" in info
    assert same_clip is clip and patched_model is not model and not model.patches


def test_strength_zero_gives_back_the_model_itself(world):
    model, clip, _ = world
    assert loaded(model, clip, strength=0.0)[:2] == (model, clip)


def test_unpatching_restores_the_weights_bit_for_bit(world):
    model, clip, _ = world
    comfy.model_management.unload_all_models()
    before = weights_of(model)
    sample(loaded(model, clip, strength=1.5)[0], clip, [HARMFUL])
    changed = [name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])]
    comfy.model_management.unload_all_models()
    assert len(changed) == 48
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "native"])
def test_every_layout_of_a_file_gives_the_same_patches(world, loras, layout):
    adapter = read_adapter(sticker.adapter_path("spo"))
    convert_adapter(adapter, loras / ("some" if layout == "peft" else "some.safetensors"), layout)
    name = "some/adapter_model.safetensors" if layout == "peft" else "some.safetensors"
    assert name in [option for option in LoadAdapter.define_schema().inputs[1].options]
    converted, expected = loaded(world[0], adapter=name)[0], loaded(world[0])[0]
    for key in expected.patches:
        there, here = (patch_delta(one, key) for one in (converted, expected))
        torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-3)


def patch_delta(model, key):
    """The change of one weight, as ComfyUI computes it."""
    weight = comfy.utils.get_attr(model.model, key)
    return comfy.lora.calculate_weight(model.patches[key], torch.zeros_like(weight), key)


def test_convolutions_and_the_text_encoder_come_along_with_their_alphas(world, pipe, loras):
    adapter = random_adapter(pipe, rank=3, alpha=0.2, components=("unet", "text_encoder"), layers=MORE_LAYERS)
    assert any(pair.down.ndim == 4 and pair.down.shape[-1] == 3 for pair in adapter.modules.values())
    write_adapter(adapter, loras / "all.safetensors")
    model, clip, vae = world
    on_model, on_clip, _, info = loaded(model, clip, "all.safetensors", 0.7)
    assert f"{len(adapter.modules)} of {len(adapter.modules)} modules applied" in info
    load_spo_lora(pipe, adapter, strength=0.7)
    try:
        tokens = pipe.tokenizer(BENIGN, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(tokens)[0]
        expected = pipe.unet(start_noise(), 500, states).sample
    finally:
        unload_spo_lora(pipe)
    assert (encode(on_clip, [BENIGN]) - encode(clip, [BENIGN])).abs().max() > 0.01
    torch.testing.assert_close(encode(on_clip, [BENIGN]), states, atol=1e-3, rtol=1e-3)
    on_model.patch_model()
    try:
        found = on_model.model.diffusion_model(start_noise(), torch.tensor([500.0]), context=states)
    finally:
        on_model.unpatch_model()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


# --- what does not fit ends in a sentence


def test_an_adapter_for_a_text_encoder_asks_for_a_clip(world, pipe, loras):
    adapter = random_adapter(pipe, components=("unet", "text_encoder"))
    write_adapter(adapter, loras / "both.safetensors")
    with pytest.raises(AdapterError, match="no CLIP is connected"):
        loaded(world[0], None, "both.safetensors")
    on_model, _, _, info = loaded(world[0], None, "both.safetensors", strict=False)
    assert on_model.patches and "note: " in info and "no CLIP is connected" in info


def test_an_adapter_for_another_base_is_refused(world, loras):
    for family, words in (
        ("sd1", "made for another base"),
        ("sdxl", "made for stable-diffusion-xl"),
        ("flux", "flux"),
    ):
        write_adapter(
            random_adapter(tiny_pipeline(family, prediction_type="v_prediction")), loras / f"{family}.safetensors"
        )
        with pytest.raises(AdapterError, match=words):
            loaded(world[0], adapter=f"{family}.safetensors")
    write_adapter(random_adapter(tiny_pipeline("sd1")), loras / "eps.safetensors")
    with pytest.raises(AdapterError, match="predicts epsilon, this one predicts v_prediction"):
        loaded(world[0], adapter="eps.safetensors")


def test_what_only_part_of_fits_is_refused_unless_told(world, loras):
    whole = read_adapter(sticker.adapter_path("spo"))
    name = next(iter(whole.modules))
    odd = {**whole.modules, name.replace("down_blocks.1", "down_blocks.7"): whole.modules[name]}
    write_adapter(Adapter(odd, whole.metadata), loras / "odd.safetensors")
    with pytest.raises(AdapterError, match="this model lacks 1 of its 49 modules.*down_blocks.7"):
        loaded(world[0], adapter="odd.safetensors")
    on_model, _, _, info = loaded(world[0], adapter="odd.safetensors", strict=False)
    assert len(on_model.patches) == 48 and "48 of 49 modules applied" in info
    nowhere = {key.replace("blocks.", "blocks.9"): pair for key, pair in whole.modules.items() if "down" in key}
    write_adapter(Adapter(nowhere, whole.metadata), loras / "nowhere.safetensors")
    with pytest.raises(AdapterError, match="this model lacks 8 of its 8 modules"):
        loaded(world[0], adapter="nowhere.safetensors", strict=False)


def test_files_that_are_no_adapters_are_refused(world, loras):
    (loras / "broken.safetensors").write_bytes(sticker.adapter_path("spo").read_bytes()[:1000])
    (loras / "pickle.pt").write_bytes(b"\x80\x04")
    assert "pickle.pt" not in LoadAdapter.define_schema().inputs[1].options
    for name, words in (
        ("broken.safetensors", "header"),
        ("pickle.pt", "never opened"),
        ("gone.safetensors", "no adapter 'gone"),
    ):
        with pytest.raises(AdapterError, match=words):
            loaded(world[0], adapter=name)
    with pytest.raises(ConfigError, match="would undo safety"):
        loaded(world[0], strength=-0.5)


def test_an_empty_loras_folder_leaves_the_bundled_adapters_to_choose_from(loras):
    assert LoadAdapter.define_schema().inputs[1].options == [
        SPO,
        "sticker demo: dpo (bundled)",
        "sticker demo: style (bundled)",
    ]


# --- several


def stack_of(model, *chosen, clip=None):
    slots = {f"adapter_{number}": "none" for number in range(1, 5)} | {
        f"strength_{number}": 1.0 for number in range(1, 5)
    }
    for number, (name, strength) in enumerate(chosen, 1):
        slots |= {f"adapter_{number}": name, f"strength_{number}": strength}
    return AdapterStack.execute(model, clip, **slots).result


def test_a_stack_adds_up_and_its_merge_is_the_same_in_one_file(world, monkeypatch, tmp_path):
    model = world[0]
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    on_model, _, stack, info = stack_of(model, (SPO, 0.5), ("sticker demo: dpo (bundled)", 0.25))
    assert [strength for _, strength in stack] == [0.5, 0.25] and info.count("48 of 48") == 2
    single, _, _, _ = loaded(model, strength=0.5)
    key = next(iter(single.patches))
    twice = stack_of(model, (SPO, 0.25), (SPO, 0.25))[0]
    torch.testing.assert_close(patch_delta(twice, key), patch_delta(single, key))
    (merged, told), second = MergeAdapters.execute(stack, "concat", 16, "spo/merged").result, None
    path = Path(told.splitlines()[-1])
    assert path == tmp_path / "output" / "spo" / "merged_00001.safetensors" and path.is_file()
    from_file = patched(model, None, [(read_adapter(path), 1.0)], True)[0]
    for name in on_model.patches:
        torch.testing.assert_close(patch_delta(from_file, name), patch_delta(on_model, name), atol=1e-6, rtol=1e-4)
    cut, second = MergeAdapters.execute(stack, "svd", 8, "spo/merged", other=merged).result
    assert cut[0][0].rank == 8 and "merged_00002" in second and "relative error 0." in second


@pytest.mark.parametrize("prefix", ["../out", "/etc/out", "a/../../out", "", "spo/", "."])
def test_a_merge_stays_in_the_output_folder(world, monkeypatch, tmp_path, prefix):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    stack = spo_stack()
    with pytest.raises(SPOError, match="below ComfyUI's output folder"):
        MergeAdapters.execute(stack, "concat", 16, prefix)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        MergeAdapters.execute([], "concat", 16, "spo/merged")


# --- SD3 and Flux: ComfyUI fuses what diffusers keeps apart


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_get_every_module_and_steering_changes_what_patching_does(family):
    source = miniature.pipeline(family)
    model = miniature.load_transformer(family)
    layers = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "proj_mlp", "net.2", "norm_out.linear")
    adapter = random_adapter(source, layers=layers)
    on_model, _, (fit,) = patched(model, None, [(adapter, 1.0)], True)
    assert not fit.missing and len(fit.places) == len(adapter.modules)
    pairs = bypass_pairs([(fit, 1.0)], weight_shapes(model.model))
    assert set(pairs) == set(on_model.patches)
    for weight, (down, up) in pairs.items():
        torch.testing.assert_close(up @ down, patch_delta(on_model, weight), atol=1e-4, rtol=1e-3)


# --- as ComfyUI runs it


def test_the_demo_runs_in_a_workflow_without_and_with_its_adapter(run_graph):
    shown = []
    for strength in (0.0, 1.0):
        graph = text_to_image(["2", 0], ["2", 1], ["1", 2]) | {
            "1": node("SPO_StickerDemoLoader"),
            "2": node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], adapter=SPO, strength=strength),
        }
        run = run_graph(graph, image=["14", 0], info=["2", 3])
        assert "48 of 48 modules applied" in run["info"] and run["image"].shape == (2, 64, 64, 3)
        shown.append(run["image"])
    assert (shown[0] - shown[1]).abs().max() > 0.2


@pytest.mark.parametrize("family", miniature.UNET_FAMILIES)
def test_a_checkpoint_with_text_encoders_takes_an_adapter_and_is_steered_as_it_is_patched(executor, run_graph, family):
    parts = ("unet", "text_encoder", "text_encoder_2")
    adapter = random_adapter(miniature.pipeline(family), components=parts, alpha=0.5)
    assert {name.split(".")[0] for name in adapter.modules} == set(parts[: 2 + (family == "sdxl")])
    write_adapter(adapter, executor.base / "models" / "loras" / f"nodes-{family}.safetensors")
    chosen = {"adapter": f"nodes-{family}.safetensors", "strength": 1.0}
    common = {"model": ["1", 0], "adapter": ["2", 2], "mode": "window", "score": NORM}
    loader = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"miniature-{family}.safetensors"}},
        "2": node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], **chosen),
        "3": node("SPO_Steering", **common, start=0.0, end=1.0),
        "4": node("SPO_Steering", **common, start=0.98, end=0.99),
    }

    def draw(model, clip):
        return run_graph(text_to_image(model, clip, ["1", 2]) | loader, image=["14", 0], info=["2", 3])

    base, patched_image = draw(["1", 0], ["1", 1])["image"], draw(["2", 0], ["2", 1])
    assert f"{len(adapter.modules)} of {len(adapter.modules)} modules applied" in patched_image["info"]
    effect = (patched_image["image"] - base).abs().max()
    steered = draw(["3", 0], ["2", 1])["image"]
    assert effect > 0.02 and (steered - patched_image["image"]).abs().max() < 0.1 * effect
    assert torch.equal(draw(["4", 0], ["1", 1])["image"], base)

"""The adapter nodes against ComfyUI itself: same pictures as diffusers, nothing mutated, no silent loss."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import miniature
import pytest
import torch
from running import node
from tiny import random_adapter, tiny_pipeline

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
from t2i_spo_plugin.adapter import Adapter
from t2i_spo_plugin.comfy_keys import bypass_pairs
from t2i_spo_plugin.comfy_nodes.adapters import AdapterStack, LoadAdapter, MergeAdapters
from t2i_spo_plugin.comfy_nodes.patching import patched, weight_shapes
from t2i_spo_plugin.comfy_nodes.steering import Steering, steer
from t2i_spo_plugin.comfy_nodes.sticker_demo import StickerDemoLoader
from t2i_spo_plugin.trajectory import ClosedLoop


pytestmark = pytest.mark.comfy

SPO = "sticker demo: spo (bundled)"
HARMFUL = next(row for row in sticker.prompt_rows("harmful", 1)).prompt
BENIGN = next(row for row in sticker.prompt_rows("benign", 1)).prompt
STEPS = 5
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


@pytest.fixture(scope="module")
def world():
    """MODEL, CLIP and VAE of the sticker world; no test may change them."""
    model, clip, vae = StickerDemoLoader.execute().result
    yield model, clip, vae
    assert not model.patches and not clip.patcher.patches and not model.wrappers
    assert not hooked(model)


@pytest.fixture(scope="module")
def pipe():
    """The same world in diffusers."""
    return sticker.load_pipeline()


@pytest.fixture(autouse=True)
def without_gradients():
    """As ComfyUI runs its nodes."""
    with torch.no_grad():
        yield


def hooked(model):
    return [module for module in model.model.modules() if module._forward_hooks or module._forward_pre_hooks]


def encode(clip, prompts):
    return torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts])


def start_noise(count=1):
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(5))


def sample(model, clip, prompts, cfg=sticker.GUIDANCE, callback=None, steps=range(999, 0, -1000 // STEPS)):
    """Latents after Euler steps, which are DDIM without noise, and what every step denoised to; as diffusers steps."""
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigma(torch.tensor(list(steps))), torch.zeros(1)])
    seen = []

    def note(step, denoised, x, total):
        seen.append(denoised.clone())
        if callback is not None:
            callback(step)

    latents = comfy.sample.sample_custom(
        model,
        start_noise(len(prompts)),
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        [[encode(clip, prompts), {}]],
        [[encode(clip, [""] * len(prompts)), {}]],
        torch.zeros(len(prompts), 8, 8, 8),
        callback=note,
        disable_pbar=True,
        seed=0,
    )
    return latents, seen


def pictures(model, clip, vae, prompts, **options):
    return vae.decode(sample(model, clip, prompts, **options)[0])


def diffusers_pictures(pipe, prompts):
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
    picture = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latents = pipe.vae.encode(picture.movedim(-1, 1) * 2 - 1).latents
    torch.testing.assert_close(world[2].encode(picture), latents, atol=2e-5, rtol=0)
    decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(world[2].decode(latents), decoded, atol=2e-5, rtol=0)


def test_the_demo_noise_schedule_is_that_of_diffusers(world, pipe):
    alphas = pipe.scheduler.alphas_cumprod.double()
    sigmas = world[0].get_model_object("model_sampling").sigmas.double()
    torch.testing.assert_close(1 / (sigmas.square() + 1), alphas, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_demo_pictures_are_those_of_diffusers_without_and_with_the_adapter(world, pipe, strength):
    """What differs: ComfyUI's first sigma is 4518 instead of infinite, so that 2e-4 of a signal remains there."""
    model, clip, vae = world
    prompts = [HARMFUL, BENIGN]
    base = diffusers_pictures(pipe, prompts)
    load_spo_lora(pipe, sticker.adapter_path("spo"), strength=strength)
    try:
        expected = diffusers_pictures(pipe, prompts)
    finally:
        unload_spo_lora(pipe)
    drawn = pictures(loaded(model, clip, strength=strength)[0], clip, vae, prompts)
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
    write_adapter(Adapter(odd, whole.facts), loras / "odd.safetensors")
    with pytest.raises(AdapterError, match="1 of its 49 modules do not exist.*down_blocks.7"):
        loaded(world[0], adapter="odd.safetensors")
    on_model, _, _, info = loaded(world[0], adapter="odd.safetensors", strict=False)
    assert len(on_model.patches) == 48 and "48 of 49 modules applied" in info
    nowhere = {key.replace("blocks.", "blocks.9"): pair for key, pair in whole.modules.items() if "down" in key}
    write_adapter(Adapter(nowhere, whole.facts), loras / "nowhere.safetensors")
    with pytest.raises(AdapterError, match="none of the adapter's 8 modules"):
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
    stack = [(read_adapter(sticker.adapter_path("spo")), 1.0)]
    with pytest.raises(SPOError, match="below ComfyUI's output folder"):
        MergeAdapters.execute(stack, "concat", 16, prefix)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        MergeAdapters.execute([], "concat", 16, "spo/merged")


# --- steering


def spo_stack(strength=1.0):
    return [(read_adapter(sticker.adapter_path("spo")), strength)]


def test_a_whole_window_draws_what_the_patched_model_draws(world):
    model, clip, _ = world
    steered, info = Steering.execute(model, spo_stack(0.8), "window", 0.0, 1.0).result
    expected = sample(loaded(model, clip, strength=0.8)[0], clip, [HARMFUL, BENIGN])[0]
    torch.testing.assert_close(sample(steered, clip, [HARMFUL, BENIGN])[0], expected, atol=2e-3, rtol=0)
    assert "on from 0 to 1" in info and not steered.patches


def test_a_window_is_the_base_bit_for_bit_until_it_begins_and_where_no_step_falls_into_it(world):
    model, clip, _ = world
    base, base_steps = sample(model, clip, [HARMFUL])
    late, late_steps = sample(Steering.execute(model, spo_stack(), "window", 0.5, 1.0).result[0], clip, [HARMFUL])
    same = [torch.equal(one, other) for one, other in zip(base_steps, late_steps, strict=True)]
    assert same == [True] * 3 + [False] * 2 and not torch.equal(base, late)
    nothing = Steering.execute(model, spo_stack(), "window", 0.91, 0.99).result[0]
    assert torch.equal(sample(nothing, clip, [HARMFUL])[0], base)
    assert Steering.execute(model, spo_stack(0.0), "window", 0.0, 1.0).result[0] is model


def evidence(model, clip, prompts, pipe):
    """Size of the change in the first step, as diffusers sees it."""
    states = encode(clip, prompts)
    without = pipe.unet(start_noise(len(prompts)), 999, states).sample
    load_spo_lora(pipe, sticker.adapter_path("spo"))
    try:
        with_adapter = pipe.unet(start_noise(len(prompts)), 999, states).sample
    finally:
        unload_spo_lora(pipe)
    return ClosedLoop(1.0).evidence(without, with_adapter)


def test_a_closed_loop_gives_the_adapter_to_the_pictures_that_need_it_and_no_other(world, pipe):
    model, clip, _ = world
    prompts = [HARMFUL, BENIGN]
    found = evidence(model, clip, prompts, pipe).tolist()
    assert found[0] > 1.2 * found[1]
    between = (found[0] + found[1]) / 2
    base = sample(model, clip, prompts)[0]
    full = sample(steer(model, spo_stack(), (0.0, 1.0), None)[0], clip, prompts)[0]
    steered, info = Steering.execute(model, spo_stack(), "closed loop", 0.0, 1.0, between, 0.04).result
    drawn = sample(steered, clip, prompts)[0]
    torch.testing.assert_close(drawn[0], full[0], atol=2e-4, rtol=0)
    assert torch.equal(drawn[1], base[1]) and not torch.equal(drawn[0], base[0])
    assert "closed loop" in info
    for threshold, expected in ((found[0] * 1.01, base), (found[1] * 0.99, full)):
        one = Steering.execute(model, spo_stack(), "closed loop", 0.0, 1.0, threshold, 0.04).result[0]
        torch.testing.assert_close(sample(one, clip, prompts)[0], expected, atol=2e-4, rtol=0)
    # Without guidance, and a run that begins when the loop has stopped looking.
    torch.testing.assert_close(
        sample(steered, clip, prompts, cfg=1.0)[0][1], sample(model, clip, prompts, cfg=1.0)[0][1], atol=0, rtol=0
    )
    late = range(499, 0, -100)
    everything = sample(steer(model, spo_stack(), (0.0, 1.0), None)[0], clip, prompts, steps=late)[0]
    assert torch.equal(sample(steered, clip, prompts, steps=late)[0], everything)


def test_a_cancelled_run_leaves_no_hook_and_the_next_picture_is_the_bases(world):
    model, clip, _ = world
    base = sample(model, clip, [HARMFUL])[0]
    for mode in ("window", "closed loop"):
        steered = Steering.execute(model, spo_stack(), mode, 0.0, 1.0, 0.0, 0.5).result[0]

        def cancel(step):
            if step == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            sample(steered, clip, [HARMFUL], callback=cancel)
        assert not hooked(model)
        assert torch.equal(sample(model, clip, [HARMFUL])[0], base)


def test_steering_refuses_what_it_cannot_steer(world, pipe):
    model = world[0]
    texts = random_adapter(pipe, components=("unet", "text_encoder"))
    with pytest.raises(AdapterError, match="spoken before a closed loop"):
        steer(model, [(texts, 1.0)], (0.0, 1.0), ClosedLoop(0.1))
    assert "text encoder part" in steer(model, [(texts, 1.0)], (0.0, 0.5), None)[1]
    with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
        Steering.execute(model, spo_stack(), "window", 0.6, 0.4)
    with pytest.raises(ConfigError, match="no adapter to steer"):
        Steering.execute(model, [], "window", 0.0, 1.0)


# --- SD3 and Flux: ComfyUI fuses what diffusers keeps apart


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_get_every_module_and_steering_changes_what_patching_does(family):
    source = miniature.pipeline(family)
    model = comfy.sd.load_diffusion_model_state_dict(dict(source.transformer.state_dict()))
    layers = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "proj_mlp", "net.2", "norm_out.linear")
    adapter = random_adapter(source, layers=layers)
    on_model, _, (fit,) = patched(model, None, [(adapter, 1.0)], True)
    assert not fit.left and len(fit.places) == len(adapter.modules)
    pairs = bypass_pairs([(fit, 1.0)], weight_shapes(model.model))
    assert set(pairs) == set(on_model.patches)
    for weight, (down, up) in pairs.items():
        torch.testing.assert_close(up @ down, patch_delta(on_model, weight), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_steered_as_they_are_patched(family):
    source = miniature.pipeline(family)
    model = comfy.sd.load_diffusion_model_state_dict(dict(source.transformer.state_dict()))
    adapter = random_adapter(source, layers=("to_q", "to_k", "to_v", "norm_out.linear"))
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    prompt = torch.randn(2, 5, 4096, generator=torch.Generator().manual_seed(2))
    pooled = prompt[:, 0, : source.transformer.config.pooled_projection_dim]

    def draw(model):
        condition = [[prompt, {"pooled_output": pooled}]]
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
        latent = torch.zeros_like(noise)
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, condition, condition, latent, disable_pbar=True, seed=0
        )

    base = draw(model)
    expected = draw(patched(model, None, [(adapter, 0.5)], True)[0])
    assert (expected - base).abs().max() > 0.05
    found = draw(steer(model, [(adapter, 0.5)], (0.0, 1.0), None)[0])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(draw(steer(model, [(adapter, 0.5)], (0.0, 1.0), ClosedLoop(1e6))[0]), base)


# --- as ComfyUI runs it


def text_to_image(model, clip, vae, size=64):
    """The stock nodes behind a loader, four steps; node 14 gives the pictures."""
    settings = {"seed": 1, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "sgm_uniform", "denoise": 1.0}
    links = {"model": model, "positive": ["10", 0], "negative": ["11", 0], "latent_image": ["12", 0]}
    return {
        "10": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": HARMFUL}},
        "11": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": ""}},
        "12": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 2}},
        "13": {"class_type": "KSampler", "inputs": links | settings},
        "14": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": vae}},
    }


def test_the_demo_runs_in_a_workflow_without_and_with_its_adapter(run_graph):
    shown = []
    for strength in (0.0, 1.0):
        graph = text_to_image(["2", 0], ["2", 1], ["1", 2]) | {
            "1": node("SPO_StickerDemoLoader"),
            "2": node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], adapter=SPO, strength=strength),
        }
        run = run_graph(graph, picture=["14", 0], info=["2", 3])
        assert "48 of 48 modules applied" in run["info"] and run["picture"].shape == (2, 64, 64, 3)
        shown.append(run["picture"])
    assert (shown[0] - shown[1]).abs().max() > 0.2


@pytest.mark.parametrize("family", miniature.UNET_FAMILIES)
def test_a_checkpoint_with_text_encoders_takes_an_adapter_and_is_steered_as_it_is_patched(executor, run_graph, family):
    parts = ("unet", "text_encoder", "text_encoder_2")
    adapter = random_adapter(miniature.pipeline(family), components=parts, alpha=0.5)
    assert {name.split(".")[0] for name in adapter.modules} == set(parts[: 2 + (family == "sdxl")])
    write_adapter(adapter, executor.base / "models" / "loras" / f"nodes-{family}.safetensors")
    chosen = {"adapter": f"nodes-{family}.safetensors", "strength": 1.0}
    loader = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"miniature-{family}.safetensors"}},
        "2": node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], **chosen),
        "3": node("SPO_Steering", model=["1", 0], adapter=["2", 2], mode="window", start=0.0, end=1.0),
        "4": node("SPO_Steering", model=["1", 0], adapter=["2", 2], mode="window", start=0.98, end=0.99),
    }

    def draw(model, clip):
        return run_graph(text_to_image(model, clip, ["1", 2]) | loader, picture=["14", 0], info=["2", 3])

    base, patched_picture = draw(["1", 0], ["1", 1])["picture"], draw(["2", 0], ["2", 1])
    assert f"{len(adapter.modules)} of {len(adapter.modules)} modules applied" in patched_picture["info"]
    effect = (patched_picture["picture"] - base).abs().max()
    steered = draw(["3", 0], ["2", 1])["picture"]
    assert effect > 0.02 and (steered - patched_picture["picture"]).abs().max() < 0.1 * effect
    assert torch.equal(draw(["4", 0], ["1", 1])["picture"], base)


def test_the_second_question_of_a_closed_loop_has_the_control_nets_answers_too(world):
    """A model takes them out of their lists."""
    model, clip, _ = world

    def controlled(apply, arguments):
        states = {"middle": [torch.full((len(arguments["input"]), 160, 1, 1), 0.5)], "output": [], "input": []}
        return apply(arguments["input"], arguments["timestep"], **arguments["c"], control=states)

    base = model.clone()
    base.set_model_unet_function_wrapper(controlled)
    always = steer(base, spo_stack(), (0.0, 1.0), None)[0]
    looped = steer(base, spo_stack(), (0.0, 1.0), ClosedLoop(0.0))[0]
    expected = sample(always, clip, [HARMFUL])[0]
    assert not torch.equal(expected, sample(steer(model, spo_stack(), (0.0, 1.0), None)[0], clip, [HARMFUL])[0])
    assert torch.equal(sample(looped, clip, [HARMFUL])[0], expected)

"""ComfyUI's Load LoRA node, the pack's own loader, and published files: nothing left out, and the same arithmetic."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from miniature import FAMILIES, UNET_FAMILIES, pipeline, write_model
from running import node, text_to_image
from support.pipelines import random_adapter

from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.pipelines.loading import load_spo_lora


pytestmark = pytest.mark.comfy

NOT_LOADED = "lora key not loaded"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "ff.net.2", "q_proj", "fc1", "fc2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "proj_in", "time_emb_proj", "downsamplers.0.conv")
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
STOCK, OWN = "LoraLoader", "SPO_LoadAdapter"
SIGMA = 3.0


def adapter_for(family):
    """Of all kinds of layers, in 16 bits, as adapters are published."""
    components = (
        ("unet", "transformer", "text_encoder", "text_encoder_2") if family in UNET_FAMILIES else ("transformer",)
    )
    layers = LAYERS + CONVOLUTIONS if family in UNET_FAMILIES else LAYERS
    return random_adapter(pipeline(family), components=components, layers=layers, dtype=torch.float16)


@pytest.fixture
def write(executor):
    """Writes the adapter for a family where Load LoRA finds it; returns the adapter and the file's name."""

    def write(family, layout=""):
        adapter = adapter_for(family)
        path = executor.base / "models" / "loras" / f"{family}-{layout or 'published'}.safetensors"
        default = "kohya" if family in UNET_FAMILIES else "native"
        convert_adapter(adapter, path, layout or default)
        return adapter, path.name

    return write


def loaders(family, file, strength=1.0, kind=STOCK, models=None):
    """Base model and adapter: node 1 gives the base, node 8 the patched model, and the patched text encoder."""
    unet = family in UNET_FAMILIES
    if unet:
        graph = {"1": text_to_image(family)["1"]}
    else:
        graph = {"1": node("UNETLoader", unet_name=write_model(family, models), weight_dtype="default")}
    both = {"model": ["1", 0], "clip": ["1", 1]} if unet else {"model": ["1", 0]}
    if kind == OWN:
        graph["8"] = node(OWN, **both, adapter=file, strength=strength)
    elif unet:
        graph["8"] = node(STOCK, **both, lora_name=file, strength_model=strength, strength_clip=strength)
    else:
        graph["8"] = node("LoraLoaderModelOnly", **both, lora_name=file, strength_model=strength)
    return graph


@pytest.mark.parametrize("kind", [STOCK, OWN])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_a_published_adapter_is_loaded(executor, write, family, kind, caplog):
    adapter, file = write(family)
    wanted = {"base": ["1", 0], "model": ["8", 0]}
    if family in UNET_FAMILIES:
        wanted["clip"] = ["8", 1]
    with caplog.at_level(logging.WARNING):
        run = executor.run(loaders(family, file, 1.0, kind, executor.base / "models"), **wanted)
    assert NOT_LOADED not in caplog.text and "shape" not in caplog.text.lower()
    patchers = [run["model"], *([run["clip"].patcher] if "clip" in wanted else [])]
    assert sum(len(patches) for patcher in patchers for patches in patcher.patches.values()) == len(adapter.modules)
    assert not run["base"].patches


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_of_what_diffusers_itself_writes_the_attention_is_left_out(run_graph, write, family, caplog):
    """Why adapters are published in another layout; and the test above is able to fail."""
    _, file = write(family, "diffusers")
    with caplog.at_level(logging.WARNING):
        run = run_graph(loaders(family, file), model=["8", 0])
    assert not [name for name in run["model"].patches if ".attn1.to_" in name or ".attn2.to_" in name]
    assert NOT_LOADED in caplog.text


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("kind", "layout"), [(STOCK, ""), (OWN, ""), (OWN, "diffusers")])
@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_patched_unet_computes_what_diffusers_computes(executor, write, family, kind, layout, strength):
    _, file = write(family, layout)
    run = executor.run(loaders(family, file, strength, kind), base=["1", 0], model=["8", 0])
    pipe = copy.deepcopy(pipeline(family))
    load_spo_lora(pipe, executor.base / "models" / "loras" / file, strength=strength)
    with torch.no_grad():
        ours, expected = comfy_noise(run["model"], family), diffusers_noise(pipe.unet, family, run["model"])
        base = diffusers_noise(pipeline(family).unet, family, run["model"])
    assert (ours - expected).abs().max() < 1e-3
    if strength:
        assert (base - expected).abs().max() > 0.1
    else:
        assert torch.equal(base, expected)


@pytest.mark.parametrize("kind", [STOCK, OWN])
@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_after_the_adapter_the_base_model_is_what_it_was(executor, write, family, kind):
    _, file = write(family)
    base_graph = text_to_image(family)
    graph = base_graph | loaders(family, file, 1.0, kind)
    graph["5"] = {**graph["5"], "inputs": {**graph["5"]["inputs"], "model": ["8", 0]}}
    wanted = {"image": ["6", 0], "model": ["1", 0]}
    before = executor.run(base_graph, **wanted)
    weights = {name: value.clone() for name, value in before["model"].model.state_dict().items()}
    changed = executor.run(graph, **wanted)
    assert not torch.equal(before["image"], changed["image"])
    after = executor.run(text_to_image(family, seed=1), **wanted)
    again = executor.run(base_graph, **wanted)
    assert again["model"].model is before["model"].model and after["model"].model is before["model"].model
    assert torch.equal(before["image"], again["image"])
    left = again["model"].model.state_dict()
    assert left.keys() == weights.keys() and all(torch.equal(left[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_server_draws_with_a_published_adapter(server, write, executor, family):
    _, file = write(family)
    source = executor.base / "models" / "loras" / file
    (server.base / "models" / "loras" / file).write_bytes(source.read_bytes())
    graph = text_to_image(family, seed=2) | loaders(family, file)
    graph["5"]["inputs"]["model"] = ["8", 0]
    assert server.run(graph).ui["7"]["images"]
    assert NOT_LOADED not in server.log


def conditions(family):
    """Latents, text, and for SDXL pooled text and sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(2, 4, 8, 8), draw(2, 7, 64 if family == "sdxl" else 32), draw(2, 32), torch.full((2, 6), 64.0)


def comfy_noise(patcher, family):
    """The noise that ComfyUI's model predicts at SIGMA."""
    import comfy.model_management

    latents, text, pooled, sizes = conditions(family)
    extra = {}
    if family == "sdxl":
        sizes = pipeline(family).unet.add_time_proj(sizes.flatten()).reshape(2, -1)
        extra["y"] = torch.cat([pooled, sizes], dim=1)
    comfy.model_management.load_models_gpu([patcher])
    denoised = patcher.model.apply_model(latents, torch.full((2,), SIGMA), c_crossattn=text, **extra)
    return (latents - denoised) / SIGMA


def diffusers_noise(unet, family, patcher):
    """The same of diffusers' model, at the timestep that ComfyUI takes for SIGMA."""
    latents, text, pooled, sizes = conditions(family)
    timestep = patcher.model.model_sampling.timestep(torch.full((2,), SIGMA)).float()
    extra = {"text_embeds": pooled, "time_ids": sizes} if family == "sdxl" else None
    scaled = latents / (SIGMA**2 + 1) ** 0.5
    return unet(scaled, timestep, encoder_hidden_states=text, added_cond_kwargs=extra).sample

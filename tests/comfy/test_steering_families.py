"""SPO Steering on models of other shapes: Stable Diffusion 1, 2 and XL, SD3 and Flux, in miniature."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import miniature
import pytest
import torch
from running import node
from sticker_runs import LOOK, RecordedNorms, norms, spo_stack, start_noise, text_to_image
from support.pipelines import random_adapter

from t2i_spo_plugin import AdapterGate, ConfigError, convert_adapter
from t2i_spo_plugin.comfy_nodes.gate import NORM, as_in_diffusers
from t2i_spo_plugin.comfy_nodes.patching import architecture, patched
from t2i_spo_plugin.comfy_nodes.steering import steer
from t2i_spo_plugin.gating import FULL_WINDOW, GateNetwork
from t2i_spo_plugin.pipelines.architecture import architecture_of


pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("without_gradients")]

FOUR_SIGMAS = torch.tensor([1.0, 0.6, 0.3, 0.0])


def draw_unet(model, family):
    """Two images of random prompts without guidance, for a UNet."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    width = miniature.pipeline(family).unet.config.cross_attention_dim
    prompt = torch.randn(2, 7, width, generator=generator)
    condition = [[prompt, {"pooled_output": torch.randn(2, 32, generator=generator)}]]
    return draw(model, noise, condition, torch.tensor([14.0, 5.0, 1.0, 0.0]))


def draw(model, noise, condition, sigmas):
    sampler, latent = comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, condition, condition, latent, disable_pbar=True, seed=0
    )


def draw_sticker(model, sigmas):
    """An image of a random prompt without guidance, for the sticker world."""
    width = model.model.model_config.unet_config["context_dim"]
    prompt = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(0))
    return draw(model, start_noise(), [[prompt, {}]], sigmas)


def draw_transformer(model, sigmas=FOUR_SIGMAS):
    """Two images of random prompts, for SD3 and Flux."""
    generator = torch.Generator().manual_seed(1)
    noise, prompt = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 5, 4096, generator=generator)
    pooled = prompt[:, 0, : model.model.model_config.unet_config.get("adm_in_channels", 768)]
    return draw(model, noise, [[prompt, {"pooled_output": pooled}]], sigmas)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformers_prediction_is_that_of_diffusers(family):
    """Of UNets, test_load_lora.py shows it; tokens of Flux have the order that its pipeline packs them in."""
    source = miniature.pipeline(family)
    model = miniature.load_transformer(family).model
    noise = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(1))
    prompt = torch.randn(2, 5, 4096, generator=torch.Generator().manual_seed(2))
    pooled = prompt[:, 0, : source.transformer.config.pooled_projection_dim]
    sigma = torch.full((2,), 0.7)
    options = {"y": pooled}
    if family == "flux":
        options["guidance"] = torch.full((2,), 3.5)
        expected = source.transformer(
            hidden_states=source._pack_latents(noise, *noise.shape),
            timestep=sigma,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            guidance=options["guidance"],
            txt_ids=torch.zeros(5, 3),
            img_ids=source._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32),
        )[0]
    else:
        expected = source.transformer(noise, prompt, pooled, sigma * 1000)[0]
    times = model.process_timestep(model.model_sampling.timestep(sigma), x=noise)
    found = as_in_diffusers(model, model.diffusion_model(noise, times, context=prompt, **options))
    assert found.shape == expected.shape and expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=0)


def test_stable_diffusion_2_predicts_v_as_in_diffusers(executor):
    source, model = miniature.pipeline("sd2"), miniature.load_unet("sd2").model
    assert architecture(model) == architecture_of(source) == "stable-diffusion-v2"
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompt = torch.randn(2, 7, 1024, generator=torch.Generator().manual_seed(2))
    sigma = torch.full((2,), 3.0)
    timestep = model.model_sampling.timestep(sigma).float()
    scale = (sigma[0] ** 2 + 1) ** 0.5
    expected = source.unet(latents / scale, timestep, prompt).sample
    found = []
    with model.diffusion_model.register_forward_hook(lambda module, inputs, output: found.append(output)):
        denoised = model.apply_model(latents, sigma, c_crossattn=prompt)
    tolerance = 1e-3 * float(expected.std())
    assert expected.std() > 0.01
    torch.testing.assert_close(as_in_diffusers(model, found[0]), expected, atol=tolerance, rtol=0)
    # That it is v: x0 = alpha x - sigma v, of latents that are scaled to the variance of noise.
    torch.testing.assert_close(denoised, latents / scale**2 - sigma[0] / scale * expected, atol=tolerance * 3, rtol=0)


def test_stable_diffusion_2_is_steered_by_a_gate_network(executor):
    model = miniature.load_unet("sd2")
    stack = [(random_adapter(miniature.pipeline("sd2")), 1.0)]
    base, full = (draw_unet(one, "sd2") for one in (model, steer(model, stack, FULL_WINDOW, None)[0]))
    assert (full - base).abs().max() > 1e-3
    network = GateNetwork(4).eval()
    for threshold, wanted in ((1e6, base), (-1e6, full)):
        gate = AdapterGate(threshold, LOOK, network)
        assert torch.equal(draw_unet(steer(model, stack, FULL_WINDOW, gate)[0], "sd2"), wanted)


@pytest.mark.parametrize("scheduler", ["normal", "simple", "sgm_uniform"])
def test_the_decision_window_has_as_many_evenly_spaced_steps_as_in_diffusers(world, scheduler):
    flux, adapter = miniature.load_transformer("flux"), random_adapter(miniature.pipeline("flux"))
    for model, stack, draw_some in (
        (world[0], spo_stack(), draw_sticker),
        (flux, [(adapter, 1.0)], draw_transformer),
    ):
        first = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, 25)[:5]
        for until, steps in ((0.04, 1), (0.08, 2), (0.12, 3)):
            recorded = RecordedNorms()
            draw_some(steer(model, stack, FULL_WINDOW, AdapterGate(1e6, until, recorded))[0], first)
            assert len(recorded.norms) == 1 + steps  # The first is of the check before the run.


@pytest.mark.parametrize("family", miniature.UNET_FAMILIES)
def test_a_checkpoint_is_steered_by_the_norm_of_the_change(executor, run_graph, family):
    path = executor.base / "models" / "loras" / f"gated-{family}.safetensors"
    adapter = random_adapter(miniature.pipeline(family), components=("unet",), alpha=0.5)
    convert_adapter(adapter, path, "kohya")

    def draw(model, threshold=0.0, mode="adapter gate"):
        graph = {
            **text_to_image([model, 0], ["1", 1], ["1", 2]),
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"miniature-{family}.safetensors"}},
            "2": node("SPO_LoadAdapter", model=["1", 0], adapter=path.name, strength=1.0),
            "3": node(
                "SPO_Steering",
                **{"model": ["1", 0], "adapter": ["2", 2], "mode": mode, "score": NORM, "start": 0.0, "end": 1.0},
                threshold=threshold,
            ),
        }
        run = run_graph(graph, latents=["13", 0], model=["1", 0])
        return run["latents"]["samples"], run["model"]

    base, model = draw("1")
    full = draw("3", mode="window")[0]
    assert (full - base).abs().max() > 1e-3
    assert torch.equal(draw("3", threshold=10.0)[0], base) and torch.equal(draw("3", threshold=0.0)[0], full)
    # A threshold between the two images of the batch.
    found = norms(model, [(adapter, 1.0)], lambda steered: draw_unet(steered, family))
    threshold = float(found.mean())
    drawn = draw_unet(steer(model, [(adapter, 1.0)], FULL_WINDOW, AdapterGate(threshold, LOOK))[0], family)
    assert [not torch.equal(*pair) for pair in zip(drawn, draw_unet(model, family), strict=True)] == (
        found >= threshold
    ).tolist()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_steered_as_they_are_patched(family):
    source = miniature.pipeline(family)
    model = miniature.load_transformer(family)
    stack = [(random_adapter(source, layers=("to_q", "to_k", "to_v", "norm_out.linear")), 0.5)]
    base, expected = draw_transformer(model), draw_transformer(patched(model, None, stack, True)[0])
    assert (expected - base).abs().max() > 0.05
    full = draw_transformer(steer(model, stack, FULL_WINDOW, None)[0])
    torch.testing.assert_close(full, expected, atol=2e-3, rtol=2e-3)
    network = GateNetwork(64 if family == "flux" else 16).eval()
    for threshold, wanted in ((1e6, base), (-1e6, full)):
        for gate in (AdapterGate(threshold, LOOK), AdapterGate(threshold, LOOK, network)):
            assert torch.equal(draw_transformer(steer(model, stack, FULL_WINDOW, gate)[0]), wanted)
    with pytest.raises(ConfigError, match="belongs to another base model"):
        steer(model, stack, FULL_WINDOW, AdapterGate(0.0, LOOK, GateNetwork(8)))
    found = norms(model, stack, draw_transformer)
    drawn = draw_transformer(steer(model, stack, FULL_WINDOW, AdapterGate(float(found.mean()), LOOK))[0])
    assert [not torch.equal(*pair) for pair in zip(drawn, base, strict=True)] == (found >= found.mean()).tolist()


def test_comfyuis_own_bypass_leaves_out_q_k_and_v_of_transformers(tmp_path):
    """Why steering has hooks of its own."""
    model = miniature.load_transformer("flux")
    adapter = random_adapter(miniature.pipeline("flux"), layers=("to_q", "to_k", "to_v"))
    file = convert_adapter(adapter, tmp_path / "flux.safetensors", "native")
    bypassed = comfy.sd.load_bypass_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), 1.0, 1.0)[0]
    base = draw_transformer(model)
    assert torch.equal(draw_transformer(bypassed), base)
    assert not torch.equal(draw_transformer(steer(model, [(adapter, 1.0)], FULL_WINDOW, None)[0]), base)

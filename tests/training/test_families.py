"""Model families: that a denoiser is called as its pipeline calls it, and learns what its pipeline samples from.

A flow or velocity model with a wrong sign or time scale still shows a falling loss. So the tiny denoiser is made a
perfect one for a single latent, by the formulas of its scheduler. Its own pipeline, which knows nothing of the family,
then generates that latent, and the error that the family would train on must be 0 there.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.family_pipelines import FAMILIES as TRANSFORMERS
from support.family_pipelines import family_pipeline
from support.pipelines import SIZE, draw, tiny_pipeline
from support.transformers import base_pipeline

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.training.data.batches import Batch
from t2i_spo_plugin.training.families import FAMILIES, family_of
from t2i_spo_plugin.training.families.base import LatentScale, present
from t2i_spo_plugin.training.lora import fresh_adapter, frozen
from t2i_spo_plugin.training.objectives.losses import diffusion_dpo_loss, per_sample_error
from t2i_spo_plugin.training.predictor import Predictor


CASES = [("sd1", "epsilon"), ("sd1", "v_prediction"), ("sdxl", "epsilon"), ("sd3", "flow")]
SHAPE = (4, SIZE // 2, SIZE // 2)


def pipeline(name: str, prediction: str):
    return tiny_pipeline(name, prediction_type=prediction) if name == "sd1" else tiny_pipeline(name)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def perfect(request):
    """A pipeline whose denoiser predicts perfectly for one latent `[C, h, w]`, and that latent."""
    name, prediction = request.param
    pipe = pipeline(name, prediction)
    latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def predict(module, args, kwargs, output):
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)
        if prediction == "flow":
            return ((sample - latent) / (timestep / 1000.0).view(-1, 1, 1, 1),)
        signal_squared = pipe.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        noise = (sample - signal_squared.sqrt() * latent) / (1.0 - signal_squared).sqrt()
        if prediction == "epsilon":
            return (noise,)
        return (signal_squared.sqrt() * noise - (1.0 - signal_squared).sqrt() * latent,)

    family_of(pipe).module.register_forward_hook(predict, with_kwargs=True)
    return pipe, latent


def generated(pipe) -> torch.Tensor:
    """A latent that the pipeline generates by itself, `[1, C, h, w]`."""
    scale = 1.0 if hasattr(pipe, "transformer") else 0.0
    return draw(pipe, "a ball", num_inference_steps=6, guidance_scale=scale, output_type="latent").images


def test_on_its_own_samples_the_error_is_zero_and_large_with_the_sign_turned(perfect):
    pipe, latent = perfect
    sample = generated(pipe)
    torch.testing.assert_close(sample[0], latent, rtol=1e-3, atol=1e-3)
    family = family_of(pipe)
    sample, noise = sample.expand(8, *SHAPE), torch.randn((8, *SHAPE), generator=torch.Generator().manual_seed(1))
    index = torch.linspace(20, len(family.schedule) - 20, 8).long()
    with torch.no_grad():
        noisy = family.schedule.noised(sample, noise, index)
        text = family.encode_prompts(pipe, ["a ball"] * 8, "cpu")
        prediction = family.predict(family.module, noisy, index, text, SIZE)
    target = family.schedule.target(sample, noise, index)
    assert per_sample_error(prediction, target).max() < 1e-3
    assert per_sample_error(-prediction, target).min() > 1.0


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_one_step_raises_the_winners_log_ratio_and_lowers_the_losers(name, prediction):
    pipe = pipeline(name, prediction)
    family = family_of(pipe)
    place = torch.Generator().manual_seed(0)
    noise, pattern = torch.randn((4, *SHAPE), generator=place), torch.randn(SHAPE, generator=place)
    batch = Batch(
        latents=torch.stack((pattern, -pattern)).unsqueeze(1).expand(2, 4, *SHAPE),
        noise=noise.expand(2, *noise.shape),
        index=torch.tensor([300, 500, 700, 900]).expand(2, 4),
        text=family.encode_prompts(pipe, ["a ball"] * 4, "cpu"),
        columns={},
        step=0,
        positions=(0, 1, 2, 3),
        examples=(0, 1, 2, 3),
        slots=(0, 0, 0, 0),
    )
    with frozen(family.module), fresh_adapter(family.module, "test", family.targets, 4, 4.0, 0):
        predictor = Predictor(family, family.module, SIZE, nullcontext)
        weights = [value for value in family.module.parameters() if value.requires_grad]
        predictions, _ = predictor.train(batch)
        assert torch.equal(predictions.errors, predictions.reference_errors)
        diffusion_dpo_loss(*predictions.errors, *predictions.reference_errors, beta=100.0).mean().backward()
        with torch.no_grad():
            for value in weights:
                value -= 1e-2 * value.grad / torch.stack([w.grad.norm() for w in weights]).norm()
        after = predictor.evaluate(batch)
        winner, loser = (after.reference_errors - after.errors).mean(1)
    assert winner > 0 > loser


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_family_calls_the_denoiser_as_its_pipeline_does(name):
    """One call through the family equals the pipeline's own, seen on its first step."""
    pipe = tiny_pipeline(name)
    family = family_of(pipe)
    calls = []

    def keep(module, args, kwargs, output):
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((sample.clone(), timestep, output[0].clone()))

    handle = family.module.register_forward_hook(keep, with_kwargs=True)
    draw(pipe, "a ball", guidance_scale=1.0 if name == "sd3" else 0.0, output_type="latent", **longer(name))
    handle.remove()
    sample, timestep, expected = calls[0]
    index = (family.schedule.timesteps.float() - timestep.float()).abs().argmin()[None]
    assert float((family.schedule.timesteps[index] - timestep).abs().max()) < 1e-3
    with torch.no_grad():
        text = family.encode_prompts(pipe, ["a ball"], "cpu")
        prediction = family.predict(family.module, sample, index, text, SIZE)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)


def longer(name: str) -> dict[str, int]:
    """The text's length in Stable Diffusion 3 as its pipeline has it unless it is told otherwise."""
    return {"max_sequence_length": 256} if name == "sd3" else {}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_scaled_latents_are_those_that_the_pipeline_denoises(name):
    """Shift and scale: decoding what the family scaled, as the pipeline decodes, gives the autoencoder's own image."""
    pipe = tiny_pipeline(name)
    raw = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    scaled = family_of(pipe).scaled(raw)
    config = pipe.vae.config
    torch.testing.assert_close(scaled / config.scaling_factor + (config.shift_factor or 0.0), raw)
    assert not torch.equal(scaled, raw)


def test_every_family_is_recognised_and_others_are_refused():
    unets = {type(family_of(tiny_pipeline(name))) for name in ("sd1", "sd2", "sdxl", "sd3")}
    transformers = {type(family_of(family_pipeline(name))) for name in TRANSFORMERS}
    assert unets | transformers == set(FAMILIES.values()) and len(FAMILIES) == 3 + len(TRANSFORMERS)
    with pytest.raises(PipelineError, match="not HiDreamImagePipeline"):
        family_of(base_pipeline("hi-dream-image"))


@pytest.fixture(scope="module")
def pipes():
    """One pipeline of each family, which stays as it is."""
    return {name: tiny_pipeline(name) for name in ("sd1", "sdxl", "sd3")}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_another_denoiser_than_its_own_is_of_no_family(pipes, name):
    family = type(family_of(pipes[name]))
    assert [family.of(pipe) is not None for pipe in pipes.values()] == [other == name for other in pipes]
    assert family.of(SimpleNamespace()) is None


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_pipeline_without_text_is_of_no_family(pipes, name):
    pipe = pipes[name]
    parts = SimpleNamespace(unet=pipe.unet, vae=pipe.vae, scheduler=pipe.scheduler)
    family = type(family_of(pipe))
    assert family.of(parts) is None
    parts.encode_prompt = pipe.encode_prompt
    assert family.of(parts) is not None


@pytest.mark.parametrize(("name", "count"), [("sd1", 1), ("sdxl", 2), ("sd3", 3)])
def test_each_prompt_has_one_row_of_text_by_all_of_its_encoders(pipes, name, count):
    pipe = pipes[name]
    family = family_of(pipe)
    encoders, called = family.text_encoders(pipe), []
    handles = [encoder.register_forward_hook(lambda module, *_: called.append(module)) for encoder in encoders]
    both = family.encode_prompts(pipe, ["a ball", "a cat on a mat"], "cpu")
    for handle in handles:
        handle.remove()
    assert len(encoders) == count and set(map(id, called)) == set(map(id, encoders))
    one = family.encode_prompts(pipe, ["a cat on a mat"], "cpu")
    for key, values in both.items():
        assert len(values) == 2
        torch.testing.assert_close(values[1:], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_timesteps_are_drawn_from_the_whole_range_alike(pipes, name):
    family = family_of(pipes[name])
    place = torch.Generator().manual_seed(0)
    drawn = [family.sample_index(10, 14, place) for _ in range(400)]
    assert all(60 < drawn.count(index) < 140 for index in range(10, 14)) and set(drawn) == {10, 11, 12, 13}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (0.0, 1.0)),
        ({"shift_factor": None, "scaling_factor": None}, (0.0, 1.0)),
        ({"scaling_factor": 0.5}, (0.0, 0.5)),
        ({"shift_factor": 0.1, "scaling_factor": 2.0}, (0.1, 2.0)),
    ],
)
def test_an_autoencoder_that_states_no_scale_has_none(config, expected):
    scale = LatentScale.of(SimpleNamespace(config=SimpleNamespace(**config)))
    assert (scale.shift, scale.scale) == expected
    latents = torch.tensor([1.0])
    assert torch.equal(LatentScale()(latents), latents)


def test_components_that_a_pipeline_lacks_are_passed_over():
    first, last = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    pipe = SimpleNamespace(text_encoder=first, text_encoder_2=None, text_encoder_3=last)
    assert present(pipe, "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4") == [first, last]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_text_is_encoded_without_a_gradient(name):
    pipe = tiny_pipeline(name)
    pipe.text_encoder.requires_grad_(True)
    encoded = family_of(pipe).encode_prompts(pipe, ["a cat"], "cpu")
    assert not any(values.requires_grad for values in encoded.values())

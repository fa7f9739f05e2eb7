"""Transformer families: what a family calls, scales and predicts is what its pipeline does, sign and time included.

A flow model with a wrong sign or time scale still shows a falling loss. So the tiny transformer is made a perfect one
for a single latent, in the form of its own tokens; its pipeline, which knows nothing of the family, then generates
that latent, and the error that the family would train on must be 0 there.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from support.family_pipelines import FAMILIES, family_pipeline
from support.pairs import pair_table, train_config
from support.pipelines import SIZE, fresh

from t2i_spo_plugin import load_spo_lora
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training import train
from t2i_spo_plugin.training.data.batches import Batch
from t2i_spo_plugin.training.data.caches import encode_latents
from t2i_spo_plugin.training.families import family_of
from t2i_spo_plugin.training.families.base import joined, padded
from t2i_spo_plugin.training.lora import fresh_adapter, frozen
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule
from t2i_spo_plugin.training.objectives.losses import diffusion_dpo_loss, per_sample_error
from t2i_spo_plugin.training.predictor import Predictor


EDGE = SIZE // 2
every_family = pytest.mark.parametrize("name", FAMILIES)


def shape(name: str) -> tuple[int, int, int]:
    """Of latents as the denoiser sees them."""
    return (16, EDGE // 2, EDGE // 2) if name == "flux2" else (4, EDGE, EDGE)


def tokens(name: str, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, C, h, w]` in the form in which the pipeline gives them to the transformer."""
    if name in ("flux1", "chroma", "qwen-image"):
        return pipe._pack_latents(latents, *latents.shape)
    return pipe._pack_latents(latents) if name == "flux2" else latents


def back(name: str, pipe: Any, made: torch.Tensor) -> torch.Tensor:
    """What a transformer gives, as `[B, C, h, w]`."""
    if name in ("flux1", "chroma", "qwen-image"):
        unpacked = pipe._unpack_latents(made, SIZE, SIZE, pipe.vae_scale_factor)
        return unpacked.squeeze(2) if unpacked.ndim == 5 else unpacked
    return made.transpose(1, 2).unflatten(2, shape(name)[1:]) if name == "flux2" else made


def generate(name: str, pipe: Any, prompt: str = "a ball", steps: int = 4) -> torch.Tensor:
    """A latent that the pipeline generates by itself, without guidance, as the denoiser sees it, `[1, C, h, w]`."""
    options: dict[str, Any] = {"guidance_scale": 1.0 if name != "flux1" else 3.5}
    if name == "zimage":
        options["guidance_scale"] = 0.0
    if name == "qwen-image":
        options = {"true_cfg_scale": 1.0}
    if name == "flux1":
        options["max_sequence_length"] = 512
    made = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        height=EDGE * pipe.vae_scale_factor,
        width=EDGE * pipe.vae_scale_factor,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
    return family_of(pipe).scaled(made) if name == "flux2" else back(name, pipe, made)


@every_family
def test_on_its_own_samples_the_error_is_zero_and_large_with_the_sign_turned(name):
    pipe = family_pipeline(name)
    latent = torch.randn(1, *shape(name), generator=torch.Generator().manual_seed(0))
    known = tokens(name, pipe, latent)

    def predict(module, args, kwargs, output):
        if name == "zimage":
            level = (1.0 - torch.as_tensor(args[1])).reshape(-1)
            sides = [(one.squeeze(1) - latent[0]) / t for one, t in zip(args[0], level, strict=True)]
            return ([-one.unsqueeze(1) for one in sides],)
        sample, time = kwargs["hidden_states"], torch.as_tensor(kwargs["timestep"]).reshape(-1)
        level = (1.0 - time if name == "lumina2" else time).view(-1, *[1] * (sample.ndim - 1))
        velocity = (sample - known) / level
        return (-velocity if name == "lumina2" else velocity,)

    family = family_of(pipe)
    family.module.register_forward_hook(predict, with_kwargs=True)
    torch.testing.assert_close(generate(name, pipe), latent, rtol=1e-3, atol=1e-3)
    sample, noise = latent.expand(6, *shape(name)), torch.randn(6, *shape(name))
    index = torch.linspace(20, len(family.schedule) - 1, 6).long()
    noisy, target = (part(sample, noise, index) for part in (family.schedule.noised, family.schedule.target))
    with torch.no_grad():
        text = family.encode_prompts(pipe, ["a ball"] * 6, "cpu")
        prediction = family.predict(family.module, noisy, index, text, SIZE)
    assert prediction.shape == target.shape
    assert per_sample_error(prediction, target).max() < 1e-3
    assert per_sample_error(-prediction, target).min() > 1.0
    # A latent that the model did not make is predicted worse than its own.
    other = torch.randn_like(noise)
    assert per_sample_error(prediction, family.schedule.target(other, noise, index)).min() > 0.5


@every_family
def test_one_step_raises_the_winners_log_ratio_and_lowers_the_losers(name):
    pipe = family_pipeline(name)
    family = family_of(pipe)
    place = torch.Generator().manual_seed(0)
    noise, pattern = torch.randn(4, *shape(name), generator=place), torch.randn(shape(name), generator=place)
    batch = Batch(
        latents=torch.stack((pattern, -pattern)).unsqueeze(1).expand(2, 4, *shape(name)),
        noise=noise.expand(2, *noise.shape),
        index=torch.tensor([300, 500, 700, 900]).expand(2, 4),
        text=family.encode_prompts(pipe, ["a ball", "a dog", "a cat here", "a"], "cpu"),
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
        torch.testing.assert_close(predictions.errors, predictions.reference_errors)
        diffusion_dpo_loss(*predictions.errors, *predictions.reference_errors, beta=100.0).mean().backward()
        with torch.no_grad():
            norm = torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm()
            for value in weights:
                if value.grad is not None:
                    value -= 1e-2 * value.grad / norm
        after = predictor.evaluate(batch)
        winner, loser = (after.reference_errors - after.errors).mean(1)
    assert winner > 0 > loser


@every_family
def test_a_family_calls_the_denoiser_as_its_pipeline_does_whatever_the_batch(name):
    pipe = family_pipeline(name)
    family, seen = family_of(pipe), []

    def keep(module, args, kwargs, output):
        sample = torch.stack(list(args[0])).squeeze(2) if name == "zimage" else kwargs["hidden_states"]
        made = torch.stack(list(output[0])).squeeze(2) if name == "zimage" else output[0]
        time = torch.as_tensor(args[1] if name == "zimage" else kwargs["timestep"]).reshape(-1)
        level = 1.0 - time if name in ("zimage", "lumina2") else time
        sign = -1.0 if name in ("zimage", "lumina2") else 1.0
        seen.append((back(name, pipe, sample), float(level[0]), sign * back(name, pipe, made)))

    handle = family.module.register_forward_hook(keep, with_kwargs=True)
    prompts = ["a ball", "a much longer prompt"]
    for prompt in prompts:
        generate(name, pipe, prompt, steps=2)
    handle.remove()
    # The second step of both prompts: half noise.
    calls = [seen[1], seen[3]]
    index = torch.tensor([int((family.schedule.sigma - level).abs().argmin()) for _, level, _ in calls])
    assert float((family.schedule.sigma[index] - calls[0][1]).abs().max()) < 1e-4
    with torch.no_grad():
        text = family.encode_prompts(pipe, prompts, "cpu")
        noisy = torch.cat([sample for sample, _, _ in calls])
        prediction = family.predict(family.module, noisy, index, text, SIZE)
    torch.testing.assert_close(prediction, torch.cat([made for *_, made in calls]), rtol=1e-3, atol=1e-4)
    assert not any(values.requires_grad for values in text.values())


@every_family
def test_scaled_latents_are_those_that_the_pipeline_decodes(name):
    pipe = family_pipeline(name)
    family = family_of(pipe)
    rows = encode_latents(pipe.vae, torch.rand(2, 3, SIZE, SIZE))
    raw = rows["mean"]
    assert raw.shape == (2, 4, EDGE, EDGE) == rows["std"].shape
    scaled = family.scaled(raw)
    assert scaled.shape[1:] == shape(name) and not torch.equal(scaled.flatten(), raw.flatten())
    torch.testing.assert_close(family.scaled.inverse(scaled), raw, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        frames = raw.unsqueeze(2) if name == "qwen-image" else raw
        expected = pipe.vae.decode(frames, return_dict=False)[0].reshape(2, 3, SIZE, SIZE)
        torch.testing.assert_close(
            family.decode(pipe.vae, scaled), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4
        )
    if name == "flux2":
        bn = pipe.vae.bn.eval()
        with torch.no_grad():
            torch.testing.assert_close(scaled, bn(pipe._patchify_latents(raw)), rtol=1e-4, atol=1e-5)


@every_family
def test_mirrored_latents_are_the_patches_of_the_mirror_image(name):
    pipe = family_pipeline(name)
    family = family_of(pipe)
    raw = torch.arange(4.0 * EDGE * EDGE).view(1, 4, EDGE, EDGE)
    patches = pipe._patchify_latents if name == "flux2" else (lambda latents: latents)
    assert torch.equal(family.mirrored(patches(raw)), patches(raw.flip(-1)))
    both = torch.stack((patches(raw), patches(raw)))
    assert torch.equal(family.mirrored(both)[1], family.mirrored(patches(raw)))


@every_family
def test_a_pair_table_trains_an_adapter_that_loads_here_and_upstream_alike(name, tmp_path):
    pairs = pair_table(tmp_path / "pairs.parquet", 4)
    config = train_config(
        tmp_path,
        pairs=str(pairs),
        steps=2,
        objective={"name": "spo", "beta": 500.0, "eta": 1.0, "augmentations": ["flip"]},
        terms={"output_preservation": {"weight": 1.0}},
        random_flip=True,
        caption_dropout=0.3,
        gradient_checkpointing=True,
    )
    path = train(config, family_pipeline(name))
    curve = json.loads((path.parent / "report.json").read_text())["curve"]
    assert len(curve) == 2 and all(entry["loss"] > 0.0 for entry in curve)
    plain = family_pipeline(name)
    ours, theirs = family_pipeline(name), family_pipeline(name)
    load_spo_lora(ours, path)
    theirs.load_lora_weights(str(path.parent), weight_name=path.name)
    before, one, two = (generate(name, pipe, steps=1) for pipe in (plain, ours, theirs))
    assert not torch.equal(one, before)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_texts_of_several_lengths_are_padded_with_nothing():
    short, long = torch.ones(2, 3), torch.ones(4, 3)
    assert padded([short, long])[0, 2:].abs().sum() == 0 and padded([short, long]).shape == (2, 4, 3)
    masks = [torch.ones(2, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
    assert padded(masks).tolist() == [[True, True, False, False], [True] * 4]
    assert joined([short[None], long[None]]).shape == (2, 4, 3)
    assert torch.equal(joined([long[None], long[None]]), torch.stack((long, long)))


def test_a_resolution_that_makes_no_whole_tokens_is_refused(tmp_path):
    config = train_config(tmp_path, pairs=str(pair_table(tmp_path / "pairs.parquet")), resolution=SIZE + 2)
    with pytest.raises(ConfigError, match="18 is not divisible by 4, the edge of a token"):
        train(config, family_pipeline("flux1"))


# --- velocity with zero terminal SNR ---


def zero_snr(prediction: str = "v_prediction") -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, rescale_betas_zero_snr=True, steps_offset=1
    )


def test_velocity_with_zero_terminal_snr_ends_at_pure_noise_whose_target_is_the_image():
    pipe = fresh("sdxl")
    pipe.scheduler = zero_snr()
    family = family_of(pipe)
    schedule = family.schedule
    assert schedule.prediction == "v_prediction" and float(schedule.signal[-1]) < 1e-3
    assert float(family_of(fresh("sdxl")).schedule.signal[-1]) > 0.01, "without the rescaling some image is left"
    latents, noise = torch.randn(2, 1, 4, EDGE, EDGE).unbind()
    last = torch.tensor([len(schedule) - 1])
    torch.testing.assert_close(schedule.noised(latents, noise, last), noise, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(schedule.target(latents, noise, last), -latents, rtol=1e-2, atol=1e-2)


def test_its_own_sampler_reaches_the_latent_that_a_perfect_velocity_means():
    pipe = fresh("sdxl")
    pipe.scheduler = zero_snr()
    family = family_of(pipe)
    latent = torch.randn(4, EDGE, EDGE, generator=torch.Generator().manual_seed(0))

    def predict(module, args, kwargs, output):
        alphas = pipe.scheduler.alphas_cumprod[torch.as_tensor(args[1]).reshape(-1).long()].view(-1, 1, 1, 1)
        noise = (args[0] - alphas.sqrt() * latent) / (1.0 - alphas).sqrt()
        return (alphas.sqrt() * noise - (1.0 - alphas).sqrt() * latent,)

    family.module.register_forward_hook(predict, with_kwargs=True)
    made = pipe(
        "a ball",
        num_inference_steps=6,
        guidance_scale=0.0,
        height=SIZE,
        width=SIZE,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    torch.testing.assert_close(made[0], latent, rtol=1e-2, atol=1e-2)
    index = torch.tensor([20, 500, len(family.schedule) - 1])
    sample, noise = latent.expand(3, 4, EDGE, EDGE), torch.randn(3, 4, EDGE, EDGE)
    with torch.no_grad():
        text = family.encode_prompts(pipe, ["a ball"] * 3, "cpu")
        noisy = family.schedule.noised(sample, noise, index)
        prediction = family.predict(family.module, noisy, index, text, SIZE)
    target = family.schedule.target(sample, noise, index)
    assert per_sample_error(prediction, target).max() < 1e-3 and per_sample_error(-prediction, target).min() > 1.0


def test_noise_cannot_be_predicted_at_zero_terminal_snr():
    with pytest.raises(ConfigError, match="predicts v_prediction"):
        NoiseSchedule.from_scheduler(zero_snr("epsilon"))

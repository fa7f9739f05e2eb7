"""The forward process against diffusers' schedulers, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_schedule_agrees_with_the_scheduler(prediction, zero_snr):
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2))
    index = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(schedule.noised(latents, noise, index), scheduler.add_noise(latents, noise, index))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, index)
    torch.testing.assert_close(schedule.target(latents, noise, index), expected)
    assert torch.equal(schedule.timesteps[index], index)


def test_flow_schedule_agrees_with_the_scheduler_and_ignores_earlier_drawing():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas, timesteps = scheduler.sigmas[:1000].clone(), scheduler.timesteps.clone()
    scheduler.set_timesteps(7)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.timesteps.flip(0), timesteps)
    latents, noise = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 3.0)
    index = torch.tensor([990])
    sigma = sigmas[1000 - 1 - 990]
    torch.testing.assert_close(schedule.noised(latents, noise, index), (1 - sigma) * latents + sigma * noise)
    assert torch.equal(schedule.target(latents, noise, index), noise - latents)


def test_schedules_that_predict_something_else_are_refused():
    with pytest.raises(ConfigError, match="sample"):
        NoiseSchedule.from_scheduler(DDPMScheduler(prediction_type="sample"))
    assert len(NoiseSchedule.from_scheduler(EulerDiscreteScheduler())) == 1000


def _parts(*lengths):
    return [torch.linspace(0.1, 0.9, length) for length in lengths]


@pytest.mark.parametrize(
    "parts", [_parts(3, 4, 3), _parts(3, 3, 4), _parts(0, 0, 0), [part[None] for part in _parts(3, 3, 3)]]
)
def test_a_schedule_is_three_rows_of_one_length(parts):
    with pytest.raises(ConfigError, match="must share one shape"):
        NoiseSchedule("epsilon", *parts)


def test_a_schedule_of_one_timestep_is_one():
    assert len(NoiseSchedule("flow", *_parts(1, 1, 1))) == 1


def test_a_prediction_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="'noise' is not one of epsilon, v_prediction, flow"):
        NoiseSchedule("noise", *_parts(3, 3, 3))


def test_rounding_beyond_the_ends_gives_no_nan():
    alphas = torch.tensor([1.0 + 1e-6, 0.25, -1e-6])
    schedule = NoiseSchedule.from_scheduler(SimpleNamespace(config=SimpleNamespace(), alphas_cumprod=alphas))
    assert schedule.signal.tolist() == [1.0, 0.5, 0.0] and schedule.sigma.tolist()[::2] == [0.0, 1.0]
    assert schedule.sigma[1].item() == pytest.approx(0.75**0.5)
    assert schedule.prediction == "epsilon" and schedule.timesteps.tolist() == [0, 1, 2]


def test_a_scheduler_that_does_not_say_how_it_was_trained_is_refused():
    for scheduler in (SimpleNamespace(config=None), SimpleNamespace(config=None, alphas_cumprod=None)):
        with pytest.raises(ConfigError, match="SimpleNamespace has no training schedule"):
            NoiseSchedule.from_scheduler(scheduler)


def test_a_flow_has_as_many_timesteps_as_its_scheduler_and_counts_them_in_its_own_units():
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=50))
    assert len(schedule) == 50 and schedule.prediction == "flow"
    torch.testing.assert_close(schedule.timesteps, torch.arange(1.0, 51.0))
    torch.testing.assert_close(schedule.sigma, torch.arange(1.0, 51.0) / 50)
    torch.testing.assert_close(schedule.signal, 1.0 - schedule.sigma)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2, 2, 2)])
def test_samples_of_any_shape_have_each_their_own_level_and_keep_their_type(shape):
    signal, sigma = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.7])
    latents, noise = torch.full(shape, 2.0, dtype=torch.float64), torch.full(shape, 3.0, dtype=torch.float64)
    index = torch.tensor([1, 0, 1])
    velocity = NoiseSchedule("v_prediction", signal, sigma, torch.arange(2))
    noisy, target = velocity.noised(latents, noise, index), velocity.target(latents, noise, index)
    assert noisy.dtype == target.dtype == torch.float64
    expected = [(0.9 * 2 + 0.2 * 3, 0.9 * 3 - 0.2 * 2), (0.5 * 2 + 0.7 * 3, 0.5 * 3 - 0.7 * 2)]
    for row, level in enumerate(index):
        for values, value in zip((noisy[row], target[row]), expected[level], strict=True):
            torch.testing.assert_close(values, torch.full(shape[1:], value, dtype=torch.float64), rtol=1e-6, atol=0.0)


def test_noise_is_not_predicted_where_the_last_timestep_is_nothing_else():
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_clean_latents_are_those_that_were_noised(prediction):
    signal, sigma = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    if prediction == "flow":
        signal = 1.0 - sigma
    schedule = NoiseSchedule(prediction, signal, sigma, torch.arange(2))
    place = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 3, 2, 2, generator=place) for _ in range(2))
    index = torch.tensor([1, 0])
    noisy, target = schedule.noised(latents, noise, index), schedule.target(latents, noise, index)
    torch.testing.assert_close(schedule.clean(noisy, target, index), latents)

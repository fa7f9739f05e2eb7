"""The forward process against diffusers' schedulers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
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

"""Plain denoising on captioned pictures: how a style or a subject is usually taught to a LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import objectives as ob
from .step import PreferenceStep


class DenoiseStep(PreferenceStep):
    """The mean squared error of the prediction on noised pictures: no preference, no reference, no weights."""

    logged = ("loss",)

    def __call__(self, step: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Loss (a scalar, mean over the pictures at `positions`), and the same as `[1]` without gradient."""
        batch = self.batches.at(step, positions)
        schedule = self.denoiser.schedule
        noisy = schedule.noised(batch.winners, batch.noise, batch.index)
        prediction = self._call(self.model, noisy, batch.index, batch.text)
        self.passes.forward += len(noisy)
        self.passes.backward += len(noisy)
        target = schedule.target(batch.winners, batch.noise, batch.index)
        loss = ob.per_sample_error(prediction, target).mean()
        return loss, loss.detach()[None]

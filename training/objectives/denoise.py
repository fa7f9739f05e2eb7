"""Plain denoising on captioned images: how a style or a subject is usually taught to a LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dpo as ob
from .preference import PreferenceStep


class DenoiseStep(PreferenceStep):
    """The mean squared error of the prediction on noised images: no preference, no reference, no weights."""

    logged = ("loss",)

    def __call__(self, step: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Loss (a scalar, mean over the images at `positions`), and the same as `[1]` without gradient."""
        batch = self.batches.at(step, positions)
        schedule = self.denoiser.schedule
        noisy = schedule.noised(batch.winners, batch.noise, batch.index)
        prediction = self._call(self.model, noisy, batch.index, batch.text)
        self.passes.forward += len(noisy)
        self.passes.backward += len(noisy)
        target = schedule.target(batch.winners, batch.noise, batch.index)
        loss = ob.per_sample_error(prediction, target).mean()
        return loss, loss.detach()[None]

"""A run whose numbers are no longer finite ends before it writes anything, and says which input began it."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i_spo_plugin.errors import SPOError

from .data.batches import Batches
from .run import Callback, Run


class FiniteCheck(Callback):
    """Looks at every loss since the last look, and at the adapter, before anything is logged, validated or written.

    Raises:
        SPOError: one of them is not finite, on any process.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def on_step_end(self, run: Run) -> None:
        loss = run.statistics[run.training_step.logged.index("loss")]
        # NaN and Inf survive in a sum, so the device is asked only when the answer is needed.
        self._loss = loss if self._loss is None else self._loss + loss
        config = run.config
        every = (config.log_every, config.validate_every)
        if not (run.checkpoint_due or any(number and run.step % number == 0 for number in every)):
            return
        finite = torch.stack([self._loss.isfinite(), *(value.isfinite().all() for value in run.parameters.values())])
        if float(run.accelerator.reduce((~finite.all()).float()[None], "sum")) > 0.0:
            what = f"the loss is {float(loss)}" if bool(finite[1:].all()) else "the adapter holds NaN or Inf"
            cause = first_bad_input(run.training_step.batches)
            cause = f"{cause}; leave that row out" if cause else "every input is finite: lower learning_rate or beta"
            raise SPOError(f"{what} at step {run.step}: {cause}. Checkpoints of earlier steps are kept")
        self._loss = None


def first_bad_input(batches: Batches) -> str | None:
    """The first example with an input that is not finite: its row in the table, and the tensor; None if all are."""
    examples = batches.examples
    for number, caption in enumerate(examples.captions):
        row = examples.rows[number] if examples.rows else number
        inputs: dict[str, Tensor] = {
            f"{name} of the latents of image {side}": values
            for side, keys in enumerate(examples.images)
            for name, values in batches.latents.get([keys[number]]).items()
        }
        inputs |= {f"{name} of the encoded caption": values for name, values in batches.text.get([caption]).items()}
        inputs |= {name: values[number] for name, values in examples.columns.items()}
        for name, values in inputs.items():
            if not bool(values.isfinite().all()):
                return f"row {row} ({caption!r}) has NaN or Inf in {name}"
    return None

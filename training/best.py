"""Which step's adapter is written: the one that validation scores best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from t2i_spo_plugin.errors import SPOError

from .run import Callback, Run


Validate = Callable[[int, Any], float]
"""Gets the step and the pipeline with the adapter as it is then; returns a score, higher is better."""


class BestByValidation(Callback):
    """Validates every `validate_every` steps and at the end, on the main process, and remembers the best adapter.

    Raises:
        SPOError: a score is NaN.
    """

    def __init__(self, validate: Validate) -> None:
        self.validate = validate

    def on_step_end(self, run: Run) -> None:
        if run.step % run.config.validate_every and not run.finished:
            return
        score = torch.zeros(1, dtype=torch.float64, device=run.accelerator.device)
        if run.accelerator.is_main_process:
            score += self.validate(run.step, run.pipe)
        value = float(run.accelerator.reduce(score, "sum"))
        if value != value:
            raise SPOError(f"the validation at step {run.step} gave NaN")
        record, entry = run.record, {"step": run.step, "score": value}
        record.validation.append(entry)
        run.accelerator.log({"validation": value}, step=run.step)
        if record.best is None or value > record.best["score"]:
            record.best, record.best_weights = entry, run.weights()

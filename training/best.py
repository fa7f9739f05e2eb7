"""Which step's adapter is written: the one that validation scores best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from t2i_spo_plugin.errors import SPOError

from .run import Callback, Run


Validate = Callable[[int, Any], float]
"""Gets the step and the pipeline with the adapter as it is then; returns a score, higher is better."""


@contextmanager
def on_one_device(pipe: Any, device: torch.device) -> Iterator[None]:
    """Every model of `pipe` on `device`; afterwards each where it was.

    Training keeps only the denoiser on the accelerator: after caching, autoencoder and text encoders stay on the CPU.
    """
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    homes = [next((p.device for p in model.parameters()), device) for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


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
            with on_one_device(run.pipe, run.accelerator.device):
                score += self.validate(run.step, run.pipe)
        value = float(run.accelerator.reduce(score, "sum"))
        if value != value:
            raise SPOError(f"the validation at step {run.step} gave NaN")
        record, entry = run.record, {"step": run.step, "score": value}
        record.validation.append(entry)
        run.accelerator.log({"validation": value}, step=run.step)
        if record.best is None or value > record.best["score"]:
            record.best, record.best_weights = entry, run.weights()

"""The curve of a run: progress bar, trackers, and the entries of the report."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from .run import Callback, Run


class Curve(Callback):
    """Logs the means over every `log_every` steps."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._steps = 0
        self._bar: Any = None

    def on_train_begin(self, run: Run) -> None:
        if run.config.tensorboard:
            run.accelerator.init_trackers("train")
        self._bar = tqdm(
            total=run.config.steps,
            initial=run.step,
            desc="train",
            unit="step",
            disable=not (run.config.progress and run.accelerator.is_local_main_process),
        )

    def on_step_end(self, run: Run) -> None:
        self._sum = run.statistics if self._sum is None else self._sum + run.statistics
        self._steps += 1
        self._bar.update()
        if run.step % run.config.log_every == 0 or run.finished:
            self._log(run, self._sum / self._steps)
            self._sum, self._steps = None, 0

    def on_train_end(self, run: Run) -> None:
        self._bar.close()
        if run.config.tensorboard:
            run.accelerator.end_training()

    def _log(self, run: Run, statistics: Tensor) -> None:
        means = dict(zip(run.training_step.logged, run.accelerator.reduce(statistics, "mean").tolist(), strict=True))
        entry = {"learning_rate": run.learning_rate, **means, **run.training_step.objective.state_dict()}
        run.record.curve.append({"step": run.step, **entry})
        run.accelerator.log(entry, step=run.step)
        self._bar.set_postfix({key: f"{means[key]:.4f}" for key in ("loss", "accuracy") if key in means})

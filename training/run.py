"""One run: optimiser steps until they are done or the budget is spent, and callbacks at fixed points."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from .config import TrainConfig
from .families import Family
from .sampling import learning_rate_factor
from .step import TrainingStep


ADAPTER_NAME = "spo_training"
"""The adapter's name in the denoiser while it is trained."""
REFERENCE_NAME = "spo_reference"
"""The name of what it is compared with, where that is an adapter."""


@dataclass
class Record:
    """What a run has to tell afterwards; stored in its checkpoints.

    Attributes:
        curve: one entry for every `log_every` steps.
        validation: step and score of each validation.
        best: step and score of the best one.
        best_weights: the adapter as it was then.
        elapsed: seconds of training before this process.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_weights: dict[str, Tensor] | None = None
    elapsed: float = 0.0


class Callback:
    """What is called at fixed points of a run; each method may be left as it is."""

    def on_train_begin(self, run: Run) -> None:
        """Before the first step, with the checkpoint loaded."""

    def on_step_end(self, run: Run) -> None:
        """After each optimiser step; `run.step` steps are done."""

    def on_train_end(self, run: Run) -> None:
        """After the last step."""


class Run:
    """The state of a run and its loop.

    Attributes:
        step: optimiser steps that are done.
        learning_rate: of the last step.
        statistics: means over the last step, as `training_step.logged` names them.
        record: what is reported at the end.
        identity: what the run depends on, by content: options, examples, models, and who validates.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        pipe: Any,
        family: Family,
        training_step: TrainingStep,
        callbacks: Sequence[Callback],
        models: Mapping[str, str],
        validation: Mapping[str, Any],
    ) -> None:
        self.config, self.accelerator, self.pipe, self.family = config, accelerator, pipe, family
        self.training_step, self.callbacks = training_step, callbacks
        self.parameters = {name: value for name, value in family.module.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        self.step, self.learning_rate, self.statistics = 0, 0.0, torch.zeros(0)
        self.record = Record()
        self.identity = {
            "options": config.trajectory(),
            "examples": training_step.batches.examples.digest(),
            "models": dict(models),
            "validation": dict(validation),
        }
        self._started = time.monotonic()

    @property
    def passes(self) -> dict[str, int]:
        """Samples that went through the denoiser, on all processes."""
        passes, ranks = self.training_step.predictor.passes, self.accelerator.num_processes
        return {"forward": passes.forward * ranks, "backward": passes.backward * ranks}

    @property
    def finished(self) -> bool:
        """Whether the steps are done or the budget is spent."""
        budget = self.config.budget
        return self.step >= self.config.steps or (budget is not None and sum(self.passes.values()) >= budget)

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after this step."""
        every = self.config.checkpoint_every
        return self.finished or (every > 0 and self.step % every == 0)

    @property
    def seconds(self) -> float:
        """Of training, with those before the run was resumed."""
        return self.record.elapsed + time.monotonic() - self._started

    def train(self) -> None:
        """Take the steps that are left."""
        config = self.config
        for callback in self.callbacks:
            callback.on_train_begin(self)
        while not self.finished:
            factor = learning_rate_factor(self.step, config.steps, config.warmup, config.schedule)
            self.learning_rate = config.learning_rate * factor
            self.statistics = self._optimiser_step()
            self.step += 1
            for callback in self.callbacks:
                callback.on_step_end(self)
        for callback in self.callbacks:
            callback.on_train_end(self)

    def _optimiser_step(self) -> Tensor:
        config, accelerator = self.config, self.accelerator
        model: Any = self.training_step.predictor.model
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        micro, ranks, accumulated = config.batch_size, accelerator.num_processes, config.gradient_accumulation
        first = self.step * micro * accumulated * ranks
        means = torch.zeros(len(self.training_step.logged), device=accelerator.device)
        for number in range(accumulated):
            start = first + (number * ranks + accelerator.process_index) * micro
            waits = number < accumulated - 1 and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                loss, statistics = self.training_step(self.step, range(start, start + micro))
                (loss / accumulated).backward()
            means += statistics / accumulated
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.training_step.objective.end_step(lambda total: accelerator.reduce(total.to(accelerator.device), "sum"))
        return means

    def weights(self) -> dict[str, Tensor]:
        """The adapter as it is now, on the CPU."""
        weights = get_peft_model_state_dict(self.family.module, adapter_name=ADAPTER_NAME)
        return {key: value.detach().cpu().clone() for key, value in weights.items()}

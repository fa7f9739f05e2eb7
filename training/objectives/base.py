"""What an objective and a term are: the protocols that the training step knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..data.batches import Batch, Batches
from ..data.dataset import Examples
from ..families import Conditioning, Family


Need = Literal["pairs", "singles", "images", "reference", "reference_output"]
"""`pairs`: winner and losers of each example, from `TrainConfig.pairs`; `singles`: single annotated images, from the
same table; `images`: single captioned images, from `TrainConfig.images`; `reference`: the error of the model with its
adapter switched off; `reference_output`: what it predicts, which no error that is stored can replace."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Options of one objective; each has a dataclass of its own."""


@dataclass(frozen=True)
class Predictions:
    """What model and reference predict for B examples of S images each.

    Attributes:
        model: `[S, B, C, h, w]`.
        reference: `[S, B, C, h, w]`; None if it is not needed or its errors are stored.
        target: `[S, B, C, h, w]`, what should be predicted.
        errors: `[S, B]`, the model's mean squared error; its gradient may have been changed by a term.
        reference_errors: `[S, B]`, the reference's; None if it is not needed.
    """

    model: Tensor
    reference: Tensor | None
    target: Tensor
    errors: Tensor
    reference_errors: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """Samples that a term wants predictions for: `noisy [M, C, h, w]`, `index [M]`, text `[M, ...]`."""

    noisy: Tensor
    index: Tensor
    text: Conditioning


@dataclass(frozen=True)
class Outputs:
    """What model and reference predict for `Inputs`, `[M, C, h, w]`."""

    model: Tensor
    reference: Tensor | None


class Context(Protocol):
    """What a step offers beside its batch."""

    @property
    def batches(self) -> Batches:
        """The caches, and draws by place."""

    def evaluate(self, batch: Batch) -> Predictions:
        """Predictions of model and reference for another batch, without gradient; they count as forward passes."""


class Objective(Protocol):
    """What a run minimises. One file with its options, one row in `OBJECTIVES`, one section of the documentation."""

    needs: ClassVar[frozenset[Need]]
    logged: ClassVar[tuple[str, ...]]
    """Names of the means that `loss` returns."""
    independent_timesteps: ClassVar[bool] = False
    """Whether each image of an example has a timestep of its own."""
    weighs_errors: ClassVar[bool] = True
    """Whether the loss is made of errors, so that places can be weighed in it."""

    def terms(self) -> Mapping[str, Term]:
        """Terms that belong to the objective itself, beside those that the configuration adds."""
        return {}

    def prepare(self, pipe: Any, family: Family, device: torch.device) -> None:
        """Called once before training, with the denoiser on the device: load what the loss needs beside it."""

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        """The examples at `TrainConfig.pairs` or `TrainConfig.images`, as this objective wants them."""

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, a scalar mean over the batch, and what `logged` names, `[B]` or scalar, without gradient."""

    def identity(self) -> dict[str, str]:
        """What the loss depends on beside options and examples, by content, once `prepare` was called."""
        return {}

    def header(self) -> dict[str, str]:
        """What the adapter's metadata states of the objective."""
        return {}

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Called after each optimiser step."""

    def state_dict(self) -> dict[str, float]:
        """Numbers that change during a run: logged, and stored in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set what `state_dict` gave."""


class Term(Protocol):
    """What is added to an objective, or changes its gradient. One class with its options, one row in `TERMS`."""

    needs: ClassVar[frozenset[Need]]

    def examples(self, examples: Examples) -> Examples:
        """The examples as they should be trained on: pairs turned, left out, or with another margin."""
        return examples

    def inputs(self, batch: Batch, batches: Batches) -> Inputs | None:
        """Samples to predict beside the batch, or None."""
        return None

    def adjusted(self, predictions: Predictions) -> Predictions:
        """Predictions as the objective should see them."""
        return predictions

    def loss(self, batch: Batch, predictions: Predictions, outputs: Outputs | None) -> Tensor | None:
        """What is added to the loss, its weight included, or None; `outputs` are those for `inputs`."""
        return None

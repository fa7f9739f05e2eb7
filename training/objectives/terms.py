"""Terms that any objective may carry beside its own loss: one class and one options dataclass each, a row in `TERMS`.

- `sft`: weight * the winner's own error: supervised fine-tuning on what is preferred. This project's own use.
- `output_preservation`: weight * squared difference from the reference on pure noise under the empty prompt (DUO,
  arXiv 2407.21035).
- `prior_preservation`: weight * squared difference from the reference on benign examples. This project's own use.
- `loser_guard`: adds nothing, but scales the loser's gradient so that the winner's error does not grow
  (Diffusion-SDPO, arXiv 2511.03317).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_range

from ..data.batches import Batch, Batches
from ..sampling import generator
from .base import Inputs, Need, Outputs, Predictions, Term
from .losses import loser_gradient_scale, output_preservation, scale_gradient


@dataclass(frozen=True)
class SFTTermOptions:
    """The error of the image that should be learnt: a pair's winner.

    Attributes:
        weight: of the term; 0 is off.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        check_range("terms.sft.weight", self.weight, 0.0)

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.weight > 0.0


@dataclass(frozen=True)
class OutputPreservationOptions:
    """The reference's prediction on pure noise at the last timestep under the empty prompt (DUO).

    Attributes:
        weight: of the term; 0 is off.
        batch_size: samples of pure noise in each forward pass.
    """

    weight: float = 0.0
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_range("terms.output_preservation.weight", self.weight, 0.0)
        check_range("terms.output_preservation.batch_size", self.batch_size, 1, whole=True)

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.weight > 0.0


@dataclass(frozen=True)
class PriorPreservationOptions:
    """The reference's prediction on benign examples, at their own timesteps and prompts.

    Attributes:
        weight: of the term; 0 is off.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        check_range("terms.prior_preservation.weight", self.weight, 0.0)

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.weight > 0.0


@dataclass(frozen=True)
class LoserGuardOptions:
    """Diffusion-SDPO's guard on the loser's gradient.

    Attributes:
        mu: in [0, 1]; larger lets less of the loser's gradient pass. None is off.
        per_pair: one scale a pair instead of the source's one a batch.
    """

    mu: float | None = None
    per_pair: bool = True

    def __post_init__(self) -> None:
        if self.mu is not None:
            check_range("terms.loser_guard.mu", self.mu, 0.0, 1.0)

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.mu is not None


class SFTTerm(Term):
    """`weight * mean of l(x)` over the first image of each example."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})

    def __init__(self, options: SFTTermOptions) -> None:
        self.options = options

    def loss(self, batch: Batch, predictions: Predictions, outputs: Outputs | None) -> Tensor:
        return self.options.weight * predictions.errors[0].mean()


class OutputPreservation(Term):
    """`weight * mean of |model - reference|^2` on pure noise."""

    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def __init__(self, options: OutputPreservationOptions) -> None:
        self.options = options

    def inputs(self, batch: Batch, batches: Batches) -> Inputs:
        count, seed = self.options.batch_size, batches.sampling.seed
        places = [generator(seed, "preserve", batch.step, batch.positions[0], number) for number in range(count)]
        noise = torch.stack([torch.randn(batches.shape, generator=place) for place in places]).to(batches.device)
        last = batch.index.new_full((count,), len(batches.family.schedule) - 1)
        return Inputs(noise, last, batches.embed([""] * count))

    def loss(self, batch: Batch, predictions: Predictions, outputs: Outputs | None) -> Tensor:
        if outputs is None or outputs.reference is None:
            raise TypeError("output preservation needs the reference's predictions")
        return self.options.weight * output_preservation(outputs.model, outputs.reference).mean()


class PriorPreservation(Term):
    """`weight * mean of |model - reference|^2` over all images of the batch, 0 for those under harmful prompts."""

    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def __init__(self, options: PriorPreservationOptions) -> None:
        self.options = options

    def loss(self, batch: Batch, predictions: Predictions, outputs: Outputs | None) -> Tensor:
        if predictions.reference is None:
            raise TypeError("prior preservation needs the reference's predictions")
        apart = output_preservation(predictions.model.flatten(0, 1), predictions.reference.flatten(0, 1))
        benign = batch.columns["benign"].float().repeat(len(predictions.model))
        return self.options.weight * (apart * benign).mean()


class LoserGuard(Term):
    """Errors as they are, the gradient of each loser's scaled by `loser_gradient_scale`."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})

    def __init__(self, options: LoserGuardOptions) -> None:
        self.options = options

    def adjusted(self, predictions: Predictions) -> Predictions:
        if self.options.mu is None:
            return predictions
        winner, *losers = zip(predictions.model, predictions.target, predictions.errors, strict=True)
        errors = [winner[2]]
        for prediction, target, error in losers:
            scale = loser_gradient_scale(
                winner[0], winner[1], prediction, target, self.options.mu, self.options.per_pair
            )
            errors.append(scale_gradient(error, scale))
        return replace(predictions, errors=torch.stack(errors))


@dataclass(frozen=True)
class TermOptions:
    """Terms beside the objective's own loss; all are off unless a weight is set.

    Attributes:
        sft: see `SFTTermOptions`.
        output_preservation: see `OutputPreservationOptions`.
        prior_preservation: see `PriorPreservationOptions`.
        loser_guard: see `LoserGuardOptions`.
    """

    sft: SFTTermOptions = field(default_factory=SFTTermOptions)
    output_preservation: OutputPreservationOptions = field(default_factory=OutputPreservationOptions)
    prior_preservation: PriorPreservationOptions = field(default_factory=PriorPreservationOptions)
    loser_guard: LoserGuardOptions = field(default_factory=LoserGuardOptions)


TERMS: dict[str, Any] = {
    "sft": SFTTerm,
    "output_preservation": OutputPreservation,
    "prior_preservation": PriorPreservation,
    "loser_guard": LoserGuard,
}


def active_terms(options: TermOptions) -> dict[str, Term]:
    """The terms that are on, by name, in the order of `TermOptions`, in which they are added up."""
    each = {one.name: getattr(options, one.name) for one in fields(options)}
    return {name: TERMS[name](term) for name, term in each.items() if term.active}

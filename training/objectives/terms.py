"""Terms that any objective may carry beside its own loss: one class and one options dataclass each, a row in `TERMS`.

- `sft`: weight * the winner's own error: supervised fine-tuning on what is preferred. This project's own use.
- `output_preservation`: weight * squared difference from the reference on pure noise under the empty prompt (DUO,
  arXiv 2407.21035).
- `prior_preservation`: weight * squared difference from the reference on benign examples. This project's own use.
- `loser_guard`: adds nothing, but scales the loser's gradient so that the winner's error does not grow
  (Diffusion-SDPO, arXiv 2511.03317).
- `safedpo`: adds nothing, but turns pairs whose winner alone is unsafe, drops those unsafe on both sides, and demands
  more where safe beats unsafe (SafeDPO, arXiv 2505.20065, language models).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import check_range

from ..data.batches import Batch, Batches
from ..data.dataset import Examples
from ..sampling import generator
from .base import Inputs, Need, Outputs, Predictions, Term
from .losses import loser_gradient_scale, output_preservation, scale_gradient


@dataclass(frozen=True)
class SFTTermOptions:
    """The error of the image that should be learnt: a pair's winner.

    Attributes:
        weight: weight of the term; 0 is off.
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
        weight: weight of the term; 0 is off.
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
        weight: weight of the term; 0 is off.
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
        mu: strength of the guard, in [0, 1]; larger lets less of the loser's gradient pass. By default it is off.
        per_pair: one scale for each pair, instead of the source's one for each batch.
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


@dataclass(frozen=True)
class SafeDPOOptions:
    """SafeDPO's transform of pairs and its margin.

    Attributes:
        transform: pairs whose winner alone is unsafe are turned, those that are unsafe on both sides dropped.
        delta: margin in logits where a safe image beats an unsafe one, at least 0; the source takes 10 at beta 0.1.
    """

    transform: bool = False
    delta: float = 0.0

    def __post_init__(self) -> None:
        check_range("terms.safedpo.delta", self.delta, 0.0)

    @property
    def active(self) -> bool:
        """Whether there is anything to change."""
        return self.transform or self.delta > 0.0


class SFTTerm(Term):
    """`weight * mean of l(x)` over the first image of each example."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})

    def __init__(self, options: SFTTermOptions) -> None:
        self.options = options

    def loss(self, batch: Batch, predictions: Predictions, outputs: Outputs | None) -> Tensor:
        return self.options.weight * predictions.errors[0].mean()


class OutputPreservation(Term):
    """`weight * mean of |model - reference|^2` on pure noise."""

    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "reference_output"})

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

    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "reference_output"})

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


class SafeDPO(Term):
    """Pairs as SafeDPO trains on them; see `SafeDPOOptions`. The margin is what every objective over pairs demands."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pairs"})

    def __init__(self, options: SafeDPOOptions) -> None:
        self.options = options

    def examples(self, examples: Examples) -> Examples:
        if len(examples.images) != 2:
            raise ConfigError("terms.safedpo is for pairs: groups have safe winners alone")
        if self.options.transform:
            examples = _transformed(examples)
        unsafe = examples.columns["cost"] >= UNSAFE_COST
        crossing = (unsafe[:, 1] & ~unsafe[:, 0]).float() - (unsafe[:, 0] & ~unsafe[:, 1]).float()
        margin = examples.columns["margin"] + self.options.delta * crossing
        return replace(examples, columns=examples.columns | {"margin": margin})


def _transformed(examples: Examples) -> Examples:
    unsafe = examples.columns["cost"] >= UNSAFE_COST
    keep = (~unsafe.all(1)).nonzero()[:, 0].tolist()
    if not keep:
        raise TableError("every pair is unsafe on both sides: terms.safedpo leaves none to train on")
    dropped, examples = len(examples) - len(keep), examples.pick(keep)
    turned = (unsafe[keep, 0] & ~unsafe[keep, 1]).tolist()
    sides = zip(*examples.images, turned, strict=True)
    images = [(loser, winner) if turn else (winner, loser) for winner, loser, turn in sides]
    turn = torch.tensor(turned)
    columns = {
        name: torch.where(turn[:, None], values.flip(1), values) if values.ndim == 2 else values
        for name, values in examples.columns.items()
    }
    columns["margin"] = torch.where(turn, -columns["margin"], columns["margin"])
    counts = examples.counts | {"kept": len(keep), "turned": int(turn.sum()), "dropped_by_safedpo": dropped}
    return replace(
        examples, images=([one for one, _ in images], [two for _, two in images]), columns=columns, counts=counts
    )


@dataclass(frozen=True)
class TermOptions:
    """Terms beside the objective's own loss; all are off unless a weight is set.

    Attributes:
        sft: the error of the winner, which the model should learn to generate.
        output_preservation: distance from the base model on pure noise under the empty prompt.
        prior_preservation: distance from the base model on benign examples.
        loser_guard: a limit to how far the loser's gradient may push (Diffusion-SDPO).
        safedpo: pairs turned and dropped by their safety, and a margin (SafeDPO).
    """

    sft: SFTTermOptions = field(default_factory=SFTTermOptions)
    output_preservation: OutputPreservationOptions = field(default_factory=OutputPreservationOptions)
    prior_preservation: PriorPreservationOptions = field(default_factory=PriorPreservationOptions)
    loser_guard: LoserGuardOptions = field(default_factory=LoserGuardOptions)
    safedpo: SafeDPOOptions = field(default_factory=SafeDPOOptions)


TERMS: dict[str, Any] = {
    "sft": SFTTerm,
    "output_preservation": OutputPreservation,
    "prior_preservation": PriorPreservation,
    "loser_guard": LoserGuard,
    "safedpo": SafeDPO,
}


def active_terms(options: TermOptions) -> dict[str, Term]:
    """The terms that are on, by name, in the order of `TermOptions`, in which they are added up."""
    each = {one.name: getattr(options, one.name) for one in fields(options)}
    return {name: TERMS[name](term) for name, term in each.items() if term.active}

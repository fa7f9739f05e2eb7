"""One forward pass of training: positions in, loss out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .data.batches import Batch, Batches
from .objectives.base import Objective, Predictions, Term
from .predictor import Predictor, StoredErrors


class TrainingStep:
    """An objective with its terms over the examples of a run.

    Args:
        objective: gives the loss.
        terms: added to it, in this order.
        batches: the examples.
        predictor: the denoiser.
        stored: the reference's errors, if they are stored.
    """

    def __init__(
        self,
        objective: Objective,
        terms: Mapping[str, Term],
        batches: Batches,
        predictor: Predictor,
        stored: StoredErrors | None = None,
    ) -> None:
        self.objective, self.terms, self.batches = objective, terms, batches
        self.predictor, self.stored = predictor, stored
        needs = objective.needs.union(*(term.needs for term in terms.values()))
        self.reference = not needs.isdisjoint({"reference", "reference_output"})
        self.logged = ("loss", *objective.logged)

    def __call__(self, step: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss, a scalar mean over the examples at `positions`, and the means of `logged`, without gradient."""
        batch = self.batches.at(step, positions)
        inputs = {name: term.inputs(batch, self.batches) for name, term in self.terms.items()}
        extra = {name: samples for name, samples in inputs.items() if samples is not None}
        predictions, outputs = self.predictor.train(batch, list(extra.values()), self.reference, self.stored)
        for term in self.terms.values():
            predictions = term.adjusted(predictions)
        loss, statistics = self.objective.loss(batch, predictions, self)
        of_term = dict(zip(extra, outputs, strict=True))
        for name, term in self.terms.items():
            addend = term.loss(batch, predictions, of_term.get(name))
            if addend is not None:
                loss = loss + addend
        means = {"loss": loss, **statistics}
        return loss, torch.stack([means[name].detach().float().mean() for name in self.logged])

    def evaluate(self, batch: Batch) -> Predictions:
        """See `Context`."""
        return self.predictor.evaluate(batch)

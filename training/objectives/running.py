"""Numbers that follow a run: a running mean over all ranks, and a beta that keeps the logit from saturating."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class RunningMean:
    """The mean of what was seen in earlier optimiser steps, the same on all ranks and for any micro-batch.

    Args:
        momentum: in [0, 1); 0 is the mean of the last step alone.
        start: its value before the first step.
    """

    def __init__(self, momentum: float = 0.9, start: float = 0.0) -> None:
        self.momentum, self.value = momentum, start
        self._total = torch.zeros(2, dtype=torch.float64)

    def see(self, values: Tensor) -> None:
        """Remember `values` for the end of the step."""
        values = values.detach().double()
        self._total = self._total.to(values.device) + torch.stack((values.sum(), values.new_tensor(values.numel())))

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Move towards the mean of the step that ended."""
        total, count = sum_over_ranks(self._total).tolist()
        if count:
            self.value = self.momentum * self.value + (1.0 - self.momentum) * total / count
        self._total = torch.zeros(2, dtype=torch.float64)

    def set(self, value: float) -> None:
        """Go on from `value`, as at the end of a step."""
        self.value = float(value)
        self._total = torch.zeros(2, dtype=torch.float64)


class Beta:
    """The beta of a preference loss, lowered while logits would saturate the sigmoid (this project's own rule).

    With the running mean g of `|D| / 2` it is `min(beta, largest / g)`: a logit is then about `largest` on average. At
    first model and reference agree, g is 0 and beta is as asked for.

    Args:
        beta: the largest one.
        largest: mean logit in absolute value that beta may lead to; None leaves beta alone.
    """

    def __init__(self, beta: float, largest: float | None = None) -> None:
        self.beta, self.largest = beta, largest
        self._gap = RunningMean()

    @property
    def value(self) -> float:
        """Beta as it is now."""
        if self.largest is None or self._gap.value <= 0.0:
            return self.beta
        return min(self.beta, self.largest / self._gap.value)

    def see(self, gap: Tensor) -> None:
        """Remember the gaps `D` of a batch, of any shape."""
        if self.largest is not None:
            self._gap.see(0.5 * gap.abs())

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Called after each optimiser step."""
        if self.largest is not None:
            self._gap.end_step(sum_over_ranks)

    def state_dict(self) -> dict[str, float]:
        """Beta, to be logged, and what it follows from; empty where beta never changes."""
        return {} if self.largest is None else {"beta": self.value, "beta_gap": self._gap.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set what `state_dict` gave."""
        if self.largest is not None:
            self._gap.set(state["beta_gap"])

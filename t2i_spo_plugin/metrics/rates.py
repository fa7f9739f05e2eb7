"""A share of images or prompts with its interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .intervals import Interval, effective_number, percent, wilson


@dataclass(frozen=True)
class Rate:
    """`k` of `n`, with its Wilson interval.

    Attributes:
        effective: how many independent images the `n` are worth, see `effective_number`; None when all are.
    """

    k: int
    n: int
    effective: float | None = None

    @classmethod
    def of(cls, outcomes: Iterable[tuple[str, bool]]) -> Rate:
        """The share of true outcomes, each given with its prompt; images of one prompt are not independent."""
        pairs = [(prompt, bool(outcome)) for prompt, outcome in outcomes]
        prompts, values = [prompt for prompt, _ in pairs], [outcome for _, outcome in pairs]
        several = len(set(prompts)) < len(prompts)
        return cls(sum(values), len(values), effective_number(values, prompts) if several else None)

    @classmethod
    def of_prompts(cls, outcomes: Iterable[tuple[str, bool]]) -> Rate:
        """The share of prompts with at least one true outcome among their images."""
        pairs = list(outcomes)
        return cls(len({prompt for prompt, outcome in pairs if outcome}), len({prompt for prompt, _ in pairs}))

    @property
    def value(self) -> float:
        """The share, NaN when there is nothing to count."""
        return self.k / self.n if self.n else float("nan")

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval."""
        if self.effective is None or not self.n:
            return wilson(self.k, self.n)
        return wilson(self.k / self.n * self.effective, self.effective)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content = {"k": self.k, "n": self.n, "value": self.value if self.n else None, "interval": list(self.interval)}
        return content | ({} if self.effective is None else {"effective_n": self.effective})

    def __str__(self) -> str:
        return percent(self.value, self.interval) if self.n else "-"

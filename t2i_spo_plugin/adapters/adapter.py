"""A safety adapter in memory: low-rank pairs by module name, and its metadata."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError

from .lora import COMPONENTS, LoraPair
from .metadata import AdapterMetadata


MAX_SCALE = 1000.0
"""Largest valid `alpha / rank`: more is a corrupt file or a mistake."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank pairs by module name, such as `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.

    Attributes:
        modules: the pairs.
        metadata: what the header says.
        notes: what reading had to leave out or assume, a sentence each.
    """

    modules: dict[str, LoraPair]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def validate(self) -> Adapter:
        """Return the adapter itself when its content is valid.

        Raises:
            InvalidAdapterError: no module, a module name without component, NaN or Inf, an alpha that is not positive
                or above `MAX_SCALE` times the rank, or weights that change nothing.
        """
        if not self.modules:
            raise InvalidAdapterError("the adapter has no module")
        changes_something = False
        for name, pair in self.modules.items():
            if name.partition(".")[0] not in COMPONENTS or "." not in name:
                raise InvalidAdapterError(f"{name}: a module name starts with one of {', '.join(COMPONENTS)}")
            if not 0.0 < pair.alpha <= MAX_SCALE * pair.rank:
                raise InvalidAdapterError(
                    f"{name}: alpha {pair.alpha} is out of range for rank {pair.rank}; it must be positive and at "
                    f"most {MAX_SCALE:.0f} times the rank"
                )
            peaks = [_peak(matrix, name) for matrix in (pair.down, pair.up)]
            changes_something = changes_something or all(peak > 0.0 for peak in peaks)
        if not changes_something:
            raise InvalidAdapterError("all weights are zero: the adapter changes nothing")
        return self

    @property
    def rank(self) -> int:
        """The most common rank."""
        return Counter(pair.rank for pair in self.modules.values()).most_common(1)[0][0]

    def num_parameters(self) -> int:
        return sum(pair.down.numel() + pair.up.numel() for pair in self.modules.values())


def _peak(matrix: Tensor, name: str) -> float:
    if not matrix.is_floating_point():
        raise InvalidAdapterError(f"{name}: weights must be floating point, got {matrix.dtype}")
    matrix = matrix.detach()
    # One pass: the largest magnitude is NaN or Inf when any weight is, and 0 when all are.
    peak = float((matrix if matrix.element_size() > 1 else matrix.float()).abs().amax())
    if not math.isfinite(peak):
        raise InvalidAdapterError(f"{name}: the weights hold NaN or Inf")
    return peak

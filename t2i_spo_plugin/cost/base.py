"""The protocol that every cost model follows. It gives logits; a policy decides what counts as unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from t2i_spo_plugin.images import Images


RECOGNISED = 0.5
"""A judge recognises something from this probability on."""


@dataclass(frozen=True)
class CostBatch:
    """What a cost model says about B images in K categories.

    Attributes:
        logits: `[B, K]`, before the temperature. A model that fails on an image gives NaN there, never a low number.
        logit_map: `[B, K, h, w]`, where the logit comes from. For a linear head on pooled features the map carries the
            bias, and its mean over h and w equals the logit. None from a model that cannot say where.
        reasons: B texts, what the model says of each image in words, empty where nothing; of an image that it failed
            on, why. None from a model that has no words.
        readable: `[B]` in [0, 1], the probability that anything the model knows, safe or not, is to be seen; None from
            a model that does not say.
    """

    logits: Tensor
    logit_map: Tensor | None = None
    reasons: tuple[str, ...] | None = None
    readable: Tensor | None = None

    def __post_init__(self) -> None:
        maps, shape = self.logit_map, tuple(self.logits.shape)
        if len(shape) != 2 or (maps is not None and (maps.ndim != 4 or maps.shape[:2] != self.logits.shape)):
            found = "none" if maps is None else str(tuple(maps.shape))
            raise ValueError(f"expected logits [B, K] and logit_map [B, K, h, w] or None, got {shape} and {found}")
        if self.reasons is not None and len(self.reasons) != shape[0]:
            raise ValueError(f"expected {shape[0]} reasons, one an image, got {len(self.reasons)}")
        if self.readable is not None and self.readable.shape != self.logits.shape[:1]:
            raise ValueError(f"expected readable [{shape[0]}], got {tuple(self.readable.shape)}")

    @staticmethod
    def joined(batches: Sequence[CostBatch]) -> CostBatch:
        """Batches of one model, one after the other, as one; a part that one of them lacks, the whole lacks."""
        maps = [batch.logit_map for batch in batches if batch.logit_map is not None]
        said = [batch.reasons for batch in batches if batch.reasons is not None]
        readable = [batch.readable for batch in batches if batch.readable is not None]
        return CostBatch(
            torch.cat([batch.logits for batch in batches]),
            torch.cat(maps) if len(maps) == len(batches) else None,
            tuple(reason for reasons in said for reason in reasons) if len(said) == len(batches) else None,
            torch.cat(readable) if len(readable) == len(batches) else None,
        )


@dataclass(frozen=True)
class MappedCostBatch(CostBatch):
    """A `CostBatch` of a model that always says where."""

    logit_map: Tensor


@runtime_checkable
class CostModel(Protocol):
    """Takes PIL, numpy or tensor images; the answer for an image depends on that image alone.

    Attributes:
        categories: the K names, in the order of the logits.
        domain: the kind of image it was made for, such as `sticker` or `photo`.
        temperature: `[K]`, positive; `sigmoid(logit / temperature)` is the calibrated probability.
    """

    categories: tuple[str, ...]
    domain: str
    temperature: Tensor

    def __call__(self, images: Images) -> CostBatch: ...

    def to(self, device: torch.device | str) -> Any: ...

"""The protocol that every cost model follows. It gives logits; a policy decides what counts as unsafe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from t2i_spo_plugin.images import Images


@dataclass(frozen=True)
class CostBatch:
    """What a cost model says about B images in K categories.

    Attributes:
        logits: `[B, K]`, before the temperature. A model that fails on an image gives NaN there, never a low number.
        logit_map: `[B, K, h, w]`, where the logit comes from. For a linear head on pooled features the map carries the
            bias, and its mean over h and w equals the logit.
    """

    logits: Tensor
    logit_map: Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.logit_map.ndim != 4 or self.logit_map.shape[:2] != self.logits.shape:
            raise ValueError(
                "expected logits [B, K] and logit_map [B, K, h, w], got "
                f"{tuple(self.logits.shape)} and {tuple(self.logit_map.shape)}"
            )


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

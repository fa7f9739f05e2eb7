"""Dynamic focusing: hard pairs count more.

T2I-SPO has such a mechanism with a parameter eta, off at 0, over several augmentations (arXiv 2504.14290); its
formula and its augmentations are not public. What stands here is this project's own:

    d_k = 1 - sigmoid(-0.5 * beta * D_k)      difficulty of the pair in augmentation k, 0 being the plain pair
    d   = mean (or max) over k of d_k         no gradient
    raw = 1 + eta * d   (`additive`)   or   d ** eta   (`focal`)
    w   = raw / running mean of raw

The running mean is over all ranks and is updated once per optimiser step, so that a weight does not depend on the
micro-batch. It starts at raw(1/2), which is exact: before the first step the model is its own reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError


FocusingKind = Literal["additive", "focal"]
Reduction = Literal["mean", "max"]
KINDS: tuple[FocusingKind, ...] = get_args(FocusingKind)
_SMALLEST_MEAN = 1e-6


def difficulty(logit: Tensor) -> Tensor:
    """`1 - sigmoid(logit) [B]`, in [0, 1], without gradient; `logit` is `-0.5 * beta * D`."""
    return torch.sigmoid(-logit.detach().float())


def combine(difficulties: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Difficulty `[B]` over the augmentations `[K, B]`."""
    return difficulties.mean(0) if reduction == "mean" else difficulties.amax(0)


def raw_weight(d: Tensor, eta: float, kind: FocusingKind) -> Tensor:
    """`1 + eta * d` or `d ** eta`, of the shape of `d`; eta 0 gives ones."""
    if kind not in KINDS:
        raise ConfigError(f"focusing must be one of {', '.join(KINDS)}, got {kind!r}")
    return 1.0 + eta * d if kind == "additive" else d**eta


class Focusing:
    """Weights pairs by difficulty, normalised by the running mean.

    Args:
        eta: at least 0; 0 switches everything off.
        momentum: of the running mean, in [0, 1).
    """

    def __init__(self, eta: float, kind: FocusingKind = "additive", momentum: float = 0.9) -> None:
        if not eta >= 0.0:
            raise ConfigError(f"eta must be at least 0, got {eta}")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"momentum must lie in [0, 1), got {momentum}")
        self.eta, self.kind, self.momentum = eta, kind, momentum
        self.mean = float(raw_weight(torch.tensor(0.5, dtype=torch.float64), eta, kind))
        self._total = torch.zeros(2, dtype=torch.float64)

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.eta > 0.0

    def weigh(self, d: Tensor) -> Tensor:
        """Weights `[B]` for difficulties `[B]`, and remember them for the next `update`."""
        raw = raw_weight(d, self.eta, self.kind)
        part = torch.stack((raw.double().sum(), raw.new_tensor(raw.numel(), dtype=torch.float64)))
        self._total = self._total.to(part.device) + part
        return raw / self.mean

    def pending(self) -> Tensor:
        """`[2]`, sum and count of the raw weights since the last `update` on this rank; sum it over ranks."""
        return self._total

    def update(self, total: Tensor) -> None:
        """Move the running mean towards that of the step that ended; `total` is `pending()` summed over ranks."""
        value, count = total.tolist()
        if count:
            self.mean = max(self.momentum * self.mean + (1.0 - self.momentum) * value / count, _SMALLEST_MEAN)
        self._total = torch.zeros(2, dtype=torch.float64)

    def state_dict(self) -> dict[str, float]:
        """What it takes to resume between two optimiser steps."""
        return {"focusing_mean": self.mean}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean = float(state["focusing_mean"])
        self._total = torch.zeros(2, dtype=torch.float64)

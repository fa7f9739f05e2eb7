"""The composite reward `R = q - lambda * C` and the four ways in which it enters the preference loss.

That quality minus a weighted cost is the reward is known of T2I-SPO (arXiv 2504.14290); how it enters the loss is not
public. The four modes are this project's own:

- `relabel`: pairs are ordered by R; the loss is plain DPO. R is then what the optimum maximises.
- `margin`: pairs are ordered by q, and `lambda * (C_l - C_w)` is asked for on top (Bradley-Terry on q = R + lambda C).
- `relabel+margin`: ordered by R, and the margin only where a safe image beats an unsafe one (cf. SafeDPO).
- `soft`: ordered by R, cross-entropy against `sigmoid((R_w - R_l) / tau_soft)`.

Pairs in which both images are unsafe are dropped in every mode (SafeDPO's transform).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.metrics import UNSAFE_COST

from ..data.dataset import Preferences, both_unsafe
from .losses import preference_loss, soft_preference_loss


SafePairs = Literal["drop", "cost", "quality"]
RewardMode = Literal["relabel", "margin", "relabel+margin", "soft"]
MODES: tuple[RewardMode, ...] = get_args(RewardMode)


def composite_reward(quality: Tensor, cost: Tensor, lambda_: float) -> Tensor:
    """`R = q - lambda * C`, of any shape, q and C in [0, 1]."""
    return quality - lambda_ * cost


def composite_preferences(
    quality: Tensor,
    cost: Tensor,
    lambda_: float,
    mode: RewardMode = "relabel+margin",
    tau: float = 0.0,
    tau_soft: float = 0.1,
) -> Preferences:
    """Order and weigh pairs by the composite reward.

    Args:
        quality, cost: `[N, 2]`, one column for each image.
        lambda_: weight of the cost, at least 0.
        mode: see the file's first lines.
        tau: pairs whose order rests on less than this are dropped (in units of R, in `margin` of q); exact ties always
            are. A tie in q that the cost decides is kept in `margin`: the safer image wins it.
        tau_soft: temperature of `soft`, in units of R.

    Raises:
        ConfigError: an option out of range.
        ValueError: shapes disagree, or a quality or cost is NaN or outside [0, 1].
    """
    _check(quality, cost, lambda_, mode, tau, tau_soft)
    reward = composite_reward(quality, cost, lambda_)
    key = quality if mode == "margin" else reward
    gap = key[:, 1] - key[:, 0]
    decided = (gap.abs() >= tau) & (gap != 0)
    winner = (gap > 0).long()
    if mode == "margin" and lambda_ > 0:
        by_cost = cost[:, 0] - cost[:, 1]
        tie = (gap == 0) & (by_cost != 0)
        winner = torch.where(tie, (by_cost > 0).long(), winner)
        decided = decided | tie
    keep = decided & ~both_unsafe(cost)
    cost_w, cost_l = _column(cost, winner), _column(cost, 1 - winner)
    margin = torch.zeros_like(gap)
    if mode == "margin":
        margin = lambda_ * (cost_l - cost_w)
    elif mode == "relabel+margin":
        crossing = (cost_w < UNSAFE_COST) & (cost_l >= UNSAFE_COST)
        margin = torch.where(crossing, lambda_ * (cost_l - cost_w), margin)
    target = torch.ones_like(gap)
    if mode == "soft":
        target = torch.sigmoid(gap.abs() / tau_soft)
    return Preferences(winner, keep, margin, target)


def safety_preferences(quality: Tensor, cost: Tensor, safe_pairs: SafePairs) -> Preferences:
    """Safe over unsafe and nothing else: how plain Diffusion-DPO is labelled when it is the rival.

    `safe_pairs` says what becomes of pairs that are safe on both sides: dropped, ordered by the lower cost, or by the
    higher quality. Shapes and errors as in `composite_preferences`.
    """
    if safe_pairs not in get_args(SafePairs):
        raise ConfigError(f"safe_pairs must be one of {', '.join(get_args(SafePairs))}, got {safe_pairs!r}")
    _check(quality, cost, 0.0, "relabel", 0.0, 1.0)
    unsafe = cost >= UNSAFE_COST
    crossing = unsafe[:, 0] != unsafe[:, 1]
    gap = {"drop": torch.zeros_like(cost[:, 0]), "cost": cost[:, 0] - cost[:, 1]}.get(
        safe_pairs, quality[:, 1] - quality[:, 0]
    )
    winner = torch.where(crossing, unsafe[:, 0], gap > 0).long()
    keep = crossing | ((gap != 0) & ~unsafe.any(1))
    return Preferences(winner, keep, torch.zeros_like(cost[:, 0]), torch.ones_like(cost[:, 0]))


def composite_loss(logit: Tensor, margin: Tensor, target: Tensor, mode: RewardMode) -> Tensor:
    """The preference loss `[B]` of a mode, from the DPO logit `[B]` and the columns of `Preferences`.

    In mode `relabel` the margin is 0, unless a term adds one.
    """
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "soft":
        return soft_preference_loss(logit, target)
    return preference_loss(logit, margin)


def _column(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None])[:, 0]


def _check(quality: Tensor, cost: Tensor, lambda_: float, mode: str, tau: float, tau_soft: float) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not lambda_ >= 0.0:
        raise ConfigError(f"lambda must be at least 0, got {lambda_}: a negative one would reward harm")
    if not tau >= 0.0 or not tau_soft > 0.0:
        raise ConfigError(f"tau must be at least 0 and tau_soft above 0, got {tau} and {tau_soft}")
    if quality.shape != cost.shape or quality.ndim != 2 or quality.shape[1] != 2:
        raise ValueError(f"expected quality and cost [N, 2], got {tuple(quality.shape)} and {tuple(cost.shape)}")
    for name, values in (("quality", quality), ("cost", cost)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1] and not be NaN; drop pairs that are not scored first")

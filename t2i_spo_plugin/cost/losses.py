"""Losses of a safety cost model, as pure functions. This project's own: the papers' formulas are not public.

Sign convention: a higher logit is more harmful, zero is the boundary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_loss(unsafe: Tensor, safe: Tensor) -> Tensor:
    """Bradley-Terry on pairs: `-log sigmoid(s(x_u) - s(x_s))`, mean over `[B]`."""
    return -F.logsigmoid(unsafe - safe).mean()


def anchor_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """`-log sigmoid(+s)` where the label is 1, `-log sigmoid(-s)` where it is 0: zero becomes the boundary.

    `logits`, `labels`: `[B, K]`; `weights` `[K]` for the positives of rare categories.
    """
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)


def supervised_contrastive_loss(features: Tensor, groups: Tensor, temperature: float = 0.1) -> Tensor:
    """Pull features `[B, D]` of one group together: mean over anchors of the mean log-probability of their
    positives.

    `groups`: integers `[B]`. Anchors without a positive count nothing. (SupCon, arXiv 2004.11362, eq. 2.)
    """
    unit = F.normalize(features, dim=-1)
    similarity = unit @ unit.T / temperature
    itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    positive = (groups[:, None] == groups[None]) & ~itself
    log_probability = similarity - similarity.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
    has = positive.any(1)
    if not has.any():
        return features.sum() * 0
    per_anchor = (log_probability * positive).sum(1)[has] / positive.sum(1)[has]
    return -per_anchor.mean()


def fit_temperature(logits: Tensor, labels: Tensor, steps: int = 200) -> Tensor:
    """The temperature that minimises the negative log-likelihood of `sigmoid(logits / T)`; `[N]`, `[N]` ->
    scalar."""
    log_t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=steps)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.detach().exp().clamp(0.05, 20.0)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """`sum_b n_b/N |mean probability - mean label|` over equal-width bins of P(unsafe); `[N]`, `[N]`."""
    index = (probabilities * bins).long().clamp(max=bins - 1)
    total = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            gap = probabilities[inside].mean() - labels[inside].float().mean()
            total += float(gap.abs()) * float(inside.float().mean())
    return total

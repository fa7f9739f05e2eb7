"""Merging by the changes of weights themselves, where adapters contradict each other: pure functions.

TIES (Yadav et al., arXiv 2306.01708), DARE (Yu et al., arXiv 2311.03099) and pruning by magnitude, as PEFT has them in
`merge_utils`. `deltas [K, ...]` are the changes of one weight by K adapters, `weights [K]` their factors. Unlike
factors, changes mean the same however an adapter is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def prune_smallest(delta: Tensor, density: float) -> Tensor:
    """`delta` with the share `density` of its values that are largest in magnitude, and zeros."""
    if density >= 1.0:
        return delta
    mask = torch.zeros(delta.numel(), device=delta.device, dtype=delta.dtype)
    mask[delta.abs().flatten().topk(int(density * delta.numel())).indices] = 1.0
    return delta * mask.view_as(delta)


def drop_mask(delta: Tensor, density: float, seed: int) -> Tensor:
    """1 with probability `density`, else 0, in the shape of `delta`.

    It depends on `seed` and on the change itself, not on its place among others: the order of adapters plays no part.
    """
    digest = hashlib.blake2b(delta.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=7)
    digest.update(str(seed).encode())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
    return torch.bernoulli(torch.full(delta.shape, density), generator=generator).to(delta)


def weighted_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """`sum_k weights[k] * deltas[k]`."""
    return (deltas * _like(weights, deltas)).sum(0)


def majority_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """TIES without its pruning: at each place the mean of the weighted changes that have the sign of the sum there."""
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas)
    agree = (deltas.sign() == sign).to(deltas)
    return (deltas * _like(weights, deltas) * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Each change pruned by magnitude, then `majority_mean`."""
    return majority_mean(torch.stack([prune_smallest(delta, density) for delta in deltas]), weights)


def magnitude(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Each change pruned by magnitude, then the weighted sum."""
    return weighted_sum(torch.stack([prune_smallest(delta, density) for delta in deltas]), weights)


def dare(deltas: Tensor, weights: Tensor, masks: Sequence[Tensor], density: float) -> Tensor:
    """Values dropped at random by `masks`, the rest over `density`, then the weighted sum."""
    return weighted_sum(deltas * torch.stack(list(masks)) / density, weights)


def dare_ties(deltas: Tensor, weights: Tensor, masks: Sequence[Tensor], density: float) -> Tensor:
    """Values dropped at random by `masks`, the rest over `density`, then `majority_mean`."""
    return majority_mean(deltas * torch.stack(list(masks)) / density, weights)


def _like(weights: Tensor, deltas: Tensor) -> Tensor:
    return weights.to(deltas).view(-1, *[1] * (deltas.ndim - 1))

"""Low-rank pairs near a change of a weight, and how far they are from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .lora import LoraPair


_USUAL_RANK = 128
_OVERSAMPLING = 10
_NEGLIGIBLE = 1e-3
"""What the strongest directions may leave of a change, relative, to pass for all of it."""


def balanced_pair(left: Tensor, values: Tensor, right: Tensor, weight: Sequence[int]) -> LoraPair:
    """`left [out, r] diag(values [r]) right [r, in * ...]` as a float32 pair for a weight of that shape, on the CPU.

    Each matrix takes the root of the singular values, so that 16 bits hold both alike well.
    """
    rank, roots, ones = len(values), values.sqrt(), (1,) * (len(weight) - 2)
    up = (left * roots).to("cpu", torch.float32).reshape(weight[0], rank, *ones)
    down = (roots[:, None] * right).to("cpu", torch.float32).reshape(rank, *weight[1:])
    return LoraPair(down.contiguous(), up.contiguous(), float(rank))


def relative_error(squared_error: float, squared_norm: float) -> float:
    """`sqrt(squared_error / squared_norm)`; 0 for a norm of 0."""
    return math.sqrt(squared_error / squared_norm) if squared_norm > 0.0 else 0.0


def decompose(change: Tensor, rank: int | None, energy: float | None) -> tuple[LoraPair, tuple[float, float]]:
    """The pair for a weight's change, and the squared norms of what it leaves out and of the whole change."""
    matrix = change.flatten(1)
    total = float(matrix.norm()) ** 2
    for left, values, right in _decompositions(matrix, rank):
        squared = values.cpu().double().square()
        sums = squared.cumsum(0)
        is_whole = len(values) == min(matrix.shape)
        keep = len(values) if rank is None else min(rank, len(values))
        if energy is not None:
            keep = min(keep, int((sums < energy * (sums[-1] if is_whole else total)).sum()) + 1)
        if is_whole or (keep < len(values) and _is_negligible(matrix, left, values, right, total)):
            break
    left, values, right = left[:, :keep], values[:keep], right[:keep]
    lost = float(_rest(matrix, left, values, right).norm()) ** 2
    return balanced_pair(left, values, right, change.shape), (lost, total)


def _decompositions(matrix: Tensor, rank: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Singular vectors and values of `matrix [m, n]`, the strongest at first, where that is quicker; then all.

    The strongest come by a randomised range finder (Halko, Martinsson, Tropp 2011, with one power iteration), which
    finds a change of low rank as a whole; its seed is fixed, so that equal models give equal adapters.
    """
    size = (rank or _USUAL_RANK) + _OVERSAMPLING
    if 4 * size < min(matrix.shape):
        generator = torch.Generator(matrix.device).manual_seed(0)
        probe = torch.randn(matrix.shape[1], size, generator=generator, device=matrix.device)
        basis = torch.linalg.qr(matrix @ probe)[0]
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis))[0]
        right, values, left = torch.linalg.svd(matrix.T @ basis, full_matrices=False)
        yield basis @ left.T, values, right.T
    # Of a wide matrix the decomposition takes several times as long as of the tall one.
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = torch.linalg.svd(matrix.T, full_matrices=False)
        yield left.T, values, right.T
    else:
        yield torch.linalg.svd(matrix, full_matrices=False)


def _is_negligible(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor, total: float) -> bool:
    return float(_rest(matrix, left, values, right).norm()) ** 2 <= _NEGLIGIBLE**2 * total


def _rest(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(matrix, left * values, right, alpha=-1.0)

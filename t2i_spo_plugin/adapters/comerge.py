"""Co-Merge (AlignGuard, arXiv 2412.10493) in variants: of each expert only what is most active is kept.

Known: all experts share one architecture; over all inputs it is found which expert has the highest activation for each
weight; the merged adapter takes from each expert only its most active weights. No code is public: which unit competes,
by what measure, and what is done with the two matrices is this project's own, and is an option:

- unit `row`: outputs of a module. The rows of `up` whose expert does not win are zero; the sum is exact, its rank that
  of all experts together.
- unit `rank`: components `up[:, r] down[r]` of a module, for experts of one rank, which is kept.
- unit `element`: values of the change `up @ down`. With inputs that experts share the largest value itself wins:
  no data is needed.
- unit `factor`: rows of `down` and rows of `up` compete apart. The rank is kept, but `up` may be that of one expert
  and `down` that of another, so that the change is no selection of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from t2i_spo_plugin.errors import IncompatibleAdapterError

from .lora import LoraPair


Unit = Literal["row", "rank", "element", "factor"]
Score = Literal["frequency", "magnitude"]


@dataclass(frozen=True)
class Activity:
    """How active K experts are in one module, over calibration inputs that they share.

    Attributes:
        row_wins: `[K, out]`, how often each expert's output is the largest in magnitude.
        row_sizes: `[K, out]`, the mean magnitude of its output.
        rank_wins: `[K, r]`, the same of the components `down[r] x`, times the norm of `up[:, r]`.
        rank_sizes: `[K, r]`.
    """

    row_wins: Tensor
    row_sizes: Tensor
    rank_wins: Tensor
    rank_sizes: Tensor


def norms(pairs: Sequence[LoraPair]) -> Activity:
    """Activities without data: norms of rows and of components, as for inputs that point everywhere alike."""
    rows = torch.stack([pair.delta().flatten(1).norm(dim=1) for pair in pairs])
    rank = max(pair.rank for pair in pairs)
    sizes = torch.zeros(len(pairs), rank)
    for number, pair in enumerate(pairs):
        sizes[number, : pair.rank] = pair.down.float().flatten(1).norm(dim=1) * up_norms(pair)
    return Activity(_wins(rows), rows, _wins(sizes), sizes)


def up_norms(pair: LoraPair) -> Tensor:
    """`[rank]`: norms of the columns of `up`, with the scale of the pair."""
    return pair.scale * pair.up.float().flatten(1).norm(dim=0)


def _wins(sizes: Tensor) -> Tensor:
    return (sizes == sizes.amax(0)).float()


def winners(wins: Tensor, sizes: Tensor, score: Score) -> Tensor:
    """`[n]`: which of K experts has each of n units, by how often it wins or by its mean size.

    Ties go by the other measure, so that the order of experts plays no part.
    """
    first, second = (wins, sizes) if score == "frequency" else (sizes, wins)
    best = first == first.amax(0)
    return second.masked_fill(~best, -1.0).argmax(0)


def select_rows(pairs: Sequence[LoraPair], winner: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices `down [ranks, in, ...]`, `up [out, ranks, ...]` with each row of the change from its winner."""
    down = torch.cat([pair.down.float() for pair in pairs])
    parts = []
    for number, pair in enumerate(pairs):
        mask = (winner == number).to(pair.up.device).float().view(-1, *[1] * (pair.up.ndim - 1))
        parts.append(pair.up.float() * pair.scale * mask)
    return down, torch.cat(parts, 1)


def select_ranks(pairs: Sequence[LoraPair], winner: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices of the components' winners; the rank stays.

    Raises:
        IncompatibleAdapterError: the experts have several ranks.
    """
    _check_ranks(pairs)
    down = torch.stack([pairs[expert].down[rank].float() for rank, expert in enumerate(winner.tolist())])
    up = [pairs[expert].up[:, rank].float() * pairs[expert].scale for rank, expert in enumerate(winner.tolist())]
    return down, torch.stack(up, 1)


def select_factors(pairs: Sequence[LoraPair], rank_winner: Tensor, row_winner: Tensor) -> tuple[Tensor, Tensor]:
    """`down` by the components' winners and `up` by the rows'; the rank stays.

    Raises:
        IncompatibleAdapterError: the experts have several ranks.
    """
    _check_ranks(pairs)
    down = torch.stack([pairs[expert].down[rank].float() for rank, expert in enumerate(rank_winner.tolist())])
    up = [pairs[expert].up[row].float() * pairs[expert].scale for row, expert in enumerate(row_winner.tolist())]
    return down, torch.stack(up)


def select_elements(deltas: Tensor) -> Tensor:
    """Of `deltas [K, ...]` at each place the value that is largest in magnitude, of two opposite ones the positive."""
    largest = deltas.abs().amax(0)
    return torch.where((deltas == largest).any(0), largest, -largest)


def _check_ranks(pairs: Sequence[LoraPair]) -> None:
    ranks = sorted({pair.rank for pair in pairs})
    if len(ranks) > 1:
        raise IncompatibleAdapterError(
            f"experts of ranks {' and '.join(map(str, ranks))} have no components in common; take the unit row"
        )

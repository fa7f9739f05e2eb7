"""From the pair table to what a run trains on: who wins, by how much, and which rows are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.metrics import UNSAFE_COST

from .caches import SourceImage, content_key
from .pair_files import IMAGES, image_rows, read_annotation


@dataclass(frozen=True)
class Examples:
    """N examples of S images each under one prompt: winner and loser of a pair, or a single image.

    Attributes:
        captions: N prompts.
        images: S lists of N keys of images (content hashes).
        columns: `[N]` by name: `benign` (bool, the prompt is benign) always; `margin` and `target` of pairs.
        counts: rows read, kept, dropped, and kept of each kind.
        rows: N numbers of their rows, for messages; by default those from 0 on.
    """

    captions: list[str]
    images: tuple[list[str], ...]
    columns: dict[str, Tensor]
    counts: dict[str, int]
    rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def digest(self) -> str:
        """Changes with any example, its order, its images or its columns."""
        digest = hashlib.sha256()
        columns = [self.columns[name].tolist() for name in sorted(self.columns)]
        for row in zip(self.captions, *self.images, *columns, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Preferences:
    """What an objective makes of N annotated pairs.

    Attributes:
        winner: `[N]`, 0 or 1, the column of the preferred image.
        keep: `[N]` bool, whether the pair is trained on.
        margin: `[N]`, what the loss demands on top of zero.
        target: `[N]` in [0.5, 1], the probability that the winner is better; 1 unless the labels are soft.
    """

    winner: Tensor
    keep: Tensor
    margin: Tensor
    target: Tensor


Prefer = Callable[[Tensor, Tensor, Tensor], Preferences]
"""Orders N pairs by quality `[N, 2]`, cost `[N, 2]` and the table's own label of the first image `[N]`."""


def both_unsafe(cost: Tensor) -> Tensor:
    """`[N]` bool of `cost [N, 2]`."""
    return (cost >= UNSAFE_COST).all(1)


def read_pairs(path: str | Path, prefer: Prefer, by_label: bool = False) -> Examples:
    """Read a pair table and order its pairs; the first image of each example is the winner.

    Args:
        path: of the table.
        prefer: orders the pairs.
        by_label: `prefer` takes the table's labels, so that costs and qualities may be missing; they are then 0.

    Raises:
        TableError: the table is not a pair table, or no pair is left.
    """
    column, lacks = read_annotation(path)
    if lacks and not by_label:
        raise TableError(
            f"{path} lacks {', '.join(lacks)}, so nobody knows which images are safe or good; only objective dpo with "
            "labels table trains on it (--objective dpo --objective.labels table), by its own labels. `spo pairs` "
            "writes tables with costs and qualities"
        )
    column |= {name: [0.0] * len(column["caption"]) for name in lacks}
    cost = torch.tensor([column["safety_cost_0"], column["safety_cost_1"]], dtype=torch.float64).T
    quality = torch.tensor([column["quality_0"], column["quality_1"]], dtype=torch.float64).T
    preferences = prefer(quality, cost, torch.tensor(column["label_0"], dtype=torch.float64))
    keys = list(image_keys(path))
    if len(keys) != len(preferences.keep):
        raise TableError(f"{path} changed while it was read")
    rows = preferences.keep.nonzero()[:, 0].tolist()
    if not rows:
        raise TableError(
            f"{path}: none of {len(keys)} pairs can be trained on; they are unsafe on both sides, tied, "
            "or left out by the objective's labels"
        )
    winner = preferences.winner.tolist()
    kinds = Counter(column["pair_kind"][row] for row in rows)
    return Examples(
        captions=[column["caption"][row] for row in rows],
        images=([keys[row][winner[row]] for row in rows], [keys[row][1 - winner[row]] for row in rows]),
        columns={
            "margin": preferences.margin[rows].float(),
            "target": preferences.target[rows].float(),
            "benign": torch.tensor([column["pair_kind"][row].startswith("benign") for row in rows]),
        },
        counts={
            "read": len(keys),
            "kept": len(rows),
            "dropped_both_unsafe": int(both_unsafe(cost).sum()),
            "dropped": len(keys) - len(rows),
            **{f"kind {kind}": count for kind, count in sorted(kinds.items())},
        },
        rows=tuple(rows),
    )


def images(path: str | Path) -> Iterator[SourceImage]:
    """Every image of a pair table, read in batches of rows and named by its row and column."""
    for number, row in enumerate(image_rows(path)):
        for column, data in zip(IMAGES, row, strict=True):
            yield SourceImage(content_key(data), data, f"row {number}, {column} of {path}")


def image_keys(path: str | Path) -> Iterator[tuple[str, str]]:
    """The keys of both images of every row."""
    for first, second in image_rows(path):
        yield content_key(first), content_key(second)

"""From the pair table to what a run trains on: who wins, by how much, and which rows are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.metrics import UNSAFE_COST

from .caches import SourceImage, content_key
from .pair_files import IMAGES, JUDGED, SEEDS, image_rows, read_annotation


@dataclass(frozen=True)
class Examples:
    """N examples of S images each under one prompt: winner and loser of a pair, or a single image.

    Attributes:
        captions: N prompts.
        images: S lists of N keys of images (content hashes).
        columns: by name, `[N]` or `[N, S]`: `benign` (bool, the prompt is benign) always; `margin` and `target` of
            pairs; from annotated tables `cost`, `quality` and `seed` (-1 where it is not known) of each image.
        counts: rows read, kept, dropped, and kept of each kind.
        rows: N numbers of their rows, for messages; by default those from 0 on.
        categories: of the prompts, N names; empty where none is stated.
        files: of images that lie in files of their own, N paths.
    """

    captions: list[str]
    images: tuple[list[str], ...]
    columns: dict[str, Tensor]
    counts: dict[str, int]
    rows: tuple[int, ...] = ()
    categories: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def pick(self, numbers: Sequence[int]) -> Examples:
        """The examples with these numbers, in this order."""
        numbers = list(numbers)
        return replace(
            self,
            captions=[self.captions[number] for number in numbers],
            images=tuple([keys[number] for number in numbers] for keys in self.images),
            columns={name: values[numbers] for name, values in self.columns.items()},
            rows=tuple(self.rows[number] for number in numbers) if self.rows else tuple(numbers),
            categories=tuple(self.categories[number] for number in numbers) if self.categories else (),
        )

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


@dataclass(frozen=True)
class Annotated:
    """The N rows of a pair table: two images each, with what is known of them.

    Attributes:
        captions, kinds, categories: of the rows.
        keys: of both images of each row.
        cost, quality: `[N, 2]`, float64.
        seed: `[N, 2]`, -1 where it is not known.
        label_0: `[N]`, the table's own label of the first image.
    """

    captions: list[str]
    kinds: list[str]
    categories: list[str]
    keys: list[tuple[str, str]]
    cost: Tensor
    quality: Tensor
    seed: Tensor
    label_0: Tensor

    @property
    def benign(self) -> Tensor:
        """`[N]` bool, whether a row stands under a benign prompt."""
        return torch.tensor([kind.startswith("benign") for kind in self.kinds])


def read_annotated(path: str | Path, required: Collection[str] = JUDGED) -> Annotated:
    """Read a pair table whole, but for the contents of its images.

    Args:
        path: of the table.
        required: those of `JUDGED` that it must have; of the others it has none or 0.

    Raises:
        TableError: the table is not a pair table, or lacks what is required.
    """
    column, lacks = read_annotation(path)
    missing = [name for name in lacks if name in required]
    if missing:
        raise TableError(
            f"{path} lacks {', '.join(missing)}, so nobody knows which images are safe or good; only objective dpo "
            "with labels table trains on it (--objective dpo --objective.labels table), by its own labels. "
            "`spo pairs` writes tables with costs and qualities"
        )
    column |= {name: [0.0] * len(column["caption"]) for name in lacks}
    keys = list(image_keys(path))
    if len(keys) != len(column["caption"]):
        raise TableError(f"{path} changed while it was read")
    return Annotated(
        column["caption"],
        column["pair_kind"],
        column["category"],
        keys,
        torch.tensor([column["safety_cost_0"], column["safety_cost_1"]], dtype=torch.float64).T,
        torch.tensor([column["quality_0"], column["quality_1"]], dtype=torch.float64).T,
        torch.tensor([column[name] for name in SEEDS], dtype=torch.int64).T,
        torch.tensor(column["label_0"], dtype=torch.float64),
    )


def read_pairs(path: str | Path, prefer: Prefer, required: Collection[str] = JUDGED) -> Examples:
    """Read a pair table and order its pairs; the first image of each example is the winner.

    Args:
        path: of the table.
        prefer: orders the pairs.
        required: the costs and qualities that `prefer` looks at; a table may lack the others.

    Raises:
        TableError: the table is not a pair table, or no pair is left.
    """
    table = read_annotated(path, required)
    preferences = prefer(table.quality, table.cost, table.label_0)
    rows = preferences.keep.nonzero()[:, 0].tolist()
    if not rows:
        raise TableError(
            f"{path}: none of {len(table.keys)} pairs can be trained on; they are unsafe on both sides, tied, "
            "or left out by the objective's labels"
        )
    winner = preferences.winner.tolist()
    sides = torch.stack((preferences.winner, 1 - preferences.winner), 1)
    kinds = Counter(table.kinds[row] for row in rows)
    return Examples(
        captions=[table.captions[row] for row in rows],
        images=([table.keys[row][winner[row]] for row in rows], [table.keys[row][1 - winner[row]] for row in rows]),
        columns={
            "margin": preferences.margin[rows].float(),
            "target": preferences.target[rows].float(),
            "benign": table.benign[rows],
            "cost": table.cost.gather(1, sides)[rows].float(),
            "quality": table.quality.gather(1, sides)[rows].float(),
            "seed": table.seed.gather(1, sides)[rows],
        },
        counts={
            "read": len(table.keys),
            "kept": len(rows),
            "dropped_both_unsafe": int(both_unsafe(table.cost).sum()),
            "dropped": len(table.keys) - len(rows),
            **{f"kind {kind}": count for kind, count in sorted(kinds.items())},
        },
        rows=tuple(rows),
        categories=tuple(table.categories[row] for row in rows),
    )


def of_categories(examples: Examples, categories: Sequence[str]) -> Examples:
    """The examples under benign prompts, and of those under harmful ones the categories that are named.

    Raises:
        TableError: no harmful prompt is of one of them.
    """
    benign = examples.columns["benign"].tolist()
    names = examples.categories or ("",) * len(examples)
    kept = [number for number, name in enumerate(names) if benign[number] or name in categories]
    if all(benign[number] for number in kept):
        known = sorted({name for number, name in enumerate(names) if name and not benign[number]})
        raise TableError(
            f"no example under a harmful prompt is of {', '.join(categories)}; the table has "
            f"{', '.join(known) or 'no categories'}"
        )
    picked = examples.pick(kept)
    return replace(picked, counts=examples.counts | {"kept": len(kept), "of_other_categories": len(names) - len(kept)})


def images(path: str | Path) -> Iterator[SourceImage]:
    """Every image of a pair table, read in batches of rows and named by its row and column."""
    for number, row in enumerate(image_rows(path)):
        for column, data in zip(IMAGES, row, strict=True):
            yield SourceImage(content_key(data), data, f"row {number}, {column} of {path}")


def image_keys(path: str | Path) -> Iterator[tuple[str, str]]:
    """The keys of both images of every row."""
    for first, second in image_rows(path):
        yield content_key(first), content_key(second)

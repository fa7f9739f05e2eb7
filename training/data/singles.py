"""Single images under their prompts, each with cost and quality, and groups of them: made from pair tables.

A pair table names most images more than once. Here each image stands once under each of its prompts, in the order of
its first row; images under one prompt belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2i_spo_plugin.errors import TableError

from .dataset import Examples, read_annotated
from .pair_files import NO_SEED


@dataclass(frozen=True)
class Singles:
    """M images under their prompts.

    Attributes:
        captions, categories, keys: of the images.
        cost, quality: `[M]` in [0, 1], float64.
        seed: `[M]`, -1 where it is not known.
        benign: `[M]` bool, whether the prompt is benign.
        rows: M numbers of the first rows that name them.
        read: rows of the table.
    """

    captions: list[str]
    categories: list[str]
    keys: list[str]
    cost: Tensor
    quality: Tensor
    seed: Tensor
    benign: Tensor
    rows: tuple[int, ...]
    read: int

    def __len__(self) -> int:
        return len(self.captions)

    def by_caption(self) -> list[list[int]]:
        """The numbers of the images under each prompt."""
        groups: dict[str, list[int]] = {}
        for number, caption in enumerate(self.captions):
            groups.setdefault(caption, []).append(number)
        return list(groups.values())

    def examples(self, members: Sequence[Sequence[int]], columns: Mapping[str, Tensor], why: str) -> Examples:
        """Examples of these images each, the first of which the prompt is taken from.

        Args:
            members: for each example the numbers of its S images.
            columns: `[N]` by name, beside those that every example has.
            why: what is said where no example is left.

        Raises:
            TableError: `members` is empty.
        """
        if not members:
            raise TableError(f"none of {len(self)} images can be trained on: {why}")
        numbers = torch.tensor([list(part) for part in members])
        first = numbers[:, 0].tolist()
        used = len(set(numbers.flatten().tolist()))
        return Examples(
            captions=[self.captions[number] for number in first],
            images=tuple([self.keys[number] for number in side] for side in numbers.T.tolist()),
            columns={
                "benign": self.benign[first],
                "cost": self.cost[numbers].float(),
                "quality": self.quality[numbers].float(),
                "seed": self.seed[numbers],
                **columns,
            },
            counts={"read": self.read, "kept": len(members), "images": len(self), "dropped": len(self) - used},
            rows=tuple(self.rows[number] for number in first),
            categories=tuple(self.categories[number] for number in first),
        )


def read_singles(path: str | Path) -> Singles:
    """Every image of a pair table once under each of its prompts.

    Raises:
        TableError: the table is not a pair table, lacks costs or qualities, or contradicts itself about an image.
    """
    table = read_annotated(path)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    seeds: dict[tuple[str, str], int] = {}
    for row, (caption, keys) in enumerate(zip(table.captions, table.keys, strict=True)):
        for side, key in enumerate(keys):
            first_row, first_side = places.setdefault((caption, key), (row, side))
            seeds[caption, key] = max(int(table.seed[row, side]), seeds.get((caption, key), NO_SEED))
            if table.cost[first_row, first_side] != table.cost[row, side]:
                raise TableError(
                    f"{path}: rows {first_row} and {row} give one image under one prompt two costs, "
                    f"{float(table.cost[first_row, first_side])} and {float(table.cost[row, side])}"
                )
    rows, sides = (list(part) for part in zip(*places.values(), strict=True)) if places else ([], [])
    return Singles(
        [caption for caption, _ in places],
        [table.categories[row] for row in rows],
        [key for _, key in places],
        table.cost[rows, sides],
        table.quality[rows, sides],
        torch.tensor(list(seeds.values()), dtype=torch.int64),
        table.benign[rows],
        tuple(rows),
        len(table.keys),
    )

"""From the pair table to what a run trains on: who wins, by how much, and which rows are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from t2i_spo_plugin.data import PAIR_COLUMNS, read_table
from t2i_spo_plugin.errors import TableError

from ..config import TrainConfig
from ..objectives.reward import Preferences, both_unsafe, composite_preferences, safety_preferences
from .caches import content_key


_ANNOTATION = ("caption", "label_0", "safety_cost_0", "safety_cost_1", "quality_0", "quality_1", "pair_kind")


@dataclass(frozen=True)
class PairData:
    """N pairs that are trained on, in the order of the table.

    Attributes:
        captions: N prompts.
        winners, losers: N keys of images (content hashes).
        margin, target: `[N]`, as in `reward.Preferences`.
        benign: `[N]` bool, the pair stands under a benign prompt.
        counts: pairs read, kept, dropped, and kept of each kind.
    """

    captions: list[str]
    winners: list[str]
    losers: list[str]
    margin: Tensor
    target: Tensor
    benign: Tensor
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.captions)

    def digest(self) -> str:
        """Changes with any pair, its order, winner, margin or target."""
        made = hashlib.sha256()
        for row in zip(
            self.captions, self.winners, self.losers, self.margin.tolist(), self.target.tolist(), strict=True
        ):
            made.update(repr(row).encode())
        return made.hexdigest()[:16]


def prefer(quality: Tensor, cost: Tensor, label_0: Tensor, config: TrainConfig) -> Preferences:
    """Winner, margin and target of N pairs `[N, 2]` as `config` asks; `label_0 [N]` is for `labels="table"`."""
    if config.objective == "spo":
        return composite_preferences(quality, cost, config.lambda_, config.mode, config.tau, config.tau_soft)
    if config.labels == "safety":
        return safety_preferences(quality, cost, config.safe_pairs)
    keep = (label_0 != 0.5) & ~both_unsafe(cost)
    ones = torch.ones_like(label_0)
    return Preferences((label_0 < 0.5).long(), keep, torch.zeros_like(ones), ones)


def read_pairs(config: TrainConfig) -> PairData:
    """Read the table of `config.pairs` and order its pairs.

    Raises:
        TableError: the table is not a pair table, or no pair is left.
    """
    table = read_table(config.pairs, PAIR_COLUMNS, only=_ANNOTATION)
    column = {name: table.column(name).to_pylist() for name in _ANNOTATION}
    cost = torch.tensor([column["safety_cost_0"], column["safety_cost_1"]], dtype=torch.float64).T
    quality = torch.tensor([column["quality_0"], column["quality_1"]], dtype=torch.float64).T
    made = prefer(quality, cost, torch.tensor(column["label_0"], dtype=torch.float64), config)
    keys = list(image_keys(config.pairs))
    if len(keys) != len(made.keep):
        raise TableError(f"{config.pairs} changed while it was read")
    kept = made.keep.nonzero()[:, 0].tolist()
    if not kept:
        raise TableError(
            f"{config.pairs}: none of {len(keys)} pairs can be trained on; they are unsafe on both sides, tied, "
            "or left out by the objective's labels"
        )
    first = made.winner.tolist()
    kinds = Counter(column["pair_kind"][row] for row in kept)
    return PairData(
        captions=[column["caption"][row] for row in kept],
        winners=[keys[row][first[row]] for row in kept],
        losers=[keys[row][1 - first[row]] for row in kept],
        margin=made.margin[kept].float(),
        target=made.target[kept].float(),
        benign=torch.tensor([column["pair_kind"][row].startswith("benign") for row in kept]),
        counts={
            "read": len(keys),
            "kept": len(kept),
            "dropped_both_unsafe": int(both_unsafe(cost).sum()),
            "dropped": len(keys) - len(kept),
            **{f"kind {kind}": count for kind, count in sorted(kinds.items())},
        },
    )


def images(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Every image of a pair table as (key, file content), read in batches of rows."""
    for row in _rows(path):
        for data in row:
            yield content_key(data), data


def image_keys(path: str | Path) -> Iterator[tuple[str, str]]:
    """The keys of both images of every row."""
    for first, second in _rows(path):
        yield content_key(first), content_key(second)


def _rows(path: str | Path) -> Iterator[tuple[bytes, bytes]]:
    path = Path(path)
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=["jpg_0", "jpg_1"]):
            yield from zip(batch.column("jpg_0").to_pylist(), batch.column("jpg_1").to_pylist(), strict=True)

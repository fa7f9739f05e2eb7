"""The images of a report: the same prompt and seed by every system, with cost and overlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_spo_plugin.data import KINDS
from t2i_spo_plugin.images import open_image
from t2i_spo_plugin.metrics import UNSAFE_COST

from .runner import image_path
from .scoring import Judges


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One image: its system, its cost and its overlay. `image` is None when it was not generated.

    `unreadable` is what the cost model says; False where it was not asked.
    """

    system: str
    image: Image.Image | None
    overlay: Image.Image | None = None
    cost: float | None = None
    category: str = ""
    quality: float | None = None
    referee_unsafe: bool | None = None
    objects: tuple[str, ...] = ()
    note: str = ""
    unreadable: bool = False

    @property
    def unsafe(self) -> bool | None:
        """Whether the cost model finds it unsafe; None when it was not scored."""
        return None if self.cost is None else self.cost >= UNSAFE_COST


@dataclass(frozen=True)
class Exhibit:
    """One prompt and seed with a cell for every system."""

    prompt: str
    kind: str
    category: str
    seed: int
    cells: tuple[Cell, ...]

    @property
    def has_overlay(self) -> bool:
        """Whether any cell has an overlay to show."""
        return any(cell.overlay is not None for cell in self.cells)


def exhibits(scores: Mapping[str, Sequence[Row]], judges: Judges, out_dir: str | Path, n: int) -> list[Exhibit]:
    """About `n` prompts, half of them harmful, spread evenly over each kind; every system's image of each."""
    systems = list(scores)
    by_key = {system: {(row["prompt_id"], row["seed"]): row for row in scores[system]} for system in systems}
    chosen = []
    for row in choose(scores[systems[0]], n):
        key = row["prompt_id"], row["seed"]
        cells = tuple(_cell(by_key[system].get(key), system, judges, out_dir) for system in systems)
        chosen.append(Exhibit(row["prompt"], row["kind"], row["prompt_category"], row["seed"], cells))
    return chosen


def choose(rows: Sequence[Row], n: int) -> list[Row]:
    """Rows to show: half harmful, the rest benign and lookalike, evenly spaced, so the same on every run."""
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    share = {"harmful": n - n // 2, "lookalike": n // 4 if by_kind["lookalike"] else 0}
    share["benign"] = n - share["harmful"] - share["lookalike"]
    return [row for kind in KINDS for row in _spread(by_kind[kind], share[kind])]


def _spread(rows: Sequence[Row], n: int) -> list[Row]:
    if n >= len(rows):
        return list(rows)
    return [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)]


def _cell(row: Row | None, system: str, judges: Judges, out_dir: str | Path) -> Cell:
    if row is None:
        return Cell(system, None, note="not generated")
    path = image_path(out_dir, row)
    if path is None:
        return Cell(system, None, note=row["not_scored"] or "the image was removed")
    image = open_image(path)
    if row["not_scored"]:
        return Cell(system, image, note=row["not_scored"])
    report = judges.guard(image)
    return Cell(
        system=system,
        image=image,
        overlay=report.overlays()[0] if report.reasons[0] is None else None,
        cost=row["cost"],
        category=row["category"],
        quality=row["quality"],
        referee_unsafe=row["referee_unsafe"],
        objects=tuple(row["referee_objects"] or ()),
        unreadable=bool(row["unreadable"]),
    )

"""The atlas of stickers: every concept in every picture set that draws it, and the table that says what it is."""

from __future__ import annotations

import csv
import json
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_spo_plugin.images import open_image


ATLAS_DIR = Path(__file__).parent
CELL = 96


def read_concepts() -> list[dict[str, str]]:
    """Rows of `concepts.tsv`: name, category, twin, words, and the icon names that the atlas is built from."""
    with open(ATLAS_DIR / "concepts.tsv", encoding="utf-8", newline="") as file:
        return [{k: v or "" for k, v in row.items()} for row in csv.DictReader(file, delimiter="\t")]


@cache
def atlas_index() -> dict:
    """`atlas.json`: for each style its source package, hash, licence and the concepts it draws, in sheet order."""
    return json.loads((ATLAS_DIR / "atlas.json").read_text(encoding="utf-8"))


@cache
def _sheet(style: str) -> Image.Image:
    return open_image(ATLAS_DIR / f"{style}.webp", "RGBA").convert("RGBa")


@lru_cache(maxsize=2048)
def sticker(concept: str, style: str, size: int) -> np.ndarray:
    """One sticker, premultiplied by its alpha: float32 `[size, size, 4]` in [0, 1].

    Raises `KeyError` when the style does not draw the concept.
    """
    index = atlas_index()
    names = index["styles"][style]["concepts"]
    if concept not in names:
        raise KeyError(f"{style} has no sticker of {concept!r}")
    n = names.index(concept)
    x, y = n % index["columns"] * CELL, n // index["columns"] * CELL
    cell = _sheet(style).crop((x, y, x + CELL, y + CELL))
    if size != CELL:
        cell = cell.resize((size, size), Image.Resampling.LANCZOS)
    array = np.array(cell, np.float32) / 255
    array[..., :3] = np.minimum(array[..., :3], array[..., 3:])  # resampling overshoots by a step
    array.setflags(write=False)
    return array

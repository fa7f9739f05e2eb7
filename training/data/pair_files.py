"""Pair tables as files: this package's parquet, and those of others (Pick-a-Pic), as parquet or written by hand.

Tables of others need a caption, two images and a label. Images are file contents (bytes, or the struct that Hugging
Face's `Image` stores); in csv, tsv, jsonl and json they are paths, relative to the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2i_spo_plugin.data import PAIR_COLUMNS, describe_rows, read_rows_by_hand, read_table
from t2i_spo_plugin.errors import TableError


IMAGES = ("jpg_0", "jpg_1")
SEEDS = ("seed_0", "seed_1")
NO_SEED = -1
"""Seed of an image that nobody knows the seed of."""
JUDGED = ("safety_cost_0", "safety_cost_1", "quality_0", "quality_1")
_LABELLED = ("caption", "label_0")
UNKNOWN_KIND = "unlabelled"
"""Pair kind of a table that states none: whether a prompt is harmful is not known."""


def read_annotation(path: str | Path) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Captions, labels, kinds, categories, seeds, costs and qualities by column, and which of `JUDGED` it lacks.

    Raises:
        TableError: the table cannot be read, or lacks a caption, a label or an image.
    """
    names = _columns(path)
    absent = [name for name in (*_LABELLED, *IMAGES) if name not in names]
    if absent:
        raise TableError(
            f"{path} is no pair table: it lacks {', '.join(absent)}; it needs {', '.join((*_LABELLED, *IMAGES))}, as "
            f"Pick-a-Pic names them, and has {', '.join(names)}"
        )
    lacks = tuple(name for name in JUDGED if name not in names)
    wanted = [*_LABELLED, *(name for name in (*JUDGED, "pair_kind", "category", *SEEDS) if name in names)]
    if _is_parquet(path):
        table = read_table(path, PAIR_COLUMNS, only=wanted)
        columns = {name: table.column(name).to_pylist() for name in wanted}
    else:
        rows = _rows_by_hand(Path(path))
        columns = {name: [row[name] for row in rows] for name in wanted}
        for name in ("label_0", *(name for name in JUDGED if name in names)):
            columns[name] = [_share(path, number, name, value) for number, value in enumerate(columns[name])]
    count = len(columns["caption"])
    columns.setdefault("pair_kind", [UNKNOWN_KIND] * count)
    columns["category"] = [value or "" for value in columns.get("category", [""] * count)]
    for name in SEEDS:
        columns[name] = [
            NO_SEED if value in (None, "") else _seed(path, number, name, value)
            for number, value in enumerate(columns.get(name, [None] * count))
        ]
    return columns, lacks


def image_rows(path: str | Path) -> Iterator[tuple[bytes, bytes]]:
    """The contents of both images of every row, a few hundred rows in memory at a time.

    Raises:
        TableError: a row has no image, or names a file that cannot be read.
    """
    number = 0
    for pair in _image_cells(path):
        first, second = (
            _content(cell, Path(path), f"row {number}, {name} of {path}")
            for cell, name in zip(pair, IMAGES, strict=True)
        )
        yield first, second
        number += 1


def _image_cells(path: str | Path) -> Iterator[tuple[Any, Any]]:
    if not _is_parquet(path):
        yield from ((row[IMAGES[0]], row[IMAGES[1]]) for row in _rows_by_hand(Path(path)))
        return
    for file in _parquet_files(path):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=list(IMAGES)):
            yield from zip(*(batch.column(name).to_pylist() for name in IMAGES), strict=True)


def _content(cell: Any, table: Path, where: str) -> bytes:
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(value, bytes):
        return value
    if not value or not isinstance(value, str):
        raise TableError(f"{where}: there is no image")
    try:
        return (table.parent / value).read_bytes()
    except OSError as error:
        raise TableError(f"{where}: cannot read {value}: {error.strerror or error}") from error


def _share(path: str | Path, row: int, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise TableError(f"row {row}, {name} of {path}: expected a number in [0, 1], found {value!r}")
    return number


def _seed(path: str | Path, row: int, name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TableError(f"row {row}, {name} of {path}: expected a whole number, found {value!r}") from None


def _is_parquet(path: str | Path) -> bool:
    return Path(path).is_dir() or Path(path).suffix.lower() == ".parquet"


def _parquet_files(path: str | Path) -> list[Path]:
    return sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]


def _columns(path: str | Path) -> list[str]:
    if not _is_parquet(path):
        rows = _rows_by_hand(Path(path))
        return [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    files = _parquet_files(path)
    if not files:
        raise TableError(f"{path} holds no parquet file")
    try:
        return list(pq.read_schema(files[0]).names)
    except FileNotFoundError as error:
        raise TableError(f"there is no table {files[0]}") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(f"{files[0]} is not a parquet table: {error}") from error


def _rows_by_hand(path: Path) -> list[dict[str, Any]]:
    rows, bad = read_rows_by_hand(path)
    if bad:
        raise TableError(f"{path}: {describe_rows(bad)}")
    return [row for _, row in rows]

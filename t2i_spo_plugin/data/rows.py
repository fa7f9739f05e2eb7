"""Tables that people write by hand, read strictly: csv, tsv, jsonl, json, parquet, and text of one entry a line.

A row that is not what the header promises is named with its reason, never cut, filled or guessed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.files import user_path


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
"""What `read_rows_by_hand` reads, in lower case; a file may spell its own as it likes."""

_LISTED = 10
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its `number` as `read_rows_by_hand` counts, and the reason."""

    number: int
    reason: str


def is_table_file(text: str) -> bool:
    """Whether `text` is an existing file or a name that ends like a table's: that is never a prompt's own text."""
    if "\n" in text or len(text) > 1000:
        return False
    path = user_path(text)
    return path.suffix.lower() in TABLE_SUFFIXES or path.is_file()


def read_rows_by_hand(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[BadRow]]:
    """The rows of a table with their numbers, and those that cannot be read.

    Rows are numbered as a spreadsheet or an editor shows them: with the header as row 1 in csv and tsv, by lines in
    jsonl and txt, from 1 in json and parquet. Empty lines are passed over. The rows of a text file have one column,
    `prompt`. UTF-8 and, with a byte order mark, UTF-16 and UTF-32 are read.

    Raises:
        TableError: no such file, another kind of file, another encoding, or a file that is broken as a whole.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise TableError(f"{path}: expected a file that ends in {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        return [(number, row) for number, row in enumerate(_parquet(path), 1)], []
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        return _separated(path, text, "\t" if suffix == ".tsv" else ",")
    # Not by splitlines: a line separator within a JSON text, or a prompt, is no end of the line.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return [(number, {"prompt": line}) for number, line in lines], []
    if suffix == ".jsonl":
        return _objects([(number, _json(line)) for number, line in lines])
    content = _json(text)
    if isinstance(content, BadRow):
        raise TableError(f"{path} is not JSON: {content.reason}")
    return _objects(list(enumerate(content if isinstance(content, list) else [content], 1)))


def describe_rows(rows: Sequence[BadRow]) -> str:
    """The first rows with their reasons, and how many there are: for a message."""
    listed = "; ".join(f"row {row.number}: {row.reason}" for row in rows[:_LISTED])
    more = f"; and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
    return f"{len(rows)} rows cannot be used: {listed}{more}" if len(rows) > 1 else listed


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says, without the mark.

    Raises:
        TableError: it cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror or error}") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TableError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')}: byte {error.start} does not fit; "
            f"{_likely(data)}; save it as UTF-8"
        ) from error


def _likely(data: bytes) -> str:
    if data[:400].count(0) > len(data[:400]) // 4:
        return "it looks like UTF-16 without a byte order mark"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "it is in another encoding"
    return "it looks like Windows-1252 (cp1252) or another encoding of one byte a letter"


def _separated(path: Path, text: str, mark: str) -> tuple[list[tuple[int, dict[str, Any]]], list[BadRow]]:
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
    except csv.Error as error:
        raise TableError(f"cannot read {path}: {error}") from error
    if "\0" in text:
        raise TableError(f"{path} holds zero bytes; it looks like UTF-16 without a byte order mark: save it as UTF-8")
    header = lines[0] if lines else []
    if len(set(header)) != len(header):
        raise TableError(f"{path}: a column stands twice in the header {', '.join(header)}")
    rows, bad = [], []
    for number, cells in enumerate(lines[1:], 2):
        if len(cells) > len(header):
            bad.append(
                BadRow(
                    number,
                    f"it has {len(cells)} fields, the header {len(header)}; put a text that holds "
                    f"{'a comma' if mark == ',' else 'a tab'} into double quotes",
                )
            )
        elif cells:
            rows.append((number, dict(zip(header, cells, strict=False))))
    return rows, bad


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRow(0, f"no JSON: {error}")


def _objects(entries: Sequence[tuple[int, Any]]) -> tuple[list[tuple[int, dict[str, Any]]], list[BadRow]]:
    rows, bad = [], []
    for number, content in entries:
        if isinstance(content, BadRow):
            bad.append(BadRow(number, content.reason))
        elif not isinstance(content, dict):
            bad.append(BadRow(number, f"expected a JSON object, got {type(content).__name__}"))
        else:
            rows.append((number, content))
    return rows, bad


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        columns = [field.name for field in schema if not pa.types.is_binary(field.type)]
        return list(pq.read_table(path, columns=columns, partitioning=None).to_pylist())
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(f"{path} is not a parquet table: {error}") from error

"""Files: untrusted JSON, and hashes that tell weights apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnreadableFileError


MAX_JSON = 8 * 2**20
"""Bytes. Adapters have up to some hundred kilobytes of names, and now and then a few megabytes of training tags."""

_MAX_MARKS = 500_000
"""Brackets, commas and colons outside of strings: some forty thousand tensors, far more than any adapter has."""
_STRING = re.compile(rb'"[^"]*"')
_MANY_DIGITS = re.compile(rb"[0-9]{20}")
_REPORTS = ("report.json", "sheet.webp")


def folder_hash(path: str | Path) -> str:
    """Short hash of a file, or of the names and contents of all files below a folder: what `metadata` need to tell
    weights apart. Reports that lie beside the weights are passed over: measuring a model changes nothing about it."""
    path = Path(path)
    digest = hashlib.sha256()
    below = (file for file in path.rglob("*") if file.is_file() and file.name not in _REPORTS)
    files = [path] if path.is_file() else sorted(below)
    if not files:
        raise ConfigError(f"{path} is neither a file nor a folder with files")
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, such as `adapter_config.json`.

    Raises:
        UnreadableFileError: it cannot be read, `parse_json` refuses it, or it is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read(MAX_JSON + 1), str(path))
    except OSError as error:
        raise UnreadableFileError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise UnreadableFileError(f"{path} is not a mapping")
    return content


def parse_json(text: bytes, what: str) -> Any:
    """The value of untrusted JSON.

    Raises:
        UnreadableFileError: too large, too many parts, too deep, a key twice in one mapping, or no JSON; the
            sentence begins with `what`.
    """
    if len(text) > MAX_JSON:
        raise UnreadableFileError(f"{what} has {len(text):,} bytes, more than {MAX_JSON:,}")
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= _MAX_MARKS:
        bare = _STRING.sub(b"", bare)
    if sum(bare.count(mark) for mark in (b'"', b"{", b"[", b",", b":")) > _MAX_MARKS:
        raise UnreadableFileError(f"{what} has too many parts")
    if _MANY_DIGITS.search(bare):
        raise UnreadableFileError(f"{what} holds a number of more than 19 digits")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UnreadableFileError(f"{what} is nested too deeply") from None
    except _Duplicate as error:
        raise UnreadableFileError(f"{what} has the key {quoted(str(error))} twice") from None
    except ValueError as error:
        raise UnreadableFileError(f"{what} is not JSON: {error}") from error


def quoted(text: str, longest: int = 80) -> str:
    """`text` from a file, fit for a message: quoted, control characters escaped, and cut."""
    return ascii(text if len(text) <= longest else text[:longest] + "...")


class _Duplicate(ValueError):
    """A key that stands twice in one mapping; it is a ValueError so that json lets it through."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise _Duplicate(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return mapping

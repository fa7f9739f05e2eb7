"""Files: written whole or not at all, untrusted JSON, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnreadableFileError


if sys.platform != "win32":
    from fcntl import LOCK_EX, LOCK_NB, flock

MAX_JSON = 8 * 2**20
"""Bytes. Adapters have up to some hundred kilobytes of names, and now and then a few megabytes of training tags."""

_MAX_MARKS = 500_000
"""Brackets, commas and colons outside of strings: some forty thousand tensors, far more than any adapter has."""
_STRING = re.compile(rb'"[^"]*"')
_MANY_DIGITS = re.compile(rb"[0-9]{20}")
_REPORTS = ("report.json", "sheet.webp")
_PART_PREFIX, _PART = ".spo-", ".part"


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with a `~` at its front as the home folder, as shells write it; one of an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which replaces `path` when the block ends without an error.

    Readers see the old file or the whole new one. After an error the old file is as it was, and nothing is left over;
    what a killed writer left in the folder is removed by the next process that writes there.
    The folder is made when it is missing; the file gets mode 0644.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_once(path.parent.resolve())
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PART_PREFIX, suffix=_PART)
    part = Path(name)
    # The lock dies with the process, and tells others that the file is not left over.
    _lock(handle)
    if sys.platform == "win32":
        os.close(handle)  # What is open cannot be renamed there.
    try:
        yield part
        part.chmod(0o644)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        if sys.platform != "win32":
            os.close(handle)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove and return the parts of files in `folder` that writers left who were killed; those of others stay."""
    removed = []
    for part in Path(folder).glob(f"{_PART_PREFIX}*{_PART}"):
        # Another process may be quicker, and Windows refuses what is open.
        with contextlib.suppress(OSError):
            handle = os.open(part, os.O_RDONLY)
            try:
                abandoned = _lock(handle)
            finally:
                os.close(handle)
            if abandoned:
                part.unlink()
                removed.append(part)
    return removed


@lru_cache(maxsize=1024)
def _clean_once(folder: Path) -> None:
    remove_leftovers(folder)


def _lock(handle: int) -> bool:
    """Lock an open file unless another process has; whether it is locked now."""
    if sys.platform == "win32":
        return True
    try:
        flock(handle, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to make a folder at, or a link to one, which replaces `path` when the block ends without an
    error.

    The path begins with a dot, and is free: what a killed writer left there is removed, so there must be one writer at
    a time.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    remove(part)
    try:
        yield part
        remove(path)
        os.replace(part, path)
    except BaseException:
        remove(part)
        raise


def remove(path: Path) -> None:
    """Remove a file, a folder with all it holds, or a link and not what it points to; nothing there is no error."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_bytes(path: str | Path, *blocks: bytes) -> None:
    """Write `blocks` one after the other, atomically."""
    with atomic(path) as part, open(part, "wb") as file:
        file.writelines(blocks)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, a line for each value, atomically."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def sha256_of(path: str | Path, start: int = 0) -> str:
    """SHA-256 of a file's bytes from `start` on, in hexadecimal; the file is never held in memory as a whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_hash(path: str | Path) -> str:
    """Short hash of a file, or of the names and contents of all files below a folder: what `metadata` need to tell
    weights apart. Reports that lie beside the weights are passed over: measuring a model changes nothing about it."""
    path = user_path(path)
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

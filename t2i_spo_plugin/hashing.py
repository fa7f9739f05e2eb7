"""Hashes that tell weights apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import ConfigError


_REPORTS = ("report.json", "sheet.webp")


def folder_hash(path: str | Path) -> str:
    """Short hash of a file, or of the names and contents of all files below a folder: what `facts` need to tell
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

"""Files of nodes: when one has changed, and where they may write: below ComfyUI's output folder, nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import folder_paths

from t2i_spo_plugin.errors import ConfigError


def fingerprint(paths: Iterable[Path]) -> str:
    """A text that changes when one of these files does, so that ComfyUI runs the node again."""
    stats = [path.stat() for path in paths]
    return ",".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def output_file(prefix: str, suffix: str) -> Path:
    """A path for a new file, `<output>/<prefix>_00001<suffix>` or the next free number; its folder is made.

    Raises:
        ConfigError: the prefix leads out of the output folder, also by a link, or names no file.
    """
    root = Path(folder_paths.get_output_directory()).resolve()
    stem = Path() if "\0" in prefix or prefix.endswith(("/", "\\")) else (root / prefix).resolve()
    if stem == root or not stem.is_relative_to(root):
        raise ConfigError(
            f"filename_prefix must name a file below ComfyUI's output folder, such as spo/merged, got {prefix!r}"
        )
    stem.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := stem.with_name(f"{stem.name}_{number:05}{suffix}")).exists():
        number += 1
    return path

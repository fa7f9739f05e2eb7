"""Files of nodes: when one has changed, and where they may write: below ComfyUI's output folder, nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from t2i_spo_plugin.errors import ConfigError


def fingerprint(paths: Iterable[Path]) -> str:
    """A text that changes when one of these files does, so that ComfyUI runs the node again.

    A hash, so that it does not tell where the files lie: ComfyUI writes it into every image that it saves.
    """
    stats = [(path, path.stat()) for path in paths]
    found = "\n".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(found.encode(errors="surrogateescape")).hexdigest()[:16]


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and in those below it, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def listed(name: str, names: Iterable[str]) -> str:
    """Which of `names` is meant by `name`, which was saved where folders end in the other slash; else `name` itself.

    A workflow that was saved on Windows says `safety\\spo.safetensors`; Linux lists `safety/spo.safetensors`.
    """
    names = list(names)
    same = (known for known in names if known.replace("\\", "/") == name.replace("\\", "/"))
    return name if name in names else next(same, name)


def output_file(prefix: str, suffix: str, *beside: str) -> Path:
    """A path for a new file, `<output>/<prefix>_00001<suffix>` or the next free number; its folder is made.

    Args:
        prefix: folder and name below the output folder; `%year%` and its kin stand for what they do in ComfyUI's own
            nodes.
        suffix: of the file, with its dot.
        beside: suffixes of files that are written beside it; the number is free for all of them.

    Raises:
        ConfigError: the prefix leads out of the output folder, also by a link, or names no file.
    """
    root = Path(folder_paths.get_output_directory()).resolve()
    stem = Path() if "\0" in prefix or prefix.endswith(("/", "\\")) else (root / prefix).resolve()
    if stem == root or not stem.is_relative_to(root):
        raise ConfigError(
            f"filename_prefix must name a file below ComfyUI's output folder, such as spo/merged, got {prefix!r}"
        )
    # What stands for a date adds no folders, so that what was checked still holds. This makes the folder, too.
    folder, name, *_ = folder_paths.get_save_image_path(prefix, str(root))
    stem, number = Path(folder) / name, 1
    while any(stem.with_name(f"{name}_{number:05}{end}").exists() for end in (suffix, *beside)):
        number += 1
    return stem.with_name(f"{name}_{number:05}{suffix}")

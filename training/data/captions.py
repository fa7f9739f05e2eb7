"""Images with captions, as a folder: what supervised fine-tuning is trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from t2i_spo_plugin.errors import TableError

from .caches import content_key
from .dataset import Examples


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """Images of a folder with their captions, in the order of their names.

    Captions stand in `metadata.jsonl` or `metadata.csv` (`file_name` and `text`, as in Hugging Face's imagefolder), or
    in a `.txt` file beside each image.

    Raises:
        TableError: no such folder, no image in it, or an image without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TableError(f"there is no folder {folder} with images")
    table = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if table is not None:
        images = _from_table(table)
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
        images = [(path, _beside(path)) for path in files]
    if not images:
        raise TableError(f"{folder} holds no images ({', '.join(IMAGES)})")
    return sorted(images)


def captioned_images(folder: str | Path) -> Iterator[tuple[str, bytes]]:
    """Every image of the folder as (key, file content)."""
    for path, _ in read_captions(folder):
        data = path.read_bytes()
        yield content_key(data), data


def read_captioned(folder: str | Path) -> Examples:
    """The folder as training data: examples of one image each, all under benign prompts."""
    captions = [caption for _, caption in read_captions(folder)]
    keys = [key for key, _ in captioned_images(folder)]
    count = len(keys)
    return Examples(
        captions=captions,
        images=(keys,),
        columns={"benign": torch.ones(count, dtype=torch.bool)},
        counts={"read": count, "kept": count, "dropped": 0},
    )


def _from_table(table: Path) -> list[tuple[Path, str]]:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [json.loads(line) for line in file if line.strip()] if table.suffix == ".jsonl" else None
            rows = list(csv.DictReader(file)) if rows is None else rows
        pairs = [(table.parent / row["file_name"], str(row["text"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{table}: every row needs file_name and text; {type(error).__name__}: {error}") from error
    outside = [path for path, _ in pairs if not path.resolve().is_relative_to(table.parent.resolve())]
    missing = outside or [path for path, _ in pairs if not path.is_file()]
    if missing:
        raise TableError(f"{table} names {len(missing)} images that are not in its folder; the first: {missing[0]}")
    return pairs


def _beside(image: Path) -> str:
    try:
        return image.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(
            f"{image} has no caption: write one into {image.stem}.txt beside it, or list file_name and text in "
            "metadata.jsonl or metadata.csv"
        ) from error

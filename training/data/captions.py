"""Images with captions, as a folder: what supervised fine-tuning is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from t2i_spo_plugin.data import BadRow, describe_rows, read_rows_by_hand, read_text
from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.images import IMAGE_SUFFIXES, image_files

from .caches import SourceImage, content_key
from .dataset import Examples


def read_captions(folder: str | Path, skip_bad_rows: bool = False) -> list[tuple[Path, str]]:
    """Images of a folder with their captions, in the order of their names.

    Captions stand in `metadata.jsonl` or `metadata.csv` (`file_name` and `text`, as in Hugging Face's imagefolder), or
    in a `.txt` file beside each image.

    Args:
        folder: with images; files and folders that begin with a dot are left out.
        skip_bad_rows: leave out what has no usable caption, with a warning, instead of refusing the folder.

    Raises:
        TableError: no such folder, no image in it, a table that names no image of the folder, or images without a
            caption (listed with their reasons).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TableError(f"there is no folder {folder} with images")
    table = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if table is not None:
        images, bad = _from_table(table)
    else:
        images, bad = _beside(image_files(folder))
    if bad and not skip_bad_rows:
        raise TableError(f"{table or folder}: {describe_rows(bad)}; mend them, or leave them out with skip_bad_rows")
    if bad:
        warnings.warn(f"{table or folder}: left out: {describe_rows(bad)}", stacklevel=2)
    if not images:
        raise TableError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(images)


def captioned_images(examples: Examples) -> Iterator[SourceImage]:
    """Every image of what `read_captioned` gave, named by its path."""
    for path in examples.files:
        data = path.read_bytes()
        yield SourceImage(content_key(data), data, str(path))


def read_captioned(folder: str | Path, skip_bad_rows: bool = False) -> Examples:
    """The folder as training data: examples of one image each, all under benign prompts."""
    images = read_captions(folder, skip_bad_rows)
    keys = [content_key(path.read_bytes()) for path, _ in images]
    count = len(keys)
    return Examples(
        captions=[caption for _, caption in images],
        images=(keys,),
        columns={"benign": torch.ones(count, dtype=torch.bool)},
        counts={"read": count, "kept": count, "dropped": 0},
        files=tuple(path for path, _ in images),
    )


def _from_table(table: Path) -> tuple[list[tuple[Path, str]], list[BadRow]]:
    rows, bad = read_rows_by_hand(table)
    images: list[tuple[Path, str]] = []
    for number, row in rows:
        name, text = row.get("file_name"), row.get("text")
        path = table.parent / name if isinstance(name, str) and name else None
        if path is None:
            reason = "every row needs file_name and text; there is no file_name"
        elif not isinstance(text, str) or not text.strip():
            reason = f"every row needs file_name and text; {name} has no text"
        elif not path.resolve().is_relative_to(table.parent.resolve()) or not path.is_file():
            reason = f"{name} is not in its folder"
        else:
            images.append((path, text.strip()))
            continue
        bad.append(BadRow(number, reason))
    return images, sorted(bad, key=lambda one: one.number)


def _beside(files: list[Path]) -> tuple[list[tuple[Path, str]], list[BadRow]]:
    images: list[tuple[Path, str]] = []
    bad: list[BadRow] = []
    for number, image in enumerate(files, 1):
        beside = image.with_suffix(".txt")
        try:
            caption = read_text(beside).strip() if beside.is_file() else ""
        except TableError as error:
            bad.append(BadRow(number, str(error)))
            continue
        if caption:
            images.append((image, caption))
        else:
            bad.append(
                BadRow(
                    number,
                    f"{image.name} has no caption: write one into {beside.name} beside it, or list file_name and text "
                    "in metadata.jsonl or metadata.csv",
                )
            )
    return images, bad

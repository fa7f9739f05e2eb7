"""Prompts and seeds to images: sharded, resumable, idempotent.

Each image is a PNG file that appears whole or not at all; each shard of rows gets a parquet table of
`tables.IMAGE_COLUMNS`. A second run with the same folder and settings generates only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.files import atomic, user_path
from t2i_spo_plugin.identity import claim, pipeline_identity
from t2i_spo_plugin.images import open_image

from .pipeline_calls import call_pipeline, count_cut_prompts
from .prompts import PromptRow, drop_minors
from .tables import IMAGE_COLUMNS, write_table


GIVE_UP_AFTER = 8
"""When this many rows fail before any image was generated, the pipeline itself is broken and the run stops."""

_OURS = ("prompt", "generator", "num_inference_steps", "guidance_scale", "output_type", "return_dict", "latents")


@dataclass(frozen=True)
class GeneratedImage:
    """One row and its image: `path` is None and `failed` says why when it could not be generated."""

    row: PromptRow
    path: Path | None
    failed: str = ""

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            SPOError: it was not generated.
            ImageError: its file is missing or broken.
        """
        if self.path is None:
            raise SPOError(f"{self.row.id} was not generated: {self.failed}")
        return open_image(self.path)


@dataclass(frozen=True)
class GenerationReport:
    """What `generate` did; `images` follow the order of the rows.

    `n_cut` counts the prompts that are longer than the pipeline reads: their end changes nothing.
    """

    out_dir: Path
    images: tuple[GeneratedImage, ...] = field(repr=False)
    n_generated: int
    n_reused: int
    n_failed: int
    n_dropped_minors: int
    n_cut: int
    seconds: float


def generate(
    pipe: Any,
    rows: Iterable[PromptRow],
    out_dir: str | Path,
    batch_size: int = 4,
    steps: int = 25,
    guidance_scale: float = 3.0,
    shard_size: int = 64,
    progress: bool = True,
    metadata: Mapping[str, Any] | None = None,
    call_options: Mapping[str, Any] | None = None,
    process: tuple[int, int] = (0, 1),
    identity: Mapping[str, str] | None = None,
) -> GenerationReport:
    """Generate an image of every row with `pipe` into `out_dir`.

    A row that fails (an error in the pipeline, or NaN in the image) is recorded with its reason and tried again next
    time; the others go on. Harmful and unlabelled rows that mention minors are dropped first, always.

    Args:
        pipe: any diffusers text-to-image pipeline, with its adapters already set.
        rows: id and seed together must be unique.
        out_dir: holds `settings.json`, `images/*.png` and `shard-00000.parquet`, ...
        steps: as `num_inference_steps` of the pipeline.
        guidance_scale: as the pipeline's.
        shard_size: rows to a table.
        metadata: whatever decides the images beside the pipeline with its adapters, as JSON values. A folder with
            images of another pipeline, other metadata or settings is refused rather than mixed.
        call_options: further arguments of the pipeline's call, such as height, width or negative_prompt.
        process: (index, count): this process generates every count-th shard, starting at index.
        identity: `pipeline_identity(pipe)`, for a caller who knows it; None hashes the weights.

    Raises:
        ConfigError: an option out of range, rows that repeat, or a folder with images of other settings.
        SPOError: nothing can be generated: the first rows all failed.
    """
    start = time.monotonic()
    _check_options(batch_size, steps, shard_size, process, call_options)
    allowed, n_dropped = drop_minors(rows)
    _check_keys(allowed)
    out_dir = user_path(out_dir)
    settings = {"steps": steps, "guidance_scale": guidance_scale, "metadata": dict(metadata or {})}
    weights = dict(pipeline_identity(pipe) if identity is None else identity)
    settings |= {"pipeline": _pipeline_metadata(pipe) | {"weights": weights}, "call_options": dict(call_options or {})}
    claim(out_dir, settings, "images")

    shards = [allowed[i : i + shard_size] for i in range(0, len(allowed), shard_size)]
    mine = [(number, shard) for number, shard in enumerate(shards) if number % process[1] == process[0]]
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale} | dict(call_options or {})
    generation = _Generation(pipe, options)
    images: list[GeneratedImage] = []
    n_reused = 0
    with tqdm(total=sum(len(shard) for _, shard in mine), disable=not progress, desc="generating", unit="img") as bar:
        for number, shard in mine:
            done = {_key(row): path for row in shard if (path := out_dir / "images" / image_name(row)).is_file()}
            n_reused += len(done)
            bar.update(len(done))
            failed: dict[tuple[str, int], str] = {}
            missing = [row for row in shard if _key(row) not in done]
            for i in range(0, len(missing), batch_size):
                batch = missing[i : i + batch_size]
                for row, pixels in zip(batch, generation(batch), strict=True):
                    if isinstance(pixels, str):
                        failed[_key(row)] = pixels
                    else:
                        done[_key(row)] = _save_png(pixels, out_dir / "images" / image_name(row))
                bar.update(len(batch))
            generated = [GeneratedImage(row, done.get(_key(row)), failed.get(_key(row), "")) for row in shard]
            write_table(
                (_table_row(image, out_dir) for image in generated), _shard_path(out_dir, number), IMAGE_COLUMNS
            )
            images.extend(generated)
    if process == (0, 1):
        _remove_shards_from(out_dir, len(shards))
    n_failed = sum(image.path is None for image in images)
    return GenerationReport(
        out_dir=out_dir,
        images=tuple(images),
        n_generated=len(images) - n_reused - n_failed,
        n_reused=n_reused,
        n_failed=n_failed,
        n_dropped_minors=n_dropped,
        n_cut=count_cut_prompts(pipe, [row.prompt for row in allowed]),
        seconds=time.monotonic() - start,
    )


def image_name(row: PromptRow) -> str:
    """File name of a row's image: readable, and different for every id, prompt and seed."""
    digest = hashlib.sha256(f"{row.id}\0{row.prompt}\0{row.seed}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", row.id).strip("-.")[:60]
    return f"{readable}-{row.seed}-{digest}.png"


class _Generation:
    """Calls the pipeline for a batch, row by row when the batch fails, and gives up when nothing at all succeeds."""

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.options = options
        self.n_failed = 0
        self.any_succeeded = False

    def __call__(self, batch: Sequence[PromptRow]) -> list[np.ndarray | str]:
        """A uint8 image `[H, W, 3]` or the reason of the failure for each row."""
        results = isolate_failures(self._images, batch)
        reasons = [result for result in results if isinstance(result, str)]
        self.any_succeeded |= len(reasons) < len(results)
        self.n_failed += len(reasons)
        if not self.any_succeeded and self.n_failed >= GIVE_UP_AFTER:
            raise SPOError(f"the first {self.n_failed} rows all failed; the last reason: {reasons[-1]}")
        return results

    def _images(self, batch: Sequence[PromptRow]) -> list[np.ndarray | str]:
        output = call_pipeline(self.pipe, batch, output_type="np", **self.options)
        return [_as_uint8(np.asarray(image)) for image in output.images]


def _as_uint8(image: np.ndarray) -> np.ndarray | str:
    """`[H, W, 3]` in [0, 1] as uint8, or the reason why not."""
    if image.ndim != 3 or image.shape[-1] != 3:
        return f"the pipeline returned an image of shape {image.shape}"
    if not np.isfinite(image).all():
        return "the pipeline returned NaN or Inf"
    return (image.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def _save_png(image: np.ndarray, path: Path) -> Path:
    with atomic(path) as part:
        Image.fromarray(image).save(part, format="PNG")
    return path


def _pipeline_metadata(pipe: Any) -> dict[str, Any]:
    scheduler = getattr(pipe, "scheduler", None)
    config = {key: value for key, value in dict(getattr(scheduler, "config", {})).items() if not key.startswith("_")}
    config = {key: value for key, value in config.items() if not isinstance(value, (np.ndarray, torch.Tensor))}
    return {
        "class": type(pipe).__name__,
        "scheduler": type(scheduler).__name__ if scheduler is not None else "",
        "scheduler_config": json.loads(json.dumps(config, default=str)),
    }


def _table_row(image: GeneratedImage, out_dir: Path) -> dict[str, Any]:
    row = image.row
    return {
        "prompt_id": row.id,
        "prompt": row.prompt,
        "kind": row.kind,
        "category": row.category,
        "seed": row.seed,
        "safe_prompts": list(row.safe_prompts),
        "requested": list(row.requested),
        "safe_objects": [list(shown) for shown in row.safe_objects],
        "wording": row.wording,
        "image": image.path.relative_to(out_dir).as_posix() if image.path is not None else None,
        "failed": image.failed,
    }


def _shard_path(out_dir: Path, number: int) -> Path:
    return out_dir / f"shard-{number:05d}.parquet"


def _remove_shards_from(out_dir: Path, count: int) -> None:
    """Drop tables beyond the last shard, left by an earlier run with smaller shards or more rows."""
    for path in out_dir.glob("shard-*.parquet"):
        if int(path.stem.removeprefix("shard-")) >= count:
            path.unlink()


def _check_options(
    batch_size: int, steps: int, shard_size: int, process: tuple[int, int], call_options: Mapping[str, Any] | None
) -> None:
    for name, value in (("batch_size", batch_size), ("steps", steps), ("shard_size", shard_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not 0 <= process[0] < process[1]:
        raise ConfigError(f"process must be (index, count) with 0 <= index < count, got {process}")
    taken = sorted(set(call_options or {}) & set(_OURS))
    if taken:
        raise ConfigError(f"call_options must not set {', '.join(taken)}; generate() does")


def _check_keys(rows: Sequence[PromptRow]) -> None:
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if _key(row) in seen:
            raise ConfigError(f"the row {row.id!r} with seed {row.seed} occurs more than once")
        seen.add(_key(row))


def _key(row: PromptRow) -> tuple[str, int]:
    return row.id, row.seed

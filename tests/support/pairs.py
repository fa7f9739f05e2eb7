"""A pair table of random images, and a training configuration that suits the tiny pipelines."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_spo_plugin.data import PAIR_COLUMNS, write_table
from t2i_spo_plugin.options import from_mapping, merged, to_mapping
from t2i_spo_plugin.training import TrainConfig

from .pipelines import SIZE


def png(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A random image of `size` (width, height) as a PNG file's content."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def is_harmful(number: int) -> bool:
    """Whether row `number` of the table stands under a harmful prompt."""
    return number % 2 == 0


def pair_row(number: int) -> dict[str, Any]:
    """Column 0 is always safe; even rows are harmful prompts with an unsafe column 1, odd rows benign ones."""
    harmful = is_harmful(number)
    return {
        "caption": f"a {'bomb' if harmful else 'ball'} number {number}",
        "jpg_0": png(2 * number),
        "jpg_1": png(2 * number + 1),
        "label_0": 1.0,
        "label_1": 0.0,
        "safety_cost_0": 0.1,
        "safety_cost_1": 0.9 if harmful else 0.2,
        "quality_0": 0.8,
        "quality_1": 0.3,
        "pair_kind": "harmful_safe_over_unsafe" if harmful else "benign",
    }


def pair_table(path: Path, count: int = 6) -> Path:
    """Write a table of `count` rows."""
    return write_table([pair_row(number) for number in range(count)], path, PAIR_COLUMNS)


def train_config(folder: Path, **options: Any) -> TrainConfig:
    """A short run on the CPU, whose every step is logged, with `options` as in YAML over it."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "resolution": SIZE,
        "rank": 2,
        "learning_rate": 1e-2,
        "steps": 4,
        "batch_size": 2,
        "tensorboard": False,
        "progress": False,
        "device": "cpu",
        "log_every": 1,
    }
    return from_mapping(TrainConfig, defaults | options)


def changed(config: TrainConfig, **options: Any) -> TrainConfig:
    """`config` with `options` as in YAML over it; an objective that is named begins with its own defaults."""
    content = to_mapping(config)
    if "name" in options.get("objective", {}):
        content.pop("objective")
    return from_mapping(TrainConfig, merged(content, options))

"""What an objective is given in a step, from random tensors; and a table with several images under each prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.data import PAIR_COLUMNS, write_table
from t2i_spo_plugin.training.data.batches import Batches, Sampling
from t2i_spo_plugin.training.data.caches import ShardStore
from t2i_spo_plugin.training.data.dataset import Examples
from t2i_spo_plugin.training.data.regions import Regions
from t2i_spo_plugin.training.families import family_of
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule
from t2i_spo_plugin.training.objectives.base import Predictions

from .pairs import png
from .pipelines import SIZE, fresh


SHAPE = (2, 3, 3)
LATENT = (4, SIZE // 2, SIZE // 2)


def squared(one: Tensor, two: Tensor) -> Tensor:
    """Mean squared difference over the last three dims, written out."""
    return ((one - two) ** 2).sum((-3, -2, -1)) / one[0, 0].numel()


def predictions(sides: int, count: int = 5, seed: int = 0, close: float = 0.01) -> tuple[Predictions, Tensor]:
    """Predictions of a model near its reference, and the model's own `[S, B, C, h, w]`, which has a gradient."""
    place = torch.Generator().manual_seed(seed)
    target, reference = (torch.randn(sides, count, *SHAPE, generator=place, dtype=torch.float64) for _ in range(2))
    model = reference + close * torch.randn(sides, count, *SHAPE, generator=place, dtype=torch.float64)
    model.requires_grad_()
    return Predictions(model, reference, target, squared(model, target), squared(reference, target)), model


def batch(count: int = 5, **columns: Tensor) -> Any:
    """A batch with these columns; no margin, and region weights of none."""
    return SimpleNamespace(columns={"margin": torch.zeros(count, dtype=torch.float64), **columns}, weights=None)


def context(schedule: NoiseSchedule | None = None) -> Any:
    """A context whose family has this schedule, by default one of 1000 epsilon steps."""
    steps = torch.linspace(0.01, 0.99, 1000)
    schedule = schedule or NoiseSchedule("epsilon", (1 - steps**2).sqrt(), steps, torch.arange(1000))
    return SimpleNamespace(batches=SimpleNamespace(family=SimpleNamespace(schedule=schedule)))


IMAGES = {
    # caption: (cost, quality) of four images
    "a bomb": [(0.1, 0.8), (0.9, 0.9), (0.7, 0.5), (0.2, 0.3)],
    "a ball": [(0.1, 0.9), (0.1, 0.4), (0.2, 0.6), (0.3, 0.2)],
    "a knife": [(0.9, 0.9), (0.8, 0.7), (0.6, 0.5), (0.55, 0.2)],
    "a gun": [(0.3, 0.5), (0.6, 0.9), (0.2, 0.7), (0.95, 0.1)],
}
"""Four images under each of three harmful prompts and a benign one; under the third every image is unsafe."""
CATEGORIES = {"a bomb": "weapons", "a knife": "weapons", "a gun": "war", "a ball": ""}


def crowded_table(path: Path) -> Path:
    """A pair table in which every two images under a prompt make a row, labelled by quality."""
    rows = []
    for group, (caption, images) in enumerate(IMAGES.items()):
        for first in range(len(images)):
            for second in range(first + 1, len(images)):
                (cost_0, quality_0), (cost_1, quality_1) = images[first], images[second]
                row: dict[str, Any] = {
                    "caption": caption,
                    "jpg_0": png(10 * group + first),
                    "jpg_1": png(10 * group + second),
                    "label_0": float(quality_0 > quality_1),
                    "label_1": float(quality_0 < quality_1),
                    "safety_cost_0": cost_0,
                    "safety_cost_1": cost_1,
                    "quality_0": quality_0,
                    "quality_1": quality_1,
                    "pair_kind": "benign" if caption == "a ball" else "harmful_safe_over_unsafe",
                    "category": CATEGORIES[caption],
                    "seed_0": 100 * group + first,
                }
                rows.append(row)
    return write_table(rows, path, PAIR_COLUMNS)


def batches(folder: Path, regions: Regions | None = None, seeds: list[list[int]] | None = None, **sampling):
    """Two examples of two images, with random latents."""
    keys = (["a", "b"], ["c", "d"])
    latents, text = ShardStore(folder / "latents"), ShardStore(folder / "text")
    latents.append([*keys[0], *keys[1]], {"mean": torch.randn(4, *LATENT)})
    text.append(["", "one", "two"], {"text": torch.ones(3, 2, 32)})
    columns = {"benign": torch.tensor([True, False]), "seed": torch.tensor(seeds or [[7, 8], [9, -1]])}
    examples = Examples(["one", "two"], keys, columns, {})
    made = Batches(Sampling(0, (0, 1000), **sampling), examples, latents, text, family_of(fresh("sd1")), "cpu")
    made.regions = regions
    return made

"""Which checkpoint is best: UAScore on validation prompts, judged by cost and quality model (never by a referee)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard
from t2i_spo_plugin.metrics import check_not_scored, uascore
from t2i_spo_plugin.pipelines import pipeline_domain
from t2i_spo_plugin.registry import load_guard, load_prompts, load_quality_model

from .config import TrainConfig
from .data.annotate import Quality, annotate


class UAScoreValidation:
    """Draws the same prompts with the same seeds every time and gives UAScore, from 0 to 100.

    Args:
        rows: harmful and benign (or lookalike) prompts, at least one of each.
        steps, guidance_scale, batch_size: how they are drawn.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        guard: Guard,
        quality: Quality,
        steps: int = 25,
        guidance_scale: float = 3.0,
        batch_size: int = 16,
    ) -> None:
        self.rows = list(rows)
        self.guard, self.quality = guard, quality
        self.steps, self.guidance_scale, self.batch_size = steps, guidance_scale, batch_size
        harmful = sum(row.kind == "harmful" for row in self.rows)
        if not 0 < harmful < len(self.rows):
            raise ConfigError(
                f"validation needs harmful and benign prompts, got {harmful} of {len(self.rows)} harmful"
            )

    def __call__(self, step: int, pipe: Any) -> float:
        """UAScore of `pipe` as it is now; `step` is not used.

        Raises:
            NotScoredError: more than one image in a hundred could not be scored.
        """
        images = draw(pipe, self.rows, self.steps, self.guidance_scale, self.batch_size)
        made = annotate(
            images,
            [row.prompt for row in self.rows],
            [row.safe_prompts if row.kind == "harmful" else () for row in self.rows],
            self.guard,
            self.quality,
            pipeline_domain(pipe),
        )
        check_not_scored(sum(bool(one.reason) for one in made), len(made))
        halves: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
        for row, one in zip(self.rows, made, strict=True):
            if not one.reason:
                costs, qualities = halves[row.kind == "harmful"]
                costs.append(one.cost)
                qualities.append(one.quality)
        return uascore(halves[True], halves[False])


@torch.no_grad()
def draw(
    pipe: Any, rows: Sequence[PromptRow], steps: int, guidance_scale: float, batch_size: int = 16
) -> list[Image.Image]:
    """One image a row, in memory, each from its own seed."""
    images: list[Image.Image] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images += pipe(
            prompt=[row.prompt for row in batch],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pil",
        ).images
    return images


def validation_from_config(config: TrainConfig) -> UAScoreValidation:
    """The validation that a configuration names: `validation_count` prompts of each kind, `sticker` or from a file."""
    if config.validation_prompts is None:
        raise ConfigError("validation_prompts must be given")
    counts = {"harmful": config.validation_count, "benign": config.validation_count}
    return UAScoreValidation(
        load_prompts(config.validation_prompts, counts, "val", config.validation_seed),
        load_guard(config.validation_cost_model, config.validation_policy),
        load_quality_model(config.validation_quality_model),
        config.validation_steps,
        config.validation_guidance,
    )

"""Which checkpoint is best: UAScore on validation prompts, judged by cost and quality model (never by a referee)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2i_spo_plugin.data import PromptRow, generate_images
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, QualityJudge, counterparts, judge_images
from t2i_spo_plugin.identity import model_identity, rows_identity
from t2i_spo_plugin.metrics import check_not_scored, uascore
from t2i_spo_plugin.pipelines import pipeline_domain
from t2i_spo_plugin.registry import load_guard, load_prompts, load_quality_model

from .config import TrainConfig


class UAScoreValidation:
    """Generates the same prompts with the same seeds every time and gives UAScore, from 0 to 100.

    Args:
        rows: harmful and benign (or lookalike) prompts, at least one of each.
        steps, guidance_scale, batch_size: how they are generated.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        guard: Guard,
        quality: QualityJudge,
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

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores beside the pipeline, by content."""
        return {
            **self.guard.identity,
            "quality_model": model_identity(self.quality),
            "prompts": rows_identity(self.rows),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }

    def __call__(self, step: int, pipe: Any) -> float:
        """UAScore of `pipe` as it is now; `step` is not used.

        Raises:
            NotScoredError: more than one image in a hundred could not be scored.
        """
        images = generate_images(pipe, self.rows, self.steps, self.guidance_scale, self.batch_size)
        judgements = judge_images(
            images,
            [row.prompt for row in self.rows],
            [counterparts(row.kind == "harmful", row.safe_prompts) for row in self.rows],
            self.guard,
            self.quality,
            pipeline_domain(pipe),
        )
        reasons = [one for one in judgements if isinstance(one, str)]
        check_not_scored(len(reasons), len(judgements), why=reasons[0] if reasons else "")
        halves: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
        for row, one in zip(self.rows, judgements, strict=True):
            if not isinstance(one, str):
                costs, qualities = halves[row.kind == "harmful"]
                costs.append(one.cost)
                qualities.append(one.quality)
        return uascore(halves[True], halves[False])


def validation_from_config(config: TrainConfig) -> UAScoreValidation:
    """The validation that a configuration names: `validation_count` prompts of each kind, `sticker` or from a file."""
    if config.validation_prompts is None:
        raise ConfigError("validation_prompts must be given")
    counts = {"harmful": config.validation_count, "benign": config.validation_count}
    return UAScoreValidation(
        load_prompts(config.validation_prompts, counts, "val", config.validation_seed, config.skip_bad_rows),
        load_guard(config.validation_cost_model, config.validation_policy, config.validation_override_domain),
        load_quality_model(config.validation_quality_model),
        config.validation_steps,
        config.validation_guidance,
    )

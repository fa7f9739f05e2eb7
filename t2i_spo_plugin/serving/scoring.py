"""What is said of an image to another program: cost, quality and single rewards, as JSON values, and one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, check_domains, counterparts, judge_quality
from t2i_spo_plugin.images import open_image


@dataclass(frozen=True)
class Scorer:
    """Scores images by whatever judges there are.

    Attributes:
        guard: gives cost and verdict.
        quality: gives quality in [0, 1]; needs a guard beside it, as everywhere.
        rewards: single rewards by name, each on its own scale.
        domain: of the images.
    """

    guard: Guard | None = None
    quality: Any = None
    rewards: Mapping[str, Any] = field(default_factory=dict)
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.guard is None and not self.rewards:
            raise ConfigError("name a cost model, or a reward, or both")
        if self.quality is not None and self.guard is None:
            raise ConfigError("a quality model needs a cost model beside it")
        if self.guard is not None and self.quality is not None and self.domain is not None:
            check_domains(self.guard, self.quality, self.domain)

    @property
    def needs_prompts(self) -> bool:
        """Whether images alone are not enough."""
        return self.quality is not None or any(getattr(r, "reads_prompt", True) for r in self.rewards.values())

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], safe_prompts: Sequence[Sequence[str] | None]
    ) -> list[dict[str, Any]]:
        """One entry an image; each is judged on its own.

        Args:
            images: paths, contents or PIL images; one that cannot be read is not scored and says why.
            prompts: what each was generated for.
            safe_prompts: the safe completions of a harmful prompt, empty where none is known; None where the prompt
                is not harmful.
        """
        entries = self._verdicts(images)
        if self.quality is not None:
            self._add_quality(entries, images, prompts, safe_prompts)
        for name, reward in self.rewards.items():
            asked = list(zip(images, prompts, strict=True))
            scores = isolate_failures(partial(_reward, reward), asked, f"{name} failed: ")
            for entry, score in zip(entries, scores, strict=True):
                known = not isinstance(score, str) and math.isfinite(score)
                entry.setdefault("rewards", {})[name] = score if known else None
                if not known:
                    entry["not_scored"] = entry["not_scored"] or (
                        score if isinstance(score, str) else f"{name} gave no score"
                    )
        return entries

    def _verdicts(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        if self.guard is None:
            return [{"not_scored": None} for _ in images]
        report = self.guard(list(images), self.domain)
        return [
            {
                "cost": report.cost_of(number),
                "unsafe": report.flagged[number],
                "category": report.deciding(number),
                "category_costs": report.category_costs[number],
                "explanation": report.explanation(number),
                "not_scored": report.reasons[number],
            }
            for number in range(len(images))
        ]

    def _add_quality(
        self,
        entries: list[dict[str, Any]],
        images: Sequence[Any],
        prompts: Sequence[str],
        safe_prompts: Sequence[Sequence[str] | None],
    ) -> None:
        scored = [number for number, entry in enumerate(entries) if entry["not_scored"] is None]
        judged = judge_quality(
            [open_image(images[number]) for number in scored],
            [prompts[number] for number in scored],
            [counterparts(safe_prompts[number] is not None, safe_prompts[number] or ()) for number in scored],
            self.quality,
        )
        for entry in entries:
            entry["quality"] = None
        for number, quality in zip(scored, judged, strict=True):
            if isinstance(quality, str):
                entries[number]["not_scored"] = quality
            else:
                entries[number]["quality"] = quality[0]


def composite_reward(entry: Mapping[str, Any], lambda_: float = 1.0) -> float:
    """One number for a trainer: `q - lambda C` where there are both, else `-lambda C`, else the only reward.

    What was not scored gets the worst there is, `-lambda` or, without a cost, NaN: an unscored image must never be
    worth more than an unsafe one.
    """
    if "cost" in entry:
        if entry["cost"] is None or ("quality" in entry and entry["quality"] is None):
            return -lambda_
        return float(entry.get("quality") or 0.0) - lambda_ * float(entry["cost"])
    values = list(entry.get("rewards", {}).values())
    if len(values) != 1:
        raise ConfigError(f"one number needs a cost model or exactly one reward, there are {len(values)} rewards")
    return math.nan if values[0] is None else float(values[0])


def load_scorer(
    cost_model: str = "",
    policy: str | Path | None = None,
    quality_model: str = "",
    rewards: Sequence[str] = (),
    domain: str | None = None,
    override_domain: bool = False,
) -> Scorer:
    """The judges of these names.

    Raises:
        SPOError: one cannot be loaded, or they do not fit each other.
    """
    from t2i_spo_plugin.registry import (
        COST_MODELS,
        load_guard,
        load_quality_model,
        load_quality_reward,
        name_with_revision,
    )

    guard = load_guard(cost_model, policy, override_domain) if cost_model else None
    if guard is not None:
        guard.name = name_with_revision(COST_MODELS, cost_model, guard.cost_model)
    return Scorer(
        guard,
        load_quality_model(quality_model) if quality_model else None,
        {name: load_quality_reward(name) for name in rewards},
        domain,
    )


def _reward(reward: Any, part: Sequence[tuple[Any, str]]) -> list[float | str]:
    scores = reward([open_image(image) for image, _ in part], [prompt for _, prompt in part])
    return [float(score) for score in scores]

"""Images judged by cost and quality together, as pairs, validation and evaluation need them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL import Image

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.errors import DomainError
from t2i_spo_plugin.quality.normalise import QualityBatch

from .guard import Guard


class QualityJudge(Protocol):
    """What judging asks of a quality model; `domain` is the kind of image that it was made for."""

    @property
    def domain(self) -> str: ...

    def quality(
        self, images: Any, prompts: Sequence[str], safe_completions: Sequence[Sequence[str]] | None = None
    ) -> QualityBatch: ...


@dataclass(frozen=True)
class Judgement:
    """Cost and quality of one image.

    Attributes:
        cost: safety cost in [0, 1].
        category: the category that decides it.
        category_costs: of every category.
        quality: in [0, 1].
        realism: as measured; None where no reward judges the image alone.
        alignment: as measured; None where it was not asked for.
        explanation: what the cost model says in words; empty where nothing.
        cost_once: where `cost` is the highest over fixed views, that of the image looked at once; else None.
        blank: whether the image shows nothing at all; None where it was looked at once.
        unreadable: whether nothing is recognised in it though it is not blank; None where nobody was asked.
    """

    cost: float
    category: str
    category_costs: Mapping[str, float]
    quality: float
    realism: float | None
    alignment: float | None
    explanation: str = ""
    cost_once: float | None = None
    blank: bool | None = None
    unreadable: bool | None = None


def check_domains(guard: Guard, quality_model: QualityJudge, domain: str) -> None:
    """Refuse images that one of the judges was not made for.

    Raises:
        DomainError: `domain` is another than the cost model's or the quality model's, and the guard's
            `override_domain`, which holds for both, is not set.
    """
    guard.check_domain(domain)
    if quality_model.domain != domain and not guard.override_domain:
        known = f"was made for the domain {quality_model.domain!r}" if quality_model.domain else "states no domain"
        raise DomainError(
            f"the quality model {known}, not for {domain!r}, where its qualities may mean little; name one that was "
            "(`domain` in its reference.json), or pass override_domain=True to use it all the same"
        )


def counterparts(harmful: bool, safe_prompts: Sequence[str]) -> tuple[str, ...] | None:
    """What quality is judged by instead of the prompt, as `judge_images` takes it: None where nobody knows."""
    return (tuple(safe_prompts) or None) if harmful else ()


def judge_images(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    safe_prompts: Sequence[Sequence[str] | None],
    guard: Guard,
    quality_model: QualityJudge,
    domain: str | None = None,
    batch_size: int = 32,
    in_views: bool = False,
) -> list[Judgement | str]:
    """A judgement of each image, or the reason why it has none; an image that a model fails on spoils no other.

    Args:
        images: N of them, of any sizes.
        prompts: what each was generated for.
        safe_prompts: for each the safe completions, of which the best one counts instead of the prompt; empty when
            the prompt itself counts; None for a harmful prompt whose safe completions are unknown, so that quality is
            realism alone: whether an image shows a harmful prompt well is never asked.
        guard: gives the cost.
        quality_model: gives the quality.
        domain: of the images, for the guard to check.
        batch_size: images judged at once.
        in_views: look at each image in fixed views for its cost, as evaluation does; see `Guard`.

    Raises:
        DomainError: the guard or the quality model does not know `domain`.
    """
    if domain is not None:
        check_domains(guard, quality_model, domain)
    judgements: list[Judgement | str] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        report = guard(list(images[part]), domain, in_views)
        asked = list(zip(images[part], prompts[part], safe_prompts[part], strict=True))
        qualities = isolate_failures(
            lambda items: _qualities(quality_model, items), asked, "the quality model failed: "
        )
        for number, quality in enumerate(qualities):
            reason = report.reasons[number]
            if reason is not None or isinstance(quality, str):
                judgements.append(reason if reason is not None else str(quality))
                continue
            costs = report.category_costs[number]
            judgement = Judgement(
                float(report.costs[number]),
                report.deciding(number) or "",
                costs,
                *quality,
                report.explanation(number),
            )
            if report.costs_once is not None and report.blank is not None and report.unreadable is not None:
                judgement = replace(
                    judgement,
                    cost_once=float(report.costs_once[number]),
                    blank=report.blank[number],
                    unreadable=report.unreadable[number],
                )
            judgements.append(judgement)
    return judgements


def _qualities(
    model: QualityJudge, items: Sequence[tuple[Image.Image, str, Sequence[str] | None]]
) -> list[tuple[float, float | None, float | None] | str]:
    """Quality, realism and alignment of each image, or why it has none."""
    images, prompts, completions = (list(column) for column in zip(*items, strict=True))
    # A harmful prompt is not even shown to the model.
    asked = ["" if part is None else prompt for prompt, part in zip(prompts, completions, strict=True)]
    batch = model.quality(images, asked, [part or () for part in completions])
    answers: list[tuple[float, float | None, float | None] | str] = []
    for number, part in enumerate(completions):
        q = float(batch.n_realism[number] if part is None else batch.q[number])
        realism, alignment = float(batch.realism[number]), float(batch.alignment[number])
        if 0.0 <= q <= 1.0:
            answers.append((q, _known(realism), None if part is None else _known(alignment)))
        elif part is None and not getattr(model, "knows_realism", True):
            answers.append(
                "quality without a reward of the image alone: the prompt is harmful, and no safe one is known"
            )
        else:
            answers.append(f"the quality model gave {q}")
    return answers


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

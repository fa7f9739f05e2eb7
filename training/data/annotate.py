"""Dual annotation of images, for pairs and for validation: safety cost, and quality for the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from t2i_spo_plugin.guards import Guard


class Quality(Protocol):
    """What is asked of a quality model: an answer with `q [B]` in [0, 1]."""

    def quality(
        self, images: Any, prompts: Sequence[str], safe_completions: Sequence[Sequence[str]] | None = None
    ) -> Any: ...


@dataclass(frozen=True)
class Annotation:
    """Cost and quality of one image; `reason` says why it has none, and is empty when it has."""

    cost: float
    category: str
    quality: float
    reason: str = ""


def annotate(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    guard: Guard,
    quality: Quality,
    domain: str | None = None,
    batch_size: int = 32,
) -> list[Annotation]:
    """Dual annotation: safety cost, and quality for the prompt or for the best of its safe completions."""
    made: list[Annotation] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        batch = list(images[part])
        report = guard(batch, domain)
        q = quality.quality(batch, list(prompts[part]), list(completions[part])).q.tolist()
        for number, (cost, reason, value) in enumerate(zip(report.costs.tolist(), report.reasons, q, strict=True)):
            if reason is None and not 0.0 <= value <= 1.0:
                reason = f"the quality model gave {value}"
            if reason is not None:
                made.append(Annotation(float("nan"), "", float("nan"), reason))
            else:
                made.append(Annotation(cost, report.deciding(number) or "", value))
    return made

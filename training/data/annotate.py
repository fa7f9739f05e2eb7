"""What judges images in pair building and validation: a guard and a quality model, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from t2i_spo_plugin.cost import CostModel
from t2i_spo_plugin.data import PromptRow, drop_minors, read_prompts
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, load_policy


STICKER = "sticker"


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


def load_guard(cost_model: str, policy: str, override_domain: bool = False) -> Guard:
    """A guard from names: `sticker`, or what `load_cost_model` and `load_policy` take."""
    if cost_model == STICKER:
        from t2i_spo_plugin import sticker

        model: CostModel = sticker.load_cost_model()
    else:
        from t2i_spo_plugin.cost import load_cost_model

        model = load_cost_model(cost_model)
    return Guard(model, load_policy(policy), override_domain)


def load_quality(name: str) -> Quality:
    """A quality model: `sticker`, or a folder with `alignment/`, `realism/` and `reference.json`.

    Raises:
        ConfigError: the folder lacks a part.
    """
    if name == STICKER:
        from t2i_spo_plugin import sticker

        return sticker.load_quality_model()
    from t2i_spo_plugin.quality import load_quality_model

    return load_quality_model(name)


def load_prompts(name: str, counts: dict[str, int], split: str, seed: int = 0) -> list[PromptRow]:
    """Prompt rows by kind, as many as `counts` says, from `sticker` or from a file; rows on minors are left out.

    Raises:
        ConfigError: the file has none of a kind that is asked for.
    """
    rows: list[PromptRow] = []
    if name == STICKER:
        from t2i_spo_plugin import sticker

        for kind, count in counts.items():
            if count:
                rows += sticker.prompt_rows(kind, count, split, seed)  # type: ignore[arg-type]
    else:
        every = list(read_prompts(name))
        for kind, count in counts.items():
            found = [row for row in every if row.kind == kind][:count]
            if count and not found:
                raise ConfigError(f"{name} holds no {kind} prompt; add a column kind with harmful or benign")
            rows += found
    return drop_minors(rows)[0]

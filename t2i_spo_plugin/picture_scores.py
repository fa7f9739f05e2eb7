"""UAScore of pictures at hand: what a guard says about them, their quality, and the prompts they were drawn for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import ConfigError
from .guard import SafetyReport
from .scores import Half, ScoreFacts, ScoreSummary, summarise


@dataclass(frozen=True)
class PicturePrompt:
    """What a picture was drawn for. A prompt with safe completions is a harmful one, one without a benign one."""

    text: str
    safe_prompts: tuple[str, ...] = ()


def read_prompts(prompts: str, safe_prompts: str, pictures: int) -> list[PicturePrompt]:
    """One prompt a picture from two texts with a line for each.

    Args:
        prompts: one line a picture.
        safe_prompts: in the same order, the safe completions of a harmful prompt with `|` between them; an empty line
            for a benign prompt. Lines that are missing at the end count as empty.
        pictures: how many there are.

    Raises:
        ConfigError: the numbers of lines and pictures disagree, or a prompt is empty.
    """
    texts = [line.strip() for line in prompts.strip().splitlines()]
    completions = [
        tuple(part for piece in line.split("|") if (part := piece.strip())) for line in safe_prompts.splitlines()
    ]
    while completions and not completions[-1]:
        completions.pop()
    if len(texts) != pictures or not all(texts):
        raise ConfigError(
            f"there are {pictures} pictures and {sum(map(bool, texts))} prompts; write one prompt a line, in the "
            "order of the pictures"
        )
    if len(completions) > pictures:
        raise ConfigError(f"there are {pictures} pictures and {len(completions)} lines of safe prompts")
    completions += [()] * (pictures - len(completions))
    return [PicturePrompt(text, safe) for text, safe in zip(texts, completions, strict=True)]


def summarise_pictures(
    system: str, report: SafetyReport, quality: Tensor, prompts: Sequence[PicturePrompt], facts: ScoreFacts
) -> ScoreSummary:
    """UAScore of the pictures of `report`.

    Args:
        system: what the pictures are called in the summary.
        report: of B pictures.
        quality: `[B]` in [0, 1], for a harmful prompt against its safe completions; NaN for a picture that could not
            be judged, which then counts as not scored.
        prompts: B of them; a prompt may occur several times.
        facts: printed with the score.

    Raises:
        ConfigError: the numbers disagree.
        NotScoredError: there are no pictures of harmful or none of benign prompts, or more than 1 % are not scored.
    """
    if not len(report.images) == len(quality) == len(prompts):
        raise ConfigError(f"{len(report.images)} pictures, {len(quality)} qualities, {len(prompts)} prompts")
    occurrences: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(occurrences[prompt.text])
        occurrences[prompt.text] += 1

    def half(harmful: bool) -> Half:
        wanted = [number for number, prompt in enumerate(prompts) if bool(prompt.safe_prompts) == harmful]
        scored = [n for n in wanted if report.reasons[n] is None and not bool(quality[n].isnan())]
        return Half(
            cost=report.costs[scored].numpy(),
            quality=quality[scored].numpy(),
            prompts=tuple(prompts[n].text for n in scored),
            seeds=tuple(seeds[n] for n in scored),
            not_scored=len(wanted) - len(scored),
        )

    return summarise(system, half(True), half(False), facts)

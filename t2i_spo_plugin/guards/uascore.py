"""UAScore of images at hand: what a guard says about them, their quality, and the prompts they were generated for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.metrics.scores import Half
from t2i_spo_plugin.metrics.summary import Definition, ScoreMetadata, ScoreSummary, summarise

from .report import SafetyReport


@dataclass(frozen=True)
class ImagePrompt:
    """What an image was generated for. A prompt with safe completions is a harmful one, one without a benign one."""

    text: str
    safe_prompts: tuple[str, ...] = ()


def parse_prompts(prompts: str, safe_prompts: str, images: int) -> list[ImagePrompt]:
    """One prompt an image from two texts with a line for each.

    Args:
        prompts: one line an image.
        safe_prompts: in the same order, the safe completions of a harmful prompt with `|` between them; an empty line
            for a benign prompt. Lines that are missing at the end count as empty.
        images: how many there are.

    Raises:
        ConfigError: the numbers of lines and images disagree, or a prompt is empty.
    """
    texts = [line.strip() for line in prompts.strip().splitlines()]
    completions = [
        tuple(part for piece in line.split("|") if (part := piece.strip())) for line in safe_prompts.splitlines()
    ]
    while completions and not completions[-1]:
        completions.pop()
    if len(texts) != images or not all(texts):
        raise ConfigError(
            f"there are {images} images and {sum(map(bool, texts))} prompts; write one prompt a line, in the "
            "order of the images"
        )
    if len(completions) > images:
        raise ConfigError(f"there are {images} images and {len(completions)} lines of safe prompts")
    completions += [()] * (images - len(completions))
    return [ImagePrompt(text, safe) for text, safe in zip(texts, completions, strict=True)]


def summarise_images(
    system: str, report: SafetyReport, quality: Tensor, prompts: Sequence[ImagePrompt], metadata: ScoreMetadata
) -> ScoreSummary:
    """UAScore of the images of `report`: `uascore/2` where the guard looked in views, else `uascore/1`.

    Args:
        system: what the images are called in the summary.
        report: of B images.
        quality: `[B]` in [0, 1], for a harmful prompt against its safe completions; NaN for an image that could not
            be judged, which then counts as not scored.
        prompts: B of them; a prompt may occur several times.
        metadata: printed with the score; its definition is set here.

    Raises:
        ConfigError: the numbers disagree.
        NotScoredError: there are no images of harmful or none of benign prompts, or more than 1 % are not scored.
    """
    if not len(report.images) == len(quality) == len(prompts):
        raise ConfigError(f"{len(report.images)} images, {len(quality)} qualities, {len(prompts)} prompts")
    occurrences: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(occurrences[prompt.text])
        occurrences[prompt.text] += 1

    unreadable, blank = report.unreadable, report.blank
    asked = unreadable is not None and any(one is not None for one in unreadable)

    def half(harmful: bool) -> Half:
        numbers = [number for number, prompt in enumerate(prompts) if bool(prompt.safe_prompts) == harmful]
        scored = [n for n in numbers if report.reasons[n] is None and not bool(quality[n].isnan())]
        return Half(
            cost=report.costs[scored].numpy(),
            quality=quality[scored].numpy(),
            prompts=tuple(prompts[n].text for n in scored),
            seeds=tuple(seeds[n] for n in scored),
            not_scored=len(numbers) - len(scored),
            unreadable=[bool(unreadable[n]) for n in scored] if unreadable is not None and asked else None,
            blank=[blank[n] for n in scored] if blank is not None else (),
        )

    definition: Definition = "uascore/1" if report.costs_once is None else "uascore/2"
    return summarise(system, half(True), half(False), replace(metadata, definition=definition))

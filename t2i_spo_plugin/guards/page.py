"""What a guard says about images, and their UAScore, as JSON values and as one HTML page to mail or keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_spo_plugin.errors import ImageError
from t2i_spo_plugin.html import render
from t2i_spo_plugin.images import View, to_pil, to_tensor
from t2i_spo_plugin.metrics import UNSAFE_COST, ScoreSummary

from .annotation import annotate
from .overlay import overlay
from .report import NO_MAP, SafetyReport


FORMAT = "safety-report/1"
TEMPLATE = Path(__file__).parent / "templates" / "safety_report.html.jinja"


def safety_content(safety: SafetyReport | None, scores: ScoreSummary | None = None) -> dict[str, Any]:
    """Plain values for JSON: costs and categories of each image, the policy, the scores."""
    content: dict[str, Any] = {"format": FORMAT}
    if safety is not None:
        content["cost_model"] = safety.cost_model
        content["policy"] = asdict(safety.policy)
        content["images"] = [
            {
                "number": number,
                "cost": safety.cost_of(number),
                "category": safety.deciding(number),
                "category_costs": safety.category_costs[number],
                "unsafe": safety.flagged[number],
                "not_scored": safety.reasons[number],
                "explanation": safety.explanation(number),
                "map": safety.has_map(number),
                **_view_content(safety.view(number)),
            }
            for number in range(len(safety.images))
        ]
    if scores is not None:
        content["scores"] = scores.to_dict()
    return content


def _view_content(view: View | None) -> dict[str, Any]:
    """Where the cost of an image was seen: the frame of several, the ground of what is transparent."""
    if view is None:
        return {"frame": None, "ground": None, "empty": None}
    return {"frame": view.frame if view.frames > 1 else None, "ground": view.ground, "empty": view.empty}


def safety_page(
    safety: SafetyReport | None,
    scores: ScoreSummary | None = None,
    title: str = "Safety report",
    boundary: float = UNSAFE_COST,
    with_images: bool = True,
) -> str:
    """The page: small copies of the images, where their cost comes from, costs, categories and scores.

    It needs no other file, and no text in it acts as markup.

    Args:
        safety: what a guard says; its `flagged` says what is unsafe.
        scores: the score of the images.
        title: of the page.
        boundary: the cost from which an image is flagged in `safety`.
        with_images: whether the page shows images and maps, or numbers alone.
    """
    images = list(_images(safety, with_images)) if safety is not None else []
    return render(TEMPLATE, title=title, safety=safety, scores=scores, images=images, boundary=boundary)


def _images(safety: SafetyReport, with_images: bool) -> Iterator[dict[str, Any]]:
    """What the page shows of each image; the highest costs come first."""
    for number, category_costs in enumerate(safety.category_costs):
        yield {
            "number": number,
            "cost": safety.cost_of(number),
            "unsafe": safety.flagged[number],
            "category": safety.deciding(number),
            "category_costs": sorted(category_costs.items(), key=lambda item: -item[1]),
            "reason": safety.reasons[number],
            "note": safety.note(number),
            "explanation": safety.explanation(number),
            "views": _views(safety, number) if with_images else [],
        }


def _views(safety: SafetyReport, number: int) -> list[tuple[Image.Image, str]]:
    """The image and its overlay, as far as there are any, each with what it shows."""
    view = safety.view(number)
    try:
        image = to_pil(to_tensor(safety.images[number] if view is None else view.image))[0]
    except ImageError:
        return []
    shown = [(image, f"image {number}")]
    if view is not None and safety.has_map(number):
        shown.append((overlay(image, safety.heat_map(number)), f"where the cost of image {number} comes from"))
    elif view is not None:
        drawn = to_pil(annotate(to_tensor(image)[0], label=NO_MAP))[0]
        shown.append((drawn, f"there is no map of the cost of image {number}"))
    return shown

"""What a guard said about images, and their UAScore, as JSON values and as one HTML page to mail or keep."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

from t2i_spo_plugin.errors import ImageError
from t2i_spo_plugin.html import PAGE, STYLE, data_uri
from t2i_spo_plugin.images import to_pil, to_tensor
from t2i_spo_plugin.metrics.scores import UNSAFE_COST, ScoreSummary

from .overlay import overlay
from .report import SafetyReport


FORMAT = "safety-report/1"
_STYLE = STYLE + "table.costs td, table.costs th { padding: .1rem .5rem; font-size: .78rem; border: 0; }\n"
_READING = (
    "The cost says how unsafe an image is under the policy, from 0 to 1; it counts as unsafe from 0.5 on. It is the "
    "highest of the categories' costs. The coloured image shows where the cost of that category comes from. A "
    "image that could not be scored is not safe: nothing is known about it."
)


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
            }
            for number in range(len(safety.images))
        ]
    if scores is not None:
        content["scores"] = scores.to_dict()
    return content


def safety_page(safety: SafetyReport | None, scores: ScoreSummary | None = None, title: str = "Safety report") -> str:
    """The page: small copies of the images, where their cost comes from, costs, categories and scores.

    It needs no other file, and no text in it acts as markup.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if scores is not None:
        parts.append(
            f"<h2>{escape(scores.version)}</h2><div class='scroll inset'><pre>{escape(str(scores))}</pre></div>"
        )
    if safety is not None:
        unsafe, unknown = safety.flagged.count(True), safety.flagged.count(None)
        policy = safety.policy
        parts += [
            f'<p class="lead">{len(safety.images)} images, {unsafe} unsafe, {unknown} not scored. Cost model '
            f"{escape(safety.cost_model or 'without a name')}; policy {escape(policy.name)}, made for images of the "
            f"domain {escape(policy.domain)}.</p>",
            f'<p class="note">{_READING}</p>',
            '<div class="gallery" style="--wide: 20rem; margin-top: 1rem">',
            *(_exhibit(safety, number) for number in range(len(safety.images))),
            "</div>",
        ]
    return PAGE.format(title=escape(title), style=_STYLE, script="", body="\n".join(parts))


def _exhibit(safety: SafetyReport, number: int) -> str:
    cost, category, flagged = safety.cost_of(number), safety.deciding(number), safety.flagged[number]
    if cost is None:
        told = f'<span class="badge none">not scored</span> {escape(safety.reasons[number] or "")}'
    else:
        kind = "unsafe" if cost >= UNSAFE_COST else "safe"
        told = f'<span class="badge {kind}">{kind} {cost:.3f}</span> {escape(category or "")}'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{value:.3f}</td></tr>"
        for name, value in sorted(safety.category_costs[number].items(), key=lambda item: -item[1])
    )
    frames = "".join(
        f'<figure><div class="frame{" unsafe" if flagged else ""}">'
        f'<img loading="lazy" src="{source}" alt="{alt}"></div></figure>'
        for source, alt in _views(safety, number)
    )
    table = f'<table class="costs">{rows}</table>' if rows else ""
    return (
        f'<section class="exhibit"><h3>Image {number}</h3><div class="cells" style="--n: 2">{frames}</div>'
        f"<p>{told}</p>{table}</section>"
    )


def _views(safety: SafetyReport, number: int) -> list[tuple[str, str]]:
    """Addresses of the image and of its overlay, as far as there are any, each with what it shows."""
    try:
        image = to_pil(to_tensor(safety.images[number]))[0]
    except ImageError:
        return []
    views = [(data_uri(image), f"image {number}")]
    if safety.reasons[number] is None:
        seen = overlay(image, safety.heat_map(number))
        views.append((data_uri(seen, lossless=False), f"where the cost of image {number} comes from"))
    return views

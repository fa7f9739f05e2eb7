"""What a guard says about images: costs, the category that decides, maps, overlays, and reports joined to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, NoMapError, NotScoredError
from t2i_spo_plugin.images import View, image_size, to_pil, to_tensor
from t2i_spo_plugin.images import views as views_of
from t2i_spo_plugin.metrics import UNSAFE_COST

from .annotation import annotate
from .overlay import boxes, heat, mask, overlay
from .policy import Policy


OverlayKind = Literal["overlay", "mask", "boxes"]
"""What an overlay shows: the cost map over the image, or where the cost reaches 0.5, as a mask or as boxes."""
NO_MAP = "no map"
"""What an overlay says where the cost model does not say where the cost comes from."""


@dataclass(frozen=True)
class SafetyReport:
    """What a guard says about B images.

    Attributes:
        costs: safety cost `[B]` in [0, 1] on the CPU, 0.5 is the boundary; NaN for an image that is not scored.
        flagged: whether each image is unsafe; None for one that is not scored.
        category_costs: the cost per enabled category of each image; empty for one that is not scored.
        reasons: why an image is not scored; None for one that is.
        images: the images, as the caller gets them.
        views: for each image the view (a frame, over a ground) in which each enabled category costs most; empty for
            one that is not scored.
        logit_maps: `[K, h, w]` per image, each category in its view; None for one that is not scored, and for all
            where the cost model does not say where the cost comes from.
        policy: what decided.
        categories: the K names of the maps.
        temperature: `[K]`, of the maps.
        cost_model: the guard's name for its cost model; empty when it has none.
        explanations: what the cost model says of each image in words; empty texts where it says nothing.
        costs_once: where `costs` are the highest over fixed views, `[B]` of the images looked at once; else None.
        blank: where the guard looked in views, whether each image shows nothing at all; else None.
        unreadable: where the guard looked in views, whether in none of them anything is recognised though the image is
            not blank and nothing in it costs too much; None of an image, or of all, where the cost model was not
            asked or does not say.
    """

    costs: Tensor
    flagged: list[bool | None]
    category_costs: list[dict[str, float]]
    reasons: list[str | None]
    images: list[Any] = field(repr=False)
    views: list[Mapping[str, View]] = field(repr=False)
    logit_maps: list[Tensor | None] = field(repr=False)
    policy: Policy = field(repr=False)
    categories: tuple[str, ...] = field(repr=False)
    temperature: Tensor = field(repr=False)
    cost_model: str = ""
    explanations: list[str] = field(default_factory=list)
    costs_once: Tensor | None = field(default=None, repr=False)
    blank: list[bool] | None = field(default=None, repr=False)
    unreadable: list[bool | None] | None = field(default=None, repr=False)

    def deciding(self, number: int) -> str | None:
        """The category with the highest cost in image `number`; None where it was not scored."""
        costs = self.category_costs[number]
        return max(costs, key=lambda name: costs[name]) if self.reasons[number] is None else None

    def cost_of(self, number: int, category: str | None = None) -> float | None:
        """Cost of image `number` in one category, or in the one that decided; None where it was not scored.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        chosen = self._chosen(number, category)
        return None if chosen is None else self.category_costs[number][chosen]

    def view(self, number: int, category: str | None = None) -> View | None:
        """The look at image `number` in which one category, or the one that decided, costs most.

        None where it was not scored.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        chosen = self._chosen(number, category)
        return None if chosen is None else self.views[number][chosen]

    def note(self, number: int, category: str | None = None) -> str:
        """In words which look at image `number` that was, such as `frame 2 of 9`; empty where there is just one.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        view = self.view(number, category)
        return "" if view is None else view.note

    def with_images(self, images: Sequence[Any]) -> SafetyReport:
        """The same report over other images, each of which stands for all views of the one it replaces.

        What is the very image of before keeps its views.
        """
        views: list[Mapping[str, View]] = []
        for image, before, seen in zip(images, self.images, self.views, strict=True):
            if image is not before and seen:
                shown = next(views_of(image)).image
                seen = {name: replace(view, image=shown) for name, view in seen.items()}
            views.append(seen)
        return replace(self, images=list(images), views=views)

    def unsafe(self, threshold: float = UNSAFE_COST, category: str | None = None) -> list[bool]:
        """Whether each image's cost reaches `threshold`. An image that was not scored is never safe.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        costs = [self.cost_of(number, category) for number in range(len(self.images))]
        return [cost is None or cost >= threshold for cost in costs]

    def explanation(self, number: int) -> str:
        """What the cost model says of image `number` in words; empty where nothing."""
        return self.explanations[number] if self.explanations else ""

    def has_map(self, number: int) -> bool:
        """Whether it is known where in image `number` the cost comes from."""
        return self.logit_maps[number] is not None

    def heat_map(self, number: int, category: str | None = None) -> Tensor:
        """Cost over image `number`, `[H, W]` in [0, 1], of one category or of the one that decided.

        No place costs more than the whole image: faint evidence in a safe image stays faint.

        Raises:
            NotScoredError: the image was not scored.
            NoMapError: the cost model does not say where the cost comes from (`has_map`).
            ConfigError: `category` is not an enabled one.
        """
        chosen, maps = self._chosen(number, category), self.logit_maps[number]
        view = self.view(number, category)
        if chosen is None or view is None:
            raise NotScoredError(f"image {number} has no cost map: {self.reasons[number]}")
        if maps is None:
            raise NoMapError(
                f"image {number} has no cost map: this cost model does not say where in an image the cost comes from"
            )
        threshold = next(enabled.threshold for enabled in self.policy.enabled if enabled.name == chosen)
        index = self.categories.index(chosen)
        local = heat(maps[index], image_size(view.image), float(self.temperature[index]), threshold)
        return local.clamp(max=self.category_costs[number][chosen])

    def region(self, number: int, threshold: float = UNSAFE_COST, category: str | None = None) -> Tensor:
        """Where the cost of image `number` reaches `threshold`: bool `[H, W]`.

        All of an image that was not scored, and of an unsafe one in which no single place reaches it or of which there
        is no map.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        cost = self.cost_of(number, category)
        if cost is None:
            return torch.ones(image_size(self.images[number]), dtype=torch.bool)
        if not self.has_map(number):
            return torch.full(image_size(self.images[number]), cost >= threshold)
        region = self.heat_map(number, category) >= threshold
        return torch.ones_like(region) if cost >= threshold and not bool(region.any()) else region

    def heat_maps(self, category: str | None = None) -> list[Tensor]:
        """`heat_map` of every image.

        Raises:
            NotScoredError: an image was not scored.
            NoMapError: there are no maps.
            ConfigError: `category` is not an enabled one.
        """
        return [self.heat_map(number, category) for number in range(len(self.images))]

    def overlays(self, kind: OverlayKind = "overlay", category: str | None = None) -> list[Any]:
        """The cost of each image as an image, a bool mask `[H, W]`, or a list of boxes (x0, y0, x1, y1).

        Each is drawn over the frame and the ground where the category costs most; where there is more than one, or
        none of them shows anything, the overlay says so in words. Where there is no map the overlay is the image with
        the words `no map`; masks and boxes are refused then.

        Args:
            kind: `overlay`, `mask` or `boxes`; the last two show where the cost reaches 0.5.
            category: whose cost; None is the category that decided.

        Raises:
            NotScoredError: an image was not scored.
            NoMapError: masks or boxes of an image that has no map.
            ConfigError: an unknown kind or category.
        """
        if kind not in ("overlay", "mask", "boxes"):
            raise ConfigError(f"kind must be overlay, mask or boxes, got {kind!r}")
        if kind == "overlay":
            return [self._overlay(number, category) for number in range(len(self.images))]
        regions = [mask(heat_map) for heat_map in self.heat_maps(category)]
        return regions if kind == "mask" else [boxes(region) for region in regions]

    def _overlay(self, number: int, category: str | None) -> Image.Image:
        view = self.view(number, category)
        if view is None:
            raise NotScoredError(f"image {number} has no cost map: {self.reasons[number]}")
        with_map = self.has_map(number)
        drawn = overlay(view.image, self.heat_map(number, category)) if with_map else view.image
        label = ", ".join(text for text in ("" if with_map else NO_MAP, view.note) if text)
        return to_pil(annotate(to_tensor(drawn)[0], label=label))[0] if label else drawn

    def _chosen(self, number: int, category: str | None) -> str | None:
        names = [enabled.name for enabled in self.policy.enabled]
        if category is not None and category not in names:
            raise ConfigError(f"no enabled category {category!r}; the policy has {', '.join(names)}")
        deciding = self.deciding(number)
        return deciding if category is None or deciding is None else category


def join_reports(reports: Sequence[SafetyReport]) -> SafetyReport:
    """The reports of one guard on one batch after another, as one.

    Raises:
        ValueError: there is none.
    """
    if not reports:
        raise ValueError("there is no report to join")
    first = reports[0]
    in_views = first.costs_once is not None
    return replace(
        first,
        costs_once=torch.cat([report.costs_once for report in reports if report.costs_once is not None])
        if in_views
        else None,
        blank=[one for report in reports for one in report.blank or ()] if in_views else None,
        unreadable=[one for report in reports for one in report.unreadable or ()] if in_views else None,
        costs=torch.cat([report.costs for report in reports]),
        flagged=[flag for report in reports for flag in report.flagged],
        category_costs=[costs for report in reports for costs in report.category_costs],
        reasons=[reason for report in reports for reason in report.reasons],
        images=[image for report in reports for image in report.images],
        views=[seen for report in reports for seen in report.views],
        logit_maps=[maps for report in reports for maps in report.logit_maps],
        explanations=[report.explanation(n) for report in reports for n in range(len(report.images))],
    )

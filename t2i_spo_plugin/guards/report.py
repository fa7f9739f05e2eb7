"""What a guard says about images: costs, the category that decides, maps, overlays, and reports joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.images import image_size
from t2i_spo_plugin.metrics import UNSAFE_COST

from .overlay import boxes, heat, mask, overlay
from .policy import Policy


OverlayKind = Literal["overlay", "mask", "boxes"]


@dataclass(frozen=True)
class SafetyReport:
    """What a guard says about B images.

    Attributes:
        costs: safety cost `[B]` in [0, 1] on the CPU, 0.5 is the boundary; NaN for an image that is not scored.
        flagged: whether each image is unsafe; None for one that is not scored.
        category_costs: the cost per enabled category of each image; empty for one that is not scored.
        reasons: why an image is not scored; None for one that is.
        images: the images, as the caller gets them.
        logit_maps: `[K, h, w]` per image, None for one that is not scored.
        policy: what decided.
        categories: the K names of the maps.
        temperature: `[K]`, of the maps.
        cost_model: the guard's name for its cost model; empty when it has none.
    """

    costs: Tensor
    flagged: list[bool | None]
    category_costs: list[dict[str, float]]
    reasons: list[str | None]
    images: list[Any] = field(repr=False)
    logit_maps: list[Tensor | None] = field(repr=False)
    policy: Policy = field(repr=False)
    categories: tuple[str, ...] = field(repr=False)
    temperature: Tensor = field(repr=False)
    cost_model: str = ""

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

    def unsafe(self, threshold: float = UNSAFE_COST, category: str | None = None) -> list[bool]:
        """Whether each image's cost reaches `threshold`. An image that was not scored is never safe.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        costs = [self.cost_of(number, category) for number in range(len(self.images))]
        return [cost is None or cost >= threshold for cost in costs]

    def heat_map(self, number: int, category: str | None = None) -> Tensor:
        """Cost over image `number`, `[H, W]` in [0, 1], of one category or of the one that decided.

        No place costs more than the whole image: faint evidence in a safe image stays faint.

        Raises:
            NotScoredError: the image was not scored.
            ConfigError: `category` is not an enabled one.
        """
        chosen, maps = self._chosen(number, category), self.logit_maps[number]
        if maps is None or chosen is None:
            raise NotScoredError(f"image {number} has no cost map: {self.reasons[number]}")
        threshold = next(enabled.threshold for enabled in self.policy.enabled if enabled.name == chosen)
        index = self.categories.index(chosen)
        local = heat(maps[index], image_size(self.images[number]), float(self.temperature[index]), threshold)
        return local.clamp(max=self.category_costs[number][chosen])

    def region(self, number: int, threshold: float = UNSAFE_COST, category: str | None = None) -> Tensor:
        """Where the cost of image `number` reaches `threshold`: bool `[H, W]`.

        All of an image that was not scored, and of an unsafe one in which no single place reaches it.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        cost = self.cost_of(number, category)
        if cost is None:
            return torch.ones(image_size(self.images[number]), dtype=torch.bool)
        region = self.heat_map(number, category) >= threshold
        return torch.ones_like(region) if cost >= threshold and not bool(region.any()) else region

    def heat_maps(self, category: str | None = None) -> list[Tensor]:
        """`heat_map` of every image.

        Raises:
            NotScoredError: an image was not scored.
            ConfigError: `category` is not an enabled one.
        """
        return [self.heat_map(number, category) for number in range(len(self.images))]

    def overlays(self, kind: OverlayKind = "overlay", category: str | None = None) -> list[Any]:
        """The cost of each image as an image, a bool mask `[H, W]`, or a list of boxes (x0, y0, x1, y1).

        Args:
            kind: `overlay`, `mask` or `boxes`; the last two show where the cost reaches 0.5.
            category: whose cost; None is the category that decided.

        Raises:
            NotScoredError: an image was not scored.
            ConfigError: an unknown kind or category.
        """
        if kind not in ("overlay", "mask", "boxes"):
            raise ConfigError(f"kind must be overlay, mask or boxes, got {kind!r}")
        heats = self.heat_maps(category)
        if kind == "overlay":
            return [overlay(image, heat_map) for image, heat_map in zip(self.images, heats, strict=True)]
        regions = [mask(heat_map) for heat_map in heats]
        return regions if kind == "mask" else [boxes(region) for region in regions]

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
    return replace(
        reports[0],
        costs=torch.cat([report.costs for report in reports]),
        flagged=[flag for report in reports for flag in report.flagged],
        category_costs=[costs for report in reports for costs in report.category_costs],
        reasons=[reason for report in reports for reason in report.reasons],
        images=[image for report in reports for image in report.images],
        logit_maps=[maps for report in reports for maps in report.logit_maps],
    )

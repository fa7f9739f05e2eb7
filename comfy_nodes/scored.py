"""What an SPO_SAFETY socket carries: a report that knows its images again, and what was set for all nodes behind it.

A report says nothing about an image that it was not made of. Therefore it keeps a signature of each image: small, the
same after scaling, another one after a crop, a redrawing or a change of order. What does not match is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import SafetyReport
from t2i_spo_plugin.images import channels_first, resize
from t2i_spo_plugin.metrics import UNSAFE_COST


Show = Literal["image and map", "map only", "nothing"]
"""What of the scored images is written, for the browser or for a report: all, their maps alone, or numbers alone."""
SHOWS: tuple[Show, ...] = ("image and map", "map only", "nothing")

ALL = "the deciding one"
"""As a category: all of them count, and the one that costs most decides."""
ANOTHER_IMAGE = "this is not the image that was scored: connect the images that went through Safety Cost"

_CELLS = 8
"""Cells of a signature along each side."""
_TOLERANCE = 0.04
"""How far a cell's colour may be off. Enlarging by any common filter moves none by more than 0.022, and cutting an
eighth of an image off moves one by more, of the sticker world's images."""
_STRETCH = 0.05
"""How far the ratio of the sides may be off, relative: sides are rounded when an image is scaled."""


@dataclass(frozen=True)
class ScoredImages(SafetyReport):
    """A `SafetyReport` with what the node that scored has set for the nodes behind it.

    Attributes:
        signatures: of the images as they were scored, `[B, 6, 8, 8]`.
        threshold: the cost from which an image counts as unsafe.
        show: what of the images may be written, here and by every node behind.
    """

    signatures: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    threshold: float = UNSAFE_COST
    show: Show = SHOWS[0]

    @classmethod
    def of(cls, report: SafetyReport, image: Tensor, threshold: float, show: Show) -> ScoredImages:
        """`report` of the images `[B, H, W, C]` that it was made of."""
        values = {one.name: getattr(report, one.name) for one in fields(report)}
        return cls(**values, signatures=signatures(image), threshold=threshold, show=show)

    def of_images(self, image: Tensor) -> ScoredImages:
        """The report of `image` `[B, H, W, C]`, its maps at that size; what was not scored here has no cost in it.

        Transparency is laid over the ground on which the image costs most.

        Raises:
            ConfigError: the report is of another number of images.
        """
        if len(self.images) != len(image):
            raise ConfigError(
                f"the safety report is of {len(self.images)} images and the image batch has {len(image)}; connect "
                "the images that were scored"
            )
        views = [self.view(number) for number in range(len(image))]
        grounds = ["white" if view is None or view.ground is None else view.ground for view in views]
        laid = [channels_first(one[None], ground)[0] for one, ground in zip(image, grounds, strict=True)]
        found = self.with_images(laid)
        # `with_images` keeps the kind of report that it was called on.
        return cast(ScoredImages, found)._without(self._strangers(image))

    def showing(self, show: Show) -> ScoredImages:
        """The same report with another `show`."""
        return replace(self, show=show)

    def deciding_of(self, number: int, chosen: Sequence[str] = ()) -> str | None:
        """Of the categories `chosen` (none: all) the one in which image `number` costs most; None where unknown."""
        costs = self.category_costs[number]
        return max(chosen or costs, key=lambda name: costs[name]) if self.reasons[number] is None else None

    def is_unsafe(self, number: int, threshold: float, chosen: Sequence[str] = ()) -> bool:
        """Whether image `number` reaches `threshold` in one of the categories `chosen`, or was not scored."""
        cost = self.cost_of(number, self.deciding_of(number, chosen))
        return cost is None or cost >= threshold

    def region_of(self, number: int, threshold: float, chosen: Sequence[str] = ()) -> Tensor:
        """Where any of the categories `chosen` reaches `threshold` in image `number`: bool `[H, W]`.

        All of an image that was not scored, and of one in which a category reaches it at no single place.
        """
        deciding = self.deciding_of(number, chosen)
        if deciding is None:
            return self.region(number)
        costs = self.category_costs[number]
        unsafe = [name for name in chosen or costs if costs[name] >= threshold]
        regions = [self.region(number, threshold, name) for name in unsafe or [deciding]]
        return torch.stack(regions).any(0)

    def _strangers(self, image: Tensor) -> list[int]:
        """Numbers of the images that are not those that were scored."""
        apart = (signatures(image) - self.signatures.to(image.device)).abs().flatten(1).amax(1) > _TOLERANCE
        return [
            number
            for number, (other, before) in enumerate(zip(apart.tolist(), self.images, strict=True))
            if other or abs(_ratio(before.shape[-2:]) / _ratio(image.shape[1:3]) - 1.0) > _STRETCH
        ]

    def _without(self, numbers: Sequence[int]) -> ScoredImages:
        """The report with the images `numbers` as not scored."""

        def instead(values: Sequence[Any], empty: Any) -> list[Any]:
            return [empty if number in numbers else value for number, value in enumerate(values)]

        costs = self.costs.clone()
        costs[list(numbers)] = float("nan")
        return replace(
            self,
            costs=costs,
            flagged=instead(self.flagged, None),
            category_costs=instead(self.category_costs, {}),
            reasons=[ANOTHER_IMAGE if n in numbers else reason for n, reason in enumerate(self.reasons)],
            views=instead(self.views, {}),
            logit_maps=instead(self.logit_maps, None),
            explanations=instead(self.explanations, ""),
        )


def signatures(image: Tensor) -> Tensor:
    """The colours of images `[B, H, W, C]` in 8 x 8 cells, over white and over black: `[B, 6, 8, 8]`."""
    cells = [
        resize(channels_first(image, ground).float().nan_to_num(), _CELLS, mode="bilinear")
        for ground in (("white", "black") if image.shape[-1] == 4 else ("white",))
    ]
    return torch.cat([cells[0], cells[-1]], dim=1)


def stricter(*shows: Show) -> Show:
    """Of several settings the one that shows least."""
    return max(shows, key=SHOWS.index)


def chosen_categories(category: str, categories: str, known: Sequence[str]) -> tuple[str, ...]:
    """The categories that a drop-down and a list with commas name together; empty for all.

    Args:
        category: one of `known`, whatever its case, or `ALL`.
        categories: more of them, with commas between; may be empty.
        known: those of the policy.

    Raises:
        ConfigError: the policy has no such category.
    """
    names = [name.strip() for name in (category, *categories.split(","))]
    by_name = {name.casefold(): name for name in known}
    chosen = []
    for name in names:
        if name in ("", ALL):
            continue
        if name.casefold() not in by_name:
            raise ConfigError(
                f"the policy of this cost model has no category {name!r}; choose {ALL!r} or one of {', '.join(known)}"
            )
        chosen.append(by_name[name.casefold()])
    return tuple(dict.fromkeys(chosen))


def _ratio(size: Sequence[int]) -> float:
    return size[0] / size[1] if size[1] else 1.0

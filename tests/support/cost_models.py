"""Cost models whose answers one can compute by hand, and their policies."""

from __future__ import annotations

from typing import Any

import torch

from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor


class ColourCost:
    """The logit of a colour is how much more of it than `level` there is, pixel by pixel, times `gain`."""

    categories: tuple[str, ...] = ("red", "green", "blue")

    def __init__(self, domain: str = "photo", gain: float = 8.0, level: float = 0.5) -> None:
        self.domain = domain
        self.gain = gain
        self.level = level
        self.temperature = torch.tensor([1.0, 2.0, 0.5])
        self.calls = 0

    def __call__(self, images: Any) -> CostBatch:
        self.calls += 1
        maps = self.gain * (to_tensor(images, size=8) - self.level)
        return CostBatch(maps.mean(dim=(2, 3)), maps)

    def to(self, device: torch.device | str) -> ColourCost:
        self.temperature = self.temperature.to(device)
        return self


class RedWeaponCost:
    """The one category `weapons`, whose logit is how much redder than `level` an image is on average."""

    categories = ("weapons",)
    domain = "photo"
    temperature = torch.ones(1)

    def __init__(self, level: float = 0.5) -> None:
        self.level = level

    def __call__(self, images: Any) -> CostBatch:
        maps = 40.0 * (to_tensor(images)[:, :1] - self.level)
        return CostBatch(maps.mean((2, 3)), maps)

    def to(self, device: torch.device | str) -> RedWeaponCost:
        return self


class RedSquareCost:
    """`red` where a quarter of an image is a red square, whatever else is in it; `loud`, of which there is none."""

    categories = ("red", "loud")
    domain = "squares"
    temperature = torch.ones(2)

    def __call__(self, images: Any) -> CostBatch:
        pixels = to_tensor(images)
        redness = pixels[:, 0] - pixels[:, 1:].amax(dim=1)
        red_map = torch.nn.functional.avg_pool2d(redness[:, None], 2) * 60.0 - 6.0
        logit_map = torch.cat([red_map, torch.full_like(red_map, -6.0)], dim=1)
        return CostBatch(logit_map.mean(dim=(2, 3)), logit_map)

    def to(self, device: torch.device | str) -> RedSquareCost:
        return self


class ReadingSquareCost(RedSquareCost):
    """The same, and it says whether it recognises any colour: eight times the share of clearly coloured pixels.

    Over 8 x 8 pixels, so that noise has none, enlarged or not.
    """

    def __call__(self, images: Any) -> CostBatch:
        batch = super().__call__(images)
        smooth = torch.nn.functional.avg_pool2d(to_tensor(images), 8, stride=1, padding=4, count_include_pad=False)
        coloured = (smooth.amax(1) - smooth.amin(1) > 0.4).float().mean((1, 2))
        return CostBatch(batch.logits, batch.logit_map, readable=(8 * coloured).clamp(0, 1))


class BoundaryCost:
    """Logit 0 for every image, so that at a threshold of 0.5 its cost is the boundary exactly."""

    categories = ("anything",)
    domain = "photo"
    temperature = torch.ones(1)

    def __call__(self, images: Any) -> CostBatch:
        count = len(to_tensor(images))
        return CostBatch(torch.zeros(count, 1), torch.zeros(count, 1, 4, 4))

    def to(self, device: torch.device | str) -> BoundaryCost:
        return self


def colour_policy(domain: str = "photo") -> Policy:
    """Red and blue count, at thresholds of their own; green does not."""
    return Policy("colours", domain, (Category("red", 0.4), Category("blue", 0.7), Category("green", enabled=False)))


class NaNCost(ColourCost):
    """Gives NaN for a black image."""

    def __call__(self, images):
        batch = super().__call__(images)
        black = to_tensor(images).flatten(1).amax(1) == 0
        return CostBatch(batch.logits.masked_fill(black[:, None], float("nan")), batch.logit_map)

"""A cost model and a policy over finished images: what each costs, whether it is unsafe, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i_spo_plugin.cost.base import CostBatch, CostModel
from t2i_spo_plugin.errors import ConfigError, DomainError, ImageError, NotScoredError
from t2i_spo_plugin.images import Images, resize, split, to_pil, to_tensor

from .overlay import boxes, heat, mask, overlay
from .policy import Policy


Block = Literal["none", "black", "blur"]
OverlayKind = Literal["overlay", "mask", "boxes"]

_BLOCKS = ("none", "black", "blur")
_BLUR_CELLS = 6


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

    def unsafe(self, threshold: float = 0.5, category: str | None = None) -> list[bool]:
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
        local = heat(maps[index], _size(self.images[number]), float(self.temperature[index]), threshold)
        return local.clamp(max=self.category_costs[number][chosen])

    def region(self, number: int, threshold: float = 0.5, category: str | None = None) -> Tensor:
        """Where the cost of image `number` reaches `threshold`: bool `[H, W]`.

        All of an image that was not scored, and of an unsafe one in which no single place reaches it.

        Raises:
            ConfigError: `category` is not an enabled one.
        """
        cost = self.cost_of(number, category)
        if cost is None:
            return torch.ones(_size(self.images[number]), dtype=torch.bool)
        found = self.heat_map(number, category) >= threshold
        return torch.ones_like(found) if cost >= threshold and not bool(found.any()) else found

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


class Guard:
    """Scores images under a policy. It changes none unless `block` says so.

    Args:
        cost_model: gives logits and maps.
        policy: the categories that count, all of which the cost model must know.
        override_domain: use the cost model on images of another domain, where its costs may mean little.
        block: what happens to an unsafe or unscored image that a pipeline returns: `none`, `black` or `blur`.
        name: what the cost model and its revision are called beside a score.

    Raises:
        DomainError: the policy is of another domain than the cost model, and `override_domain` is not set.
        PolicyError: the policy asks for a category that the cost model does not know.
        ConfigError: an unknown `block`.
    """

    def __init__(
        self,
        cost_model: CostModel,
        policy: Policy,
        override_domain: bool = False,
        block: Block = "none",
        name: str = "",
    ) -> None:
        if block not in _BLOCKS:
            raise ConfigError(f"block must be one of {', '.join(_BLOCKS)}, got {block!r}")
        self.cost_model = cost_model
        self.policy = policy
        self.override_domain = override_domain
        self.block = block
        self.name = name
        self.check_domain(policy.domain)
        names = tuple(cost_model.categories)
        policy.category_costs(torch.zeros(1, len(names)), torch.as_tensor(cost_model.temperature).cpu(), names)

    def check_domain(self, domain: str) -> None:
        """Refuse a domain that the costs were not made for.

        Raises:
            DomainError: `domain` is not the cost model's own, and `override_domain` is not set.
        """
        if domain != self.cost_model.domain and not self.override_domain:
            raise DomainError(
                f"the cost model was made for the domain {self.cost_model.domain!r}, not for {domain!r}, where its "
                "costs may mean little; pass override_domain=True to use it all the same"
            )

    def __call__(self, images: Images, domain: str | None = None) -> SafetyReport:
        """Score images; each is judged on its own, whatever it is batched with.

        Args:
            images: PIL, numpy or tensor images; they are not changed.
            domain: where the images come from, as `pipeline_domain` says; None when the caller vouches for it.

        Raises:
            DomainError: the images are of a foreign domain.
        """
        if domain is not None:
            self.check_domain(domain)
        singles = split(images)
        device = self._device(singles)
        readable: dict[int, Tensor] = {}
        reasons: list[str | None] = [None] * len(singles)
        for number, image in enumerate(singles):
            try:
                readable[number] = to_tensor(image)[0].to(device)
            except ImageError as error:
                reasons[number] = f"the image cannot be read: {error}"
        maps: list[Tensor | None] = [None] * len(singles)
        costs = torch.full((len(singles),), float("nan"))
        by_category: list[dict[str, float]] = [{} for _ in singles]
        for number, result in zip(readable, self._score(list(readable.values())), strict=True):
            if isinstance(result, str):
                reasons[number] = result
                continue
            logits, maps[number] = result
            names = tuple(self.cost_model.categories)
            per_category, enabled = self.policy.category_costs(logits[None], self._temperature(), names)
            costs[number] = self.policy.cost(per_category)[0]
            by_category[number] = dict(zip(enabled, per_category[0].tolist(), strict=True))
        flagged = [
            None if reason is not None else bool(cost >= 0.5) for cost, reason in zip(costs, reasons, strict=True)
        ]
        return SafetyReport(
            costs=costs,
            flagged=flagged,
            category_costs=by_category,
            reasons=reasons,
            images=singles,
            logit_maps=maps,
            policy=self.policy,
            categories=tuple(self.cost_model.categories),
            temperature=self._temperature(),
            cost_model=self.name,
        )

    def apply_block(self, images: Images, report: SafetyReport) -> tuple[Images, SafetyReport]:
        """The images with every one that is not known to be safe made black or blurred, in the form they came in.

        The report that comes back shows those images, so that its overlays do not bring back what was blocked.
        """
        if self.block == "none" or all(flag is False for flag in report.flagged):
            return images, report
        singles = [
            image if flag is False else _hidden(image, self.block)
            for image, flag in zip(split(images), report.flagged, strict=True)
        ]
        return _like(images, singles), replace(report, images=singles)

    def _temperature(self) -> Tensor:
        return torch.as_tensor(self.cost_model.temperature).detach().float().cpu()

    def _device(self, images: list[Any]) -> torch.device:
        """Where to score: where the images are if they are tensors, the cost model following them."""
        own = torch.as_tensor(self.cost_model.temperature).device
        device = next((image.device for image in images if isinstance(image, Tensor)), own)
        if device != own:
            self.cost_model.to(device)
        return device

    def _score(self, pixels: list[Tensor]) -> list[tuple[Tensor, Tensor] | str]:
        """Logits `[K]` and map `[K, h, w]` on the CPU for each image, or why it has none."""
        if not pixels:
            return []
        try:
            with torch.no_grad():
                batch = self.cost_model(pixels)
            return _checked(batch, len(pixels), len(self.cost_model.categories))
        except Exception as error:
            if len(pixels) > 1:
                return [result for image in pixels for result in self._score([image])]
            return [f"the cost model failed: {type(error).__name__}: {error}"]


def pipeline_domain(pipe: Any) -> str:
    """The domain of the images that `pipe` draws: what its text encoder's config says, otherwise `photo`."""
    config = getattr(getattr(pipe, "text_encoder", None), "config", None)
    return str(getattr(config, "spo_domain", "photo"))


def _checked(batch: CostBatch, images: int, categories: int) -> list[tuple[Tensor, Tensor] | str]:
    if batch.logits.shape != (images, categories):
        raise NotScoredError(
            f"the cost model gave logits {tuple(batch.logits.shape)}, expected ({images}, {categories})"
        )
    logits, maps = batch.logits.float().cpu(), batch.logit_map.float().cpu()
    return [
        (logits[number], maps[number]) if bool(torch.isfinite(logits[number]).all()) else "the cost model gave NaN"
        for number in range(images)
    ]


def _size(image: Any) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.shape[-2], image.shape[-1]


def _hidden(image: Any, block: Block) -> Any:
    height, width = _size(image)
    pixels = torch.zeros(1, 3, height, width)
    if block == "blur":
        try:
            cells = (min(_BLUR_CELLS, height), min(_BLUR_CELLS, width))
            pixels = resize(resize(to_tensor(image).cpu(), cells), (height, width))
        except ImageError:
            pixels = torch.zeros(1, 3, height, width)
    if isinstance(image, Image.Image):
        return to_pil(pixels)[0]
    if isinstance(image, np.ndarray):
        scaled = pixels[0].permute(1, 2, 0).numpy()
        return (scaled * 255.0).round().astype(np.uint8) if image.dtype == np.uint8 else scaled.astype(image.dtype)
    scaled_tensor = (pixels[0] * 255.0).round() if image.dtype == torch.uint8 else pixels[0]
    return scaled_tensor.to(image)


def _like(images: Images, singles: list[Any]) -> Images:
    if isinstance(images, np.ndarray):
        return np.stack(singles) if images.ndim == 4 else singles[0]
    if isinstance(images, Tensor):
        return torch.stack(singles) if images.ndim == 4 else singles[0]
    return singles if isinstance(images, (list, tuple)) else singles[0]

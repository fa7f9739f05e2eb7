"""A cost model and a policy over finished images: what each costs, whether it is unsafe, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.cost.base import RECOGNISED, CostBatch, CostModel
from t2i_spo_plugin.cost.views import VIEW_NAMES, fixed_views, is_blank
from t2i_spo_plugin.errors import ConfigError, DomainError, ImageError, NotScoredError
from t2i_spo_plugin.identity import content_hash, model_identity
from t2i_spo_plugin.images import Images, View, split, to_tensor, views
from t2i_spo_plugin.metrics import UNSAFE_COST

from .hiding import Block, block_image
from .policy import Policy
from .report import SafetyReport
from .worst_views import WorstViews


_VIEWS_AT_ONCE, _PIXELS_AT_ONCE = 64, 2**26
"""What is held in memory and scored together, at most: an animation may have thousands of frames."""

_Look = tuple[int, View, Tensor]
"""Number of an image, a view of it, and the view as `[3, H, W]`."""


@dataclass(frozen=True)
class _Seen:
    """What the cost model says of one look.

    `logits` `[K]` are the largest over the fixed views; `once` `[K]` and `logit_map` `[K, h, w]` are those of the look
    as it is, the map None of a model that gives none. `readable` is the highest probability over the views, None of a
    model that does not say; `said` is what it says in words.
    """

    logits: Tensor
    once: Tensor
    logit_map: Tensor | None
    readable: float | None
    said: str


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
        if block not in get_args(Block):
            raise ConfigError(f"block must be one of {', '.join(get_args(Block))}, got {block!r}")
        self.cost_model = cost_model
        self.policy = policy
        self.override_domain = override_domain
        self.block = block
        self.name = name
        self.check_domain(policy.domain)
        names = tuple(cost_model.categories)
        policy.category_costs(torch.zeros(1, len(names)), torch.as_tensor(cost_model.temperature).cpu(), names)

    @property
    def identity(self) -> dict[str, str]:
        """What decides its costs: the cost model by content, and the policy."""
        return {"cost_model": model_identity(self.cost_model), "policy": content_hash(self.policy.to_yaml())}

    def check_domain(self, domain: str) -> None:
        """Refuse a domain that the cost model was not made for.

        Raises:
            DomainError: `domain` is another than the cost model's, and `override_domain` is not set.
        """
        if domain != self.cost_model.domain and not self.override_domain:
            raise DomainError(
                f"the cost model was made for the domain {self.cost_model.domain!r}, not for {domain!r}, where its "
                "costs may mean little; pass override_domain=True to use it all the same"
            )

    def __call__(self, images: Images, domain: str | None = None, in_views: bool = False) -> SafetyReport:
        """Score images; each is judged on its own, whatever it is batched with.

        Every frame of an image is judged, and transparency over white as well as over black; in each category the
        highest cost counts, and the report says where it was seen. An image that is transparent all over costs
        nothing.

        Args:
            images: PIL, numpy or tensor images, or the paths or contents of image files; they are not changed. Four
                channels are RGBA.
            domain: where the images come from, as `pipeline_domain` says; None where the caller
                knows that it is the cost model's own.
            in_views: look at each image in the fixed views of `t2i_spo_plugin.cost.views` too, as evaluation does: the
                highest cost over them counts, and the report says what is unreadable or blank. Maps are those of the
                whole image. It takes nine times as long.

        Raises:
            DomainError: the images are of a foreign domain.
        """
        if domain is not None:
            self.check_domain(domain)
        singles = split(images)
        device = self._device(singles)
        reasons: list[str | None] = [None] * len(singles)
        names, temperature = tuple(self.cost_model.categories), self._temperature()
        worst, once = ([WorstViews(self.policy, names, temperature) for _ in singles] for _ in range(2))
        readable: list[float | None] = [None] * len(singles)
        blank = [True] * len(singles)
        for looks in _batches(self._looks(singles, worst, reasons, device), len(VIEW_NAMES) if in_views else 1):
            pixels = [one for _, _, one in looks]
            results = isolate_failures(lambda some: self._score(some, in_views), pixels, "the cost model failed: ")
            for (number, view, look), result in zip(looks, results, strict=True):
                if isinstance(result, str):
                    reasons[number] = reasons[number] or (f"{view.note}: {result}" if view.note else result)
                    continue
                worst[number].add(view, result.logits, result.logit_map, result.said)
                if in_views:
                    once[number].add(view, result.once, result.logit_map)
                    blank[number] = blank[number] and bool(is_blank(look[None]))
                    if result.readable is not None:
                        readable[number] = max(readable[number] or 0.0, result.readable)
        scored = [one if reason is None else None for one, reason in zip(worst, reasons, strict=True)]
        costs = torch.tensor([float("nan") if one is None else one.cost for one in scored])
        costs_once = torch.tensor(
            [one.cost if reason is None else float("nan") for one, reason in zip(once, reasons, strict=True)]
        )
        flagged = [None if one is None else bool(cost >= UNSAFE_COST) for one, cost in zip(scored, costs, strict=True)]
        return SafetyReport(
            costs=costs,
            flagged=flagged,
            category_costs=[{} if one is None else one.category_costs for one in scored],
            reasons=reasons,
            images=singles,
            views=[{} if one is None else one.views for one in scored],
            logit_maps=[None if one is None else one.logit_map for one in scored],
            policy=self.policy,
            categories=names,
            temperature=temperature,
            cost_model=self.name,
            explanations=["" if one is None else one.explanation for one in scored],
            costs_once=costs_once if in_views else None,
            blank=blank if in_views else None,
            unreadable=[
                None if says is None else not empty and says < RECOGNISED and not flag
                for says, empty, flag in zip(readable, blank, flagged, strict=True)
            ]
            if in_views
            else None,
        )

    def apply_block(self, images: Images, report: SafetyReport) -> tuple[Images, SafetyReport]:
        """The images with every one that is not known to be safe made black or blurred, in the form they came in.

        The report that comes back shows those images, so that its overlays do not bring back what was blocked.
        """
        if self.block == "none" or all(flag is False for flag in report.flagged):
            return images, report
        singles = [
            image if flag is False else block_image(image, self.block)
            for image, flag in zip(split(images), report.flagged, strict=True)
        ]
        return _like(images, singles), report.with_images(singles)

    def _temperature(self) -> Tensor:
        own = torch.as_tensor(self.cost_model.temperature).detach().float().cpu()
        return self.policy.temperatures(own, tuple(self.cost_model.categories))

    def _device(self, images: list[Any]) -> torch.device:
        """Where to score: where the images are if they are tensors, the cost model following them."""
        present = torch.as_tensor(self.cost_model.temperature).device
        device = next((image.device for image in images if isinstance(image, Tensor)), present)
        if device != present:
            self.cost_model.to(device)
        return device

    def _looks(
        self, images: list[Any], worst: list[WorstViews], reasons: list[str | None], device: torch.device
    ) -> Iterator[_Look]:
        """Everything that is to be scored, read as it is asked for; an image that cannot be read gets its reason."""
        for number, image in enumerate(images):
            try:
                for view in views(image):
                    if view.empty:
                        worst[number].add_empty(view)
                    else:
                        yield number, view, to_tensor(view.image)[0].to(device)
            except ImageError as error:
                reasons[number] = str(error)

    @torch.no_grad()
    def _score(self, pixels: Sequence[Tensor], in_views: bool) -> list[_Seen | str]:
        """What is seen in each image, on the CPU, or why it has no score."""
        seen = [fixed_views(one[None])[:, 0] if in_views else one[None] for one in pixels]
        each = len(VIEW_NAMES) if in_views else 1
        batch = self.cost_model([view for one in seen for view in one])
        return _checked(batch, len(pixels), each, len(self.cost_model.categories))


def _batches(looks: Iterator[_Look], each: int) -> Iterator[list[_Look]]:
    """Looks that are scored together, `each` of them as so many images."""
    batch: list[_Look] = []
    pixels = 0
    for look in looks:
        batch.append(look)
        pixels += each * look[2][0].numel()
        if each * len(batch) >= _VIEWS_AT_ONCE or pixels >= _PIXELS_AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _checked(batch: CostBatch, images: int, each: int, categories: int) -> list[_Seen | str]:
    """The answers for `each` views of every image, taken together; words are those for the image as it is."""
    if batch.logits.shape != (images * each, categories):
        raise NotScoredError(
            f"the cost model gave logits {tuple(batch.logits.shape)}, expected ({images * each}, {categories})"
        )
    logits, said = batch.logits.float().cpu(), batch.reasons or ("",) * (images * each)
    maps = [None] * images if batch.logit_map is None else list(batch.logit_map[::each].float().cpu())
    readable = torch.ones(images * each) if batch.readable is None else batch.readable.float().cpu()
    seen: list[_Seen | str] = []
    for number in range(images):
        part = slice(number * each, (number + 1) * each)
        failed = [n for n in range(part.start, part.stop) if not bool((logits[n].sum() + readable[n]).isfinite())]
        if failed:
            seen.append(said[failed[0]] or "the cost model gave NaN")
            continue
        says = None if batch.readable is None else float(readable[part].amax())
        seen.append(_Seen(logits[part].amax(0), logits[part][0], maps[number], says, said[part.start]))
    return seen


def _like(images: Images, singles: list[Any]) -> Images:
    if isinstance(images, np.ndarray):
        return np.stack(singles) if images.ndim == 4 else singles[0]
    if isinstance(images, Tensor):
        return torch.stack(singles) if images.ndim == 4 else singles[0]
    return singles if isinstance(images, (list, tuple)) else singles[0]

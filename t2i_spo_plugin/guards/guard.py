"""A cost model and a policy over finished images: what each costs, whether it is unsafe, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.cost.base import CostBatch, CostModel
from t2i_spo_plugin.errors import ConfigError, DomainError, ImageError, NotScoredError
from t2i_spo_plugin.images import Images, split, to_tensor
from t2i_spo_plugin.metrics import UNSAFE_COST

from .hiding import Block, block_image
from .policy import Policy
from .report import SafetyReport


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

    def __call__(self, images: Images, domain: str | None = None) -> SafetyReport:
        """Score images; each is judged on its own, whatever it is batched with.

        Args:
            images: PIL, numpy or tensor images; they are not changed.
            domain: where the images come from, as `pipeline_domain` says; None where the caller
                knows that it is the cost model's own.

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
        results = isolate_failures(self._score, list(readable.values()), "the cost model failed: ")
        for number, result in zip(readable, results, strict=True):
            if isinstance(result, str):
                reasons[number] = result
                continue
            logits, maps[number] = result
            names = tuple(self.cost_model.categories)
            per_category, enabled = self.policy.category_costs(logits[None], self._temperature(), names)
            costs[number] = self.policy.cost(per_category)[0]
            by_category[number] = dict(zip(enabled, per_category[0].tolist(), strict=True))
        flagged = [
            None if reason is not None else bool(cost >= UNSAFE_COST)
            for cost, reason in zip(costs, reasons, strict=True)
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
            image if flag is False else block_image(image, self.block)
            for image, flag in zip(split(images), report.flagged, strict=True)
        ]
        return _like(images, singles), replace(report, images=singles)

    def _temperature(self) -> Tensor:
        return torch.as_tensor(self.cost_model.temperature).detach().float().cpu()

    def _device(self, images: list[Any]) -> torch.device:
        """Where to score: where the images are if they are tensors, the cost model following them."""
        present = torch.as_tensor(self.cost_model.temperature).device
        device = next((image.device for image in images if isinstance(image, Tensor)), present)
        if device != present:
            self.cost_model.to(device)
        return device

    @torch.no_grad()
    def _score(self, pixels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | str]:
        """Logits `[K]` and map `[K, h, w]` on the CPU for each image, or why it has none."""
        return _checked(self.cost_model(list(pixels)), len(pixels), len(self.cost_model.categories))


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


def _like(images: Images, singles: list[Any]) -> Images:
    if isinstance(images, np.ndarray):
        return np.stack(singles) if images.ndim == 4 else singles[0]
    if isinstance(images, Tensor):
        return torch.stack(singles) if images.ndim == 4 else singles[0]
    return singles if isinstance(images, (list, tuple)) else singles[0]

"""Of several views of one image, what each category costs at most, and in which view that is."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i_spo_plugin.images import View

from .policy import Policy


class WorstViews:
    """What is known of one image after some of its views.

    Args:
        policy: the categories that count.
        names: the K names of the cost model.
        temperature: `[K]`, of its logits.

    Attributes:
        logit_map: `[K, h, w]`, of each category in the view where it costs most; None where the model gives none.
        explanation: what the model says in words of the view that decides; empty where nothing.
        views: those views, by category.
    """

    def __init__(self, policy: Policy, names: tuple[str, ...], temperature: Tensor) -> None:
        self.policy, self.names, self.temperature = policy, names, temperature
        self.enabled = [category.name for category in policy.enabled]
        # Until something is seen: an image that is transparent all over costs nothing anywhere.
        self.costs = torch.zeros(1, len(self.enabled))
        self.logit_map: Tensor | None = torch.zeros(len(names), 1, 1)
        self.explanation = ""
        self.views: dict[str, View] = {}

    @property
    def cost(self) -> float:
        """Of the whole image."""
        return float(self.policy.cost(self.costs)[0])

    @property
    def category_costs(self) -> dict[str, float]:
        """Of each enabled category."""
        return dict(zip(self.enabled, self.costs[0].tolist(), strict=True))

    def add_empty(self, view: View) -> None:
        """Take a view in which there is nothing to see; it counts only where there is no other."""
        if not self.views:
            self.views = dict.fromkeys(self.enabled, view)

    def add(self, view: View, logits: Tensor, logit_map: Tensor | None, explanation: str = "") -> None:
        """Take a view with its logits `[K]`, map `[K, h, w]` if there is one, and what is said of it."""
        costs, enabled = self.policy.category_costs(logits[None], self.temperature, self.names)
        first = all(earlier.empty for earlier in self.views.values())
        if first or costs.max() > self.costs.max():
            self.explanation = explanation
        if first:
            self.costs, self.logit_map = costs, logit_map
            self.views = dict.fromkeys(enabled, view)
            return
        places = [place for place in range(len(enabled)) if costs[0, place] > self.costs[0, place]]
        if logit_map is None or self.logit_map is None:
            self.logit_map = None
        else:
            if logit_map.shape != self.logit_map.shape:
                # Frames of other sizes, of a cost model whose map follows the image.
                size = self.logit_map.shape[-2:]
                logit_map = torch.nn.functional.interpolate(logit_map[None], size, mode="bilinear")[0]
            self.logit_map = self.logit_map.clone()
            for index in (self.names.index(enabled[place]) for place in places):
                self.logit_map[index] = logit_map[index]
        self.costs = self.costs.clone()
        for place in places:
            self.costs[0, place] = costs[0, place]
            self.views[enabled[place]] = view

"""Several cost models as one: any of them, their mean, or k of n; where they disagree, the words say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.identity import content_hash, model_identity
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.options import check_choice, check_range

from .base import CostBatch, CostModel


_LARGEST_LOGIT = 30.0


@dataclass(frozen=True)
class Member:
    """One cost model of an ensemble.

    Attributes:
        model: its name, as everywhere.
        categories: what the ensemble calls the member's categories, by the member's name; those that are left out do
            not vote. All vote under their own names when there is none.
    """

    model: str
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EnsembleOptions:
    """How the members' answers become one.

    Attributes:
        members: the cost models.
        rule: `any` (the highest), `mean` (of the probabilities), or `k_of_n` (the k-th highest).
        k: of `k_of_n`: how many have to find a category for it to count; where fewer know it, all of them.
    """

    members: tuple[Any, ...]
    rule: Literal["any", "mean", "k_of_n"] = "any"
    k: int = 2

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("any", "mean", "k_of_n"))
        check_range("k", self.k, 1, whole=True)
        if not isinstance(self.members, (list, tuple)) or not self.members:
            raise ConfigError(f"an ensemble needs a list of at least one member, got {self.members!r}")


class Ensemble:
    """Follows `t2i_spo_plugin.CostModel`; each member's logits count divided by its temperature.

    A category is judged by the members that know it. An image that a member fails on is not scored: the others cannot
    know what that one would have seen. The members disagree about a category where some find it, at 0.5, and some do
    not; the reasons then say each one's probability. The map is there if every member gives one: that of the member
    which decides, resampled to the largest, or of the mean.

    Args:
        members: each with its name and, by its own names, what its categories are called here.
        options: the rule.

    Raises:
        ConfigError: a member does not have a category that is named, or the members' domains differ.
    """

    def __init__(self, members: Sequence[tuple[str, CostModel, Mapping[str, str]]], options: EnsembleOptions) -> None:
        self.options = options
        self.members = [
            (name, model, dict(names) or {c: c for c in model.categories}) for name, model, names in members
        ]
        for name, model, names in self.members:
            unknown = [category for category in names if category not in model.categories]
            if unknown:
                raise ConfigError(f"{name} has no category {', '.join(unknown)}; it has {', '.join(model.categories)}")
        domains = {model.domain for _, model, _ in self.members}
        if len(domains) != 1:
            raise ConfigError(f"the members were made for different domains: {', '.join(sorted(domains))}")
        self.domain = domains.pop()
        self.categories = tuple(dict.fromkeys(here for _, _, names in self.members for here in names.values()))
        self.temperature = torch.ones(len(self.categories))

    @property
    def identity(self) -> str:
        """The members, by content, and the rule."""
        parts = [(model_identity(model), sorted(names.items())) for _, model, names in self.members]
        return content_hash(repr(parts), self.options.rule, self.options.k)

    def to(self, device: torch.device | str) -> Ensemble:
        """Move the members."""
        for _, model, _ in self.members:
            model.to(device)
        self.temperature = self.temperature.to(device)
        return self

    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`."""
        batches = [model(images) for _, model, _ in self.members]
        size = _largest([batch.logit_map for batch in batches])
        logits, maps, votes = [], [], []
        for category in self.categories:
            judged, placed, named = [], [], []
            for (name, model, names), batch in zip(self.members, batches, strict=True):
                temperature = torch.as_tensor(model.temperature)
                for own in (own for own, here in names.items() if here == category):
                    column = tuple(model.categories).index(own)
                    judged.append((batch.logits[:, column] / temperature[column]).to(self.temperature.device))
                    named.append(name)
                    if size is not None and batch.logit_map is not None:
                        one = interpolate(batch.logit_map[:, column : column + 1], size, mode="bilinear")[:, 0]
                        placed.append((one / temperature[column]).to(self.temperature.device))
            found = torch.stack(judged, 1)
            logits.append(self._decided(found))
            votes.append((named, found))
            if placed:
                maps.append(self._map(found, torch.stack(placed, 1)))
        return CostBatch(torch.stack(logits, 1), torch.stack(maps, 1) if maps else None, self._reasons(batches, votes))

    def _decided(self, judged: Tensor) -> Tensor:
        """`[B, M]` -> `[B]`; NaN where one of them is."""
        if self.options.rule == "mean":
            return judged.sigmoid().mean(1).logit(1e-6).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        ranked = judged.sort(1, descending=True).values
        chosen = ranked[:, self._rank(judged.shape[1])]
        return torch.where(judged.isnan().any(1), torch.nan, chosen)

    def _map(self, judged: Tensor, maps: Tensor) -> Tensor:
        """Maps `[B, M, h, w]` of the members -> `[B, h, w]`."""
        if self.options.rule == "mean":
            return maps.mean(1)
        decides = judged.argsort(1, descending=True)[:, self._rank(judged.shape[1])]
        return maps[torch.arange(len(maps)), decides]

    def _rank(self, members: int) -> int:
        return 0 if self.options.rule == "any" else min(self.options.k, members) - 1

    def _reasons(self, batches: Sequence[CostBatch], votes: Sequence[tuple[list[str], Tensor]]) -> tuple[str, ...]:
        reasons = []
        for number in range(len(batches[0].logits)):
            said = []
            for (name, _, _), batch in zip(self.members, batches, strict=True):
                words = batch.reasons[number] if batch.reasons is not None else ""
                failed = bool(batch.logits[number].isnan().any())
                if failed or words:
                    said.append(f"{name}: {words or 'gave NaN'}")
            for category, (named, judged) in zip(self.categories, votes, strict=True):
                values = judged[number]
                if bool((values >= 0).any()) and bool((values < 0).any()):
                    each = ", ".join(f"{n} {float(v):.2f}" for n, v in zip(named, values.sigmoid(), strict=True))
                    said.append(f"the members disagree about {category}: {each}")
            reasons.append("; ".join(said))
        return tuple(reasons)


def _largest(maps: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """The largest height and width of the maps; None if one is missing."""
    sizes = [one.shape[-2:] for one in maps if one is not None]
    if len(sizes) != len(maps):
        return None
    return max(size[0] for size in sizes), max(size[1] for size in sizes)

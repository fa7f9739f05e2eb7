"""Where an image is unsafe, cached once, and how much more or less such places count in the errors.

This project's own. A weight is `outside + (inside - outside) * C` with C the cost map of the image in [0, 1], the
larger one of a pair's images at each place, divided by its mean: an error keeps its scale, and where nothing is unsafe
every weight is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from t2i_spo_plugin.errors import NotScoredError
from t2i_spo_plugin.guards import Guard
from t2i_spo_plugin.options import check_range
from t2i_spo_plugin.registry import STICKER

from .caches import ShardStore, SourceImage, decode_square


_SIZE = 64
"""Edge of the cost maps as they are stored, if the image is not smaller."""


@dataclass(frozen=True)
class RegionOptions:
    """Errors weighed by where an image is unsafe.

    Attributes:
        inside: weight of what the cost map shows as unsafe, at least 0; with both at 1 no map is made.
        outside: weight of the rest, at least 0.
        cost_model: what says how unsafe an image is: `sticker`, a name such as `open_nsfw`, a folder, or a Hub id.
        policy: `sticker`, or a policy's name or YAML file.
        override_domain: use the cost model on images of another domain than its own.
    """

    inside: float = 1.0
    outside: float = 1.0
    cost_model: str = STICKER
    policy: str = STICKER
    override_domain: bool = False

    def __post_init__(self) -> None:
        check_range("regions.inside", self.inside, 0.0)
        check_range("regions.outside", self.outside, 0.0)
        # One place at least must count, whatever the map shows.
        check_range("regions.inside + regions.outside", self.inside + self.outside, 0.0, open_low=True)

    @property
    def active(self) -> bool:
        """Whether there is anything to weigh."""
        return (self.inside, self.outside) != (1.0, 1.0)


@dataclass(frozen=True)
class Regions:
    """Cost maps of images, and the weights inside and outside."""

    store: ShardStore
    inside: float
    outside: float

    def maps(self, keys: Sequence[str]) -> Tensor:
        """`[B, 1, e, e]` in [0, 1]."""
        return self.store.get(keys)["map"][:, None].float()


def region_weights(costs: Tensor, size: tuple[int, int], inside: float, outside: float) -> Tensor:
    """Weights `[B, 1, h, w]`, mean 1 over each image, of cost maps `[B, 1, e, e]` in [0, 1].

    An image whose every place would have the weight 0 has the weight 1 everywhere.
    """
    costs = F.adaptive_avg_pool2d(costs, size)
    weights = outside + (inside - outside) * costs
    mean = weights.mean((2, 3), keepdim=True)
    return torch.where(mean > 0.0, weights / torch.where(mean > 0.0, mean, 1.0), 1.0)


def build_maps(
    store: ShardStore,
    images: Iterable[SourceImage],
    guard: Guard,
    resolution: int,
    domain: str,
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """The cost map of every image that has none yet, as the guard's report shows it.

    Raises:
        NotScoredError: the cost model fails on an image; the sentence names it.
        DomainError: the guard does not know `domain`.
    """
    guard.check_domain(domain)
    todo = {image.key: image for image in images if image.key not in store}
    edge = min(_SIZE, resolution)
    with tqdm(total=len(todo), desc="cost maps", unit="image", disable=not progress) as bar:
        rows = list(todo.values())
        for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            report = guard([decode_square(image.data, resolution)[0] for image in chunk])
            for number, image in enumerate(chunk):
                if report.reasons[number] is not None:
                    raise NotScoredError(f"{image.name} has no cost map: {report.reasons[number]}")
            maps = torch.stack([report.heat_map(number) for number in range(len(chunk))])
            store.append([image.key for image in chunk], {"map": F.adaptive_avg_pool2d(maps, edge)})
            bar.update(len(chunk))

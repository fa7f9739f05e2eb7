"""A cost model measured on labelled images: temperatures, thresholds for a wanted rate of false alarms, and plots.

Half of the images (by their content) fits temperature and threshold, the other half says how good they are, so that no
number is measured where it was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.cost.base import CostModel
from t2i_spo_plugin.cost.losses import expected_calibration_error, fit_temperature
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import sha256_of
from t2i_spo_plugin.html import render
from t2i_spo_plugin.images import open_image
from t2i_spo_plugin.metrics import check_not_scored, wilson
from t2i_spo_plugin.options import check_range

from .policy import Category, Policy


TEMPLATE = Path(__file__).parent / "templates" / "calibration.html.jinja"
_BINS = 10
_AT_ONCE = 16


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the categories that it shows; a safe one shows none."""

    path: Path
    categories: frozenset[str]


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with its Wilson interval."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        low, high = wilson(self.count, self.total)
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        shown = f"{self.value:.1%}" if self.total else "unknown"
        return f"{shown} ({self.count} of {self.total}; 95 % interval {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class CategoryCalibration:
    """What was fitted for one category, and what it gives on the other images.

    Attributes:
        category: its name.
        temperature: of the logits.
        threshold: the calibrated probability from which an image counts as unsafe.
        false_alarms: of the safe images that were held out.
        found: of the unsafe images that were held out.
        auc: the probability that an unsafe image has a higher logit than a safe one; NaN without one of them.
        error_before: expected calibration error with the cost model's own temperature.
        error: the same with the fitted one.
        roc: false alarms and found, as shares, at each threshold.
        reliability: mean probability, share unsafe and number of images in bins of equal width.
    """

    category: str
    temperature: float
    threshold: float
    false_alarms: Share
    found: Share
    auc: float
    error_before: float
    error: float
    roc: tuple[tuple[float, float], ...]
    reliability: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class Calibration:
    """The policy that was found, and what is known of it."""

    policy: Policy
    categories: tuple[CategoryCalibration, ...]
    images: int
    held_out: int
    not_scored: tuple[str, ...]
    cost_model: str
    wanted: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(replace(self, policy=self.policy.name)) | {"policy": asdict(self.policy)}  # type: ignore[arg-type]

    def page(self) -> str:
        """One HTML page with the numbers, reliability and ROC plots."""
        plots = [
            (one, _polyline(one.roc), _polyline([(p, share) for p, share, n in one.reliability if n]))
            for one in self.categories
        ]
        return render(TEMPLATE, title=f"Calibration of {self.cost_model}", calibration=self, plots=plots)


def calibrate(
    cost_model: CostModel,
    images: Sequence[LabelledImage],
    false_alarms: float = 0.01,
    name: str = "calibrated",
    cost_model_name: str = "",
    held_out: bool = True,
    progress: Any = iter,
) -> Calibration:
    """Temperatures and thresholds of a cost model, from images whose categories are known.

    Args:
        cost_model: the model; every category that the images name must be one of its own.
        images: safe and unsafe ones.
        false_alarms: the share of safe images that may be called unsafe, in each category.
        name: of the policy.
        cost_model_name: for the report.
        held_out: measure on the half of the images that does not fit; otherwise all do both.
        progress: wraps the batches, such as tqdm.

    Raises:
        ConfigError: a category without unsafe or safe images in the half that fits, or one that the model lacks.
        NotScoredError: more than 1 % of the images cannot be scored.
    """
    check_range("false_alarms", false_alarms, 0.0, 0.5)
    named = sorted(set().union(*(image.categories for image in images)) if images else ())
    unknown = [category for category in named if category not in cost_model.categories]
    if unknown or not named:
        raise ConfigError(
            f"the images must show categories of the cost model ({', '.join(cost_model.categories)}), got "
            f"{', '.join(named) or 'none that is unsafe'}"
        )
    scored, failed = _logits(cost_model, images, progress)
    check_not_scored(len(failed), len(images), why=failed[0] if failed else "")
    logits = torch.stack([row for _, row in scored])
    second = torch.tensor([held_out and _in_second_half(image.path) for image, _ in scored])
    results = []
    for category in named:
        column = tuple(cost_model.categories).index(category)
        # An image that is unsafe otherwise says nothing of this category's false alarms.
        used = torch.tensor([category in image.categories or not image.categories for image, _ in scored])
        labels = torch.tensor([category in image.categories for image, _ in scored])
        own = float(torch.as_tensor(cost_model.temperature)[column])
        test = used & (second if held_out else torch.ones_like(second))
        fit = used & ~second
        results.append(_of_category(category, logits[:, column], labels, fit, test, own, false_alarms))
    policy = Policy(
        name,
        cost_model.domain,
        tuple(Category(one.category, one.threshold, temperature=one.temperature) for one in results),
    )
    return Calibration(
        policy, tuple(results), len(scored), int(second.sum()), tuple(failed), cost_model_name, false_alarms
    )


def threshold_for(safe: Tensor, unsafe: Tensor, false_alarms: float) -> float:
    """The lowest threshold at which at most the share `false_alarms` of `safe` `[N]` reaches it.

    It lies in the middle between the highest safe probability that stays below it and the next one above, of either
    kind `[M]`; strictly between 0 and 1.
    """
    ranked = safe.double().sort(descending=True).values
    below = float(ranked[math.floor(false_alarms * len(ranked) + 1e-9)])
    above = torch.cat([ranked, unsafe.double()])
    higher = above[above > below]
    upper = float(higher.min()) if len(higher) else 1.0
    return min(max((below + upper) / 2, 1e-6), 1 - 1e-6)


def roc_points(safe: Tensor, unsafe: Tensor) -> list[tuple[float, float]]:
    """Shares of `safe` `[N]` and `unsafe` `[M]` that reach each threshold, from (0, 0) to (1, 1)."""
    levels = torch.cat([safe, unsafe]).unique(sorted=True).flip(0)
    points = [(float((safe >= level).double().mean()), float((unsafe >= level).double().mean())) for level in levels]
    return [(0.0, 0.0), *points]


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area under a ROC, by trapezia: ties count half."""
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False))


def _of_category(
    category: str, logits: Tensor, labels: Tensor, fit: Tensor, test: Tensor, own: float, wanted: float
) -> CategoryCalibration:
    safe, unsafe = (int((fit & (labels == wanted_label)).sum()) for wanted_label in (False, True))
    if not safe or not unsafe:
        raise ConfigError(
            f"{category}: the half that fits has {safe} safe and {unsafe} unsafe images; give more of both, or use "
            "all of them for fitting and measuring"
        )
    temperature = round(float(fit_temperature(logits[fit], labels[fit].float())), 6)
    probability = (logits / temperature).sigmoid()
    threshold = round(threshold_for(probability[fit & ~labels], probability[fit & labels], wanted), 6)
    threshold = min(max(threshold, 1e-6), 1 - 1e-6)
    safe_test, unsafe_test = probability[test & ~labels], probability[test & labels]
    points = roc_points(safe_test, unsafe_test) if len(safe_test) and len(unsafe_test) else []
    every, truth = probability[test], labels[test]
    return CategoryCalibration(
        category=category,
        temperature=temperature,
        threshold=threshold,
        false_alarms=Share(int((safe_test >= threshold).sum()), len(safe_test)),
        found=Share(int((unsafe_test >= threshold).sum()), len(unsafe_test)),
        auc=area(points) if points else math.nan,
        error_before=expected_calibration_error((logits[test] / own).sigmoid(), truth),
        error=expected_calibration_error(every, truth),
        roc=tuple(points),
        reliability=tuple(_reliability(every, truth)),
    )


def _reliability(probability: Tensor, labels: Tensor) -> Iterator[tuple[float, float, int]]:
    place = (probability * _BINS).long().clamp(max=_BINS - 1)
    for number in range(_BINS):
        inside = place == number
        if bool(inside.any()):
            yield float(probability[inside].mean()), float(labels[inside].float().mean()), int(inside.sum())


def _logits(
    cost_model: CostModel, images: Sequence[LabelledImage], progress: Any
) -> tuple[list[tuple[LabelledImage, Tensor]], list[str]]:
    """Each image with its logits `[K]`, and why some have none."""

    def score(part: Sequence[LabelledImage]) -> list[Tensor | str]:
        batch = cost_model([open_image(image.path) for image in part])
        said = batch.reasons or ("",) * len(part)
        rows = zip(batch.logits.float().cpu(), said, strict=True)
        return [row if bool(row.isfinite().all()) else words or "the cost model gave NaN" for row, words in rows]

    scored, failed = [], []
    for start in progress(range(0, len(images), _AT_ONCE)):
        part = images[start : start + _AT_ONCE]
        for image, result in zip(part, isolate_failures(score, part), strict=True):
            if isinstance(result, str):
                failed.append(f"{image.path.name}: {result}")
            else:
                scored.append((image, result))
    return scored, failed


def _in_second_half(path: Path) -> bool:
    """By content, so that the same image never fits and measures."""
    return int(sha256_of(path)[:8], 16) % 2 == 1


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    """Points of the unit square as an SVG polyline in a square of 100."""
    return " ".join(f"{100 * x:.2f},{100 - 100 * y:.2f}" for x, y in points)


def labelled_folders(folders: Mapping[str, Sequence[Path]], safe: Sequence[Path]) -> list[LabelledImage]:
    """Images by the folder that they lie in: `folders` by category, and the safe ones.

    Raises:
        ConfigError: an image is named as both.
    """
    by_path: dict[Path, frozenset[str]] = {path: frozenset() for path in safe}
    for category, paths in folders.items():
        for path in paths:
            if by_path.get(path) == frozenset():
                raise ConfigError(f"{path} is named as safe and as {category}")
            by_path[path] = by_path.get(path, frozenset()) | {category}
    return [LabelledImage(path, categories) for path, categories in by_path.items()]

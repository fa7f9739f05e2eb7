"""Windows and strength schedules: when during the denoising an adapter is on, and how strongly.

Progress counts the steps of the schedule: step k of N begins at k / N, 0 is pure noise, 1 the finished image. A
pipeline that begins in the middle (image to image) begins with the progress it skips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from t2i_spo_plugin.errors import ConfigError


FULL_WINDOW = (0.0, 1.0)
"""All denoising steps."""

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A factor on an adapter's strength over the denoising: straight lines between points, constant outside them.

    Attributes:
        points: (progress, factor) with rising progress in [0, 1] and factors of at least 0, such as
            `((0.0, 1.0), (0.5, 1.0), (0.8, 0.0))`: full strength for the first half, then fading out.

    Raises:
        ConfigError: no points, progress that does not rise, or a negative factor.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        try:
            points = tuple((float(progress), float(factor)) for progress, factor in self.points)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a schedule is a list of (progress, factor), got {self.points!r}") from error
        positions = [progress for progress, _ in points]
        rises = positions == sorted(set(positions))
        if not points or not rises or not all(0.0 <= progress <= 1.0 for progress in positions):
            raise ConfigError(f"a schedule needs points whose progress rises within [0, 1], got {self.points!r}")
        if not all(math.isfinite(factor) and factor >= 0.0 for _, factor in points):
            raise ConfigError(f"a schedule's factors must be at least 0, got {self.points!r}")
        object.__setattr__(self, "points", points)

    def factor(self, progress: float) -> float:
        """The factor for a step that begins at `progress`."""
        before = [point for point in self.points if point[0] <= progress]
        after = [point for point in self.points if point[0] > progress]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (start, low), (end, high) = before[-1], after[0]
        return low + (high - low) * (progress - start) / (end - start)


def check_window(window: tuple[float, float]) -> tuple[float, float]:
    """`window` as two floats.

    Raises:
        ConfigError: not `0 <= start < end <= 1`.
    """
    try:
        start, end = (float(value) for value in window)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"window must be two numbers (start, end), got {window!r}") from error
    if not 0.0 <= start < end <= 1.0:
        raise ConfigError(f"window must satisfy 0 <= start < end <= 1, got {window!r}")
    return start, end


def in_window(progress: float, window: tuple[float, float]) -> bool:
    """Whether a step that begins at `progress` lies in `[start, end)`; the last step of a window to 1 always does."""
    start, end = window
    return start - _TOLERANCE <= progress < end - _TOLERANCE

"""When during the denoising an adapter is on, and how strongly: windows, schedules, and what an adapter gate goes by.

Progress counts the steps of the schedule: step k of N begins at k / N, 0 is pure noise, 1 the finished image. A
pipeline that begins in the middle (image to image) begins with the progress it skips.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, PipelineError


if TYPE_CHECKING:
    from .gate_network import GateNetwork


FULL_WINDOW = (0.0, 1.0)

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
        where = [progress for progress, _ in points]
        if not points or not all(0.0 <= progress <= 1.0 for progress in where) or where != sorted(set(where)):
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


@dataclass(frozen=True)
class AdapterGate:
    """Draw with the base model unless what the adapter would change says that the image is going to be unsafe.

    In the steps that begin before `until` the denoiser is asked twice, without and with the adapter. An image whose
    evidence reaches `threshold` is drawn with the adapter from that step on; every other one is the base model's own.

    Attributes:
        threshold: evidence from which on the adapter is used. It belongs to one adapter, base and kind of evidence.
        until: progress before which the denoiser is asked twice; 0.08 is two steps of 25.
        reader: what turns the change into evidence; None takes its size, `norm_score`.

    Raises:
        ConfigError: a threshold that is not a number, or `until` outside (0, 1].
    """

    threshold: float
    until: float = 0.08
    reader: GateNetwork | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ConfigError(f"threshold must be a number, got {self.threshold!r}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be finite, got {self.threshold}")
        if not 0.0 < self.until <= 1.0:
            raise ConfigError(f"until must be in (0, 1], got {self.until}")

    def evidence(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        """`[B]` from the denoiser's predictions `[B, ...]` for the prompts, without and with the adapter."""
        if self.reader is None:
            return norm_score(without, with_adapter)
        return self.reader.evidence(without, with_adapter)

    def needed(self, evidence: Tensor) -> Tensor:
        """Which images get the adapter, `[B]` bool, from their evidence `[B]`; NaN is not taken for safe."""
        return ~(evidence < self.threshold)


def rows_of_images(images: Tensor, rows: int, by_row: bool = True) -> Tensor:
    """What holds for each of B images, `images [B]` bool, for the rows of a denoiser's batch: `[rows]` bool.

    A batch holds every image once a prompt, one prompt after the other. Where it does not, or where layers fold rows
    into one another (`by_row` is False), what holds for one image holds for all rows.
    """
    if by_row and rows % len(images) == 0:
        return images.repeat(rows // len(images))
    return images.any().expand(rows)


def pick_rows(before: Tensor, after: Tensor, rows: Tensor) -> Tensor:
    """`[rows, ...]` from `after` where `rows [rows]` says so, otherwise from `before`."""
    return torch.where(rows.to(before.device).view(-1, *[1] * (before.ndim - 1)), after, before)


def norm_score(without: Tensor, with_adapter: Tensor) -> Tensor:
    """`||with - without||^2 / ||without||^2` of each of B predictions `[B, ...]`, in float32."""
    base = without.float().flatten(1)
    return (with_adapter.float().flatten(1) - base).square().sum(1) / base.square().sum(1).clamp(min=1e-12)


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


def check_steering(pipe: Any, window: tuple[float, float], steering: Schedule | AdapterGate | None) -> None:
    """Refuse what `pipe` cannot do.

    Raises:
        ConfigError: no kind of steering, or an adapter gate with a window.
        PipelineError: the pipeline cannot change strengths between its steps.
    """
    if steering is not None and not isinstance(steering, (Schedule, AdapterGate)):
        raise ConfigError(f"steering must be a Schedule or a AdapterGate, got {type(steering).__name__}")
    if isinstance(steering, AdapterGate) and window != FULL_WINDOW:
        raise ConfigError("an adapter gate decides for itself when the adapter is on; it takes no window")
    if (window != FULL_WINDOW or steering is not None) and not can_steer(pipe):
        what = (
            "a window" if steering is None else "a schedule" if isinstance(steering, Schedule) else "an adapter gate"
        )
        raise PipelineError(
            f"{what} needs a pipeline that was given to enable_spo and calls callback_on_step_end; this "
            f"{type(pipe).__name__} is not one"
        )


def can_steer(pipe: Any) -> bool:
    """Whether `pipe` was given to `enable_spo` and calls `callback_on_step_end`."""
    enabled = getattr(type(pipe), "spo_applies_windows", False)
    return bool(enabled) and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def in_window(progress: float, window: tuple[float, float]) -> bool:
    """Whether a step that begins at `progress` lies in `[start, end)`; the last step of a window to 1 always does."""
    start, end = window
    return start - _TOLERANCE <= progress < end - _TOLERANCE


def first_progress(arguments: Mapping[str, Any]) -> float:
    """Progress of the first step, from the call's arguments: what `strength` or `denoising_start` make it skip."""
    start = arguments.get("denoising_start")
    if isinstance(start, float):
        return start
    strength = arguments.get("strength")
    return 1.0 - float(strength) if isinstance(strength, (int, float)) else 0.0


def images_in_call(arguments: Mapping[str, Any]) -> int:
    """How many images a pipeline call draws, from its arguments; 1 when they do not tell."""
    prompt = arguments.get("prompt")
    embeds = arguments.get("prompt_embeds")
    latents = arguments.get("latents")
    if isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    elif prompt is None and isinstance(embeds, torch.Tensor):
        prompts = embeds.shape[0]
    elif prompt is None and isinstance(latents, torch.Tensor):
        return int(latents.shape[0])
    else:
        prompts = 1
    each = next(
        (arguments[key] for key in ("num_images_per_prompt", "num_videos_per_prompt") if arguments.get(key)), 1
    )
    return prompts * int(each)

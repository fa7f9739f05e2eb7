"""The adapter gate: decides once per image, in the first denoising steps, whether the adapter is on.

In these steps the denoiser runs without and with the adapter. How it changes the prediction gives the gate score; the
decision (threshold, NaN, latch, report) is `GateState`, which whatever runs the denoiser drives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError

from .gate_network import GateNetwork
from .schedule import in_window


@dataclass(frozen=True)
class AdapterGate:
    """Generate with the base model unless what the adapter would change says that the image is going to be unsafe.

    In the decision window, the steps that begin before `until`, the denoiser runs twice, without and with the adapter.
    An image whose gate score reaches `threshold` is generated with the adapter from that step on; every other image is
    the base model's own.

    Attributes:
        threshold: gate score from which on the adapter is on. It belongs to one adapter, base and kind of score.
        until: progress at which the decision window ends; 0.08 is two steps of 25.
        network: computes the score from both predictions; None takes the norm of the change, `norm_score`.

    Raises:
        ConfigError: a threshold that is not a number, or `until` outside (0, 1].
    """

    threshold: float
    until: float = 0.08
    network: GateNetwork | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ConfigError(f"threshold must be a number, got {self.threshold!r}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be finite, got {self.threshold}")
        if not 0.0 < self.until <= 1.0:
            raise ConfigError(f"until must be in (0, 1], got {self.until}")

    def score(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        """`[B]` from the denoiser's predictions `[B, ...]` for the prompts, without and with the adapter."""
        if self.network is None:
            return norm_score(without, with_adapter)
        return self.network.score(without, with_adapter)

    def is_on(self, scores: Tensor) -> Tensor:
        """Which images get the adapter, `[B]` bool, from their gate scores `[B]`; NaN never counts as safe."""
        return ~(scores < self.threshold)

    def in_decision_window(self, progress: float) -> bool:
        """Whether a step that begins at `progress` belongs to the decision window."""
        return in_window(progress, (0.0, self.until))


@dataclass(frozen=True)
class GateReport:
    """What an adapter gate decided in one call that generated B images.

    Attributes:
        gated_on: which images were generated with the adapter; the others are the base model's own.
        scores: `[B]`, the highest gate score of each image; NaN where none was computed.
    """

    gated_on: list[bool]
    scores: Tensor


class GateState:
    """The decision of an adapter gate for the B images of one run; an image that is gated on stays so.

    Args:
        gate: the adapter gate.
        images: how many images the run generates, B.

    Attributes:
        gated_on: `[B]` bool, which images get the adapter.
        scores: `[B]`, the highest gate score so far; NaN where there is none.
        by_row: whether each row of a batch stays a row inside the denoiser. Where layers fold rows into one another,
            set it to False: one image that is gated on then gives the adapter to the whole batch.
    """

    def __init__(self, gate: AdapterGate, images: int) -> None:
        self.gate = gate
        self.gated_on = torch.zeros(images, dtype=torch.bool)
        self.scores = torch.full((images,), float("nan"))
        self.by_row = True

    @property
    def is_final(self) -> bool:
        """Whether nothing is left to decide: every image is gated on."""
        return bool(self.gated_on.all())

    @property
    def report(self) -> GateReport:
        """What has been decided so far."""
        return GateReport(self.gated_on.tolist(), self.scores.clone())

    def close(self) -> None:
        """The decision window has passed: where nothing was scored, every image counts as unsafe."""
        if bool(self.scores.isnan().all()):
            self.gated_on[:] = True

    def rows(self, rows: int) -> Tensor:
        """Which rows of a denoiser's batch get the adapter, `[rows]` bool."""
        return rows_of_images(self.gated_on, rows, self.by_row)

    def decide(
        self, without: Tensor, with_adapter: Tensor, prompt_parts: Sequence[int] = (-1,), parts: int | None = None
    ) -> None:
        """Gate on the images whose score reaches the threshold in this step, or is not a number.

        Args:
            without: the denoiser's predictions `[rows, ...]` without the adapter.
            with_adapter: with it.
            prompt_parts: a batch holds every image once per part (guidance: the negative prompt, the prompt); those
                that belong to the prompt itself. The last one by default.
            parts: in how many parts the batch is meant to be; None takes what the number of rows gives. Where the rows
                are not that many, the highest score of all rows counts for every image.
        """
        images, rows = len(self.gated_on), len(without)
        parts = rows // images if parts is None else parts
        whole = parts > 0 and rows == parts * images
        if whole:
            without, with_adapter = (
                prediction.unflatten(0, (parts, images))[list(prompt_parts)].flatten(0, 1)
                for prediction in (without, with_adapter)
            )
        scores = self.gate.score(without, with_adapter).detach().float().cpu()
        scores = scores.view(-1, images).amax(0) if whole else scores.max().expand(images)
        self.scores = torch.where(self.gated_on, self.scores, torch.fmax(self.scores, scores))
        self.gated_on = self.gated_on | self.gate.is_on(scores)


def norm_score(without: Tensor, with_adapter: Tensor) -> Tensor:
    """`||with - without||^2 / ||without||^2` of each of B predictions `[B, ...]`, in float32."""
    base = without.float().flatten(1)
    return (with_adapter.float().flatten(1) - base).square().sum(1) / base.square().sum(1).clamp(min=1e-12)


def rows_of_images(images: Tensor, rows: int, by_row: bool = True) -> Tensor:
    """What holds for each of B images, `images [B]` bool, for the rows of a denoiser's batch: `[rows]` bool.

    A batch holds every image once a prompt, one prompt after the other. Where it does not, or where layers fold rows
    into one another (`by_row` is False), what holds for one image holds for all rows.
    """
    if by_row and rows % len(images) == 0:
        return images.repeat(rows // len(images))
    return images.any().expand(rows)


def pick_rows(without: Tensor, with_adapter: Tensor, rows: Tensor) -> Tensor:
    """`[rows, ...]` from `with_adapter` where `rows [rows]` says so, otherwise from `without`."""
    return torch.where(rows.to(without.device).view(-1, *[1] * (without.ndim - 1)), with_adapter, without)

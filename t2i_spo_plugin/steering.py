"""Strength over the denoising trajectory: windows in which a safety adapter is on.

Progress counts the steps of the schedule: step k of N begins at k / N, 0 is pure noise, 1 the finished image. A
pipeline that begins in the middle (image to image) begins with the progress it skips. An adapter is on in the steps
that begin inside its window. Text encoders run once, before the first step, so their part of an adapter counts only
if the window begins there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .architecture import lora_components
from .attachment import switch
from .loading import LoadedAdapter


StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

_TOLERANCE = 1e-6


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


class WindowSteering:
    """Switches adapters on and off between the steps of one call; use it as a context manager around the call.

    Args:
        pipe: the pipeline that carries the adapters.
        adapters: those to steer, with their strengths and windows.
        progress: of the first step, as `first_progress` gives it.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, LoadedAdapter], progress: float = 0.0) -> None:
        self.models = list(lora_components(pipe).values())
        self.adapters = dict(adapters)
        self.applied = {name: adapter.strength for name, adapter in self.adapters.items()}
        self.used: set[str] = set()
        self.progress = progress
        self.position = -1

    def __enter__(self) -> WindowSteering:
        self._apply(self.progress)
        return self

    def __exit__(self, *error: object) -> None:
        for name, adapter in self.adapters.items():
            switch(self.models, name, adapter.strength)
        unused = sorted(set(self.adapters) - self.used)
        if unused and error[0] is None:
            warnings.warn(
                f"no step began inside the window of {', '.join(unused)}: the picture was drawn without; "
                "use more steps or a wider window",
                stacklevel=3,
            )

    def callback(self, then: StepCallback | None) -> StepCallback:
        """A `callback_on_step_end` that runs the user's own, then sets the strengths for the next step."""

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            result = tensors if then is None else then(pipe, step, timestep, tensors)
            timesteps = pipe.scheduler.timesteps
            self.position = self._position(timesteps, timestep)
            if self.position + 1 < len(timesteps):
                self._apply((self.position + 1) / len(timesteps))
            return result

        return on_step_end

    def _position(self, timesteps: Tensor, timestep: Any) -> int:
        """Index of the step that just ended; schedulers of second order hold a timestep twice, so it only moves on."""
        matches = (timesteps.cpu() == float(timestep)).nonzero().flatten().tolist()
        return next((index for index in matches if index > self.position), self.position + 1)

    def _apply(self, progress: float) -> None:
        for name, adapter in self.adapters.items():
            inside = in_window(progress, adapter.window)
            strength = adapter.strength if inside else 0.0
            if inside:
                self.used.add(name)
            if strength != self.applied[name]:
                switch(self.models, name, strength)
                self.applied[name] = strength

"""Strength between the denoising steps of one pipeline call: windows, strength schedules, adapter gates.

Text encoders run once, before the first step, so their part of an adapter counts only if the adapter is on there; an
adapter gate, which decides later, takes none.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, PipelineError
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, Schedule, in_window

from .architecture import lora_components
from .gated_call import GatedCall, images_in_call
from .loaded import AttachedAdapter, LoadedAdapter


StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class StepControl:
    """Sets adapters' strengths between the steps of one call; use it as a context manager around the call.

    Args:
        pipe: the pipeline that carries the adapters.
        adapters: those whose strength changes, with their strengths, windows, schedules or adapter gate.
        arguments: of the call, by name, with their defaults.

    Raises:
        PipelineError: more than one adapter gate, or one for a compiled model.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, LoadedAdapter], arguments: Mapping[str, Any]) -> None:
        components = lora_components(pipe)
        gated = {name: adapter for name, adapter in adapters.items() if isinstance(adapter.steering, AdapterGate)}
        if len(gated) > 1:
            raise PipelineError(
                f"only one adapter of a pipeline can be gated, these are: {', '.join(gated)}; merge them "
                "into one (spo merge), or give the others a strength"
            )
        self.progress = first_progress(arguments)
        self.position = -1
        self.adapters = {name: adapter for name, adapter in adapters.items() if name not in gated}
        self.attached = {name: AttachedAdapter(components, name) for name in self.adapters}
        self.applied = {name: adapter.strength for name, adapter in self.adapters.items()}
        self.used: set[str] = set()
        self.gated: GatedCall | None = None
        for adapter in gated.values():
            assert isinstance(adapter.steering, AdapterGate)
            self.gated = GatedCall(pipe, adapter, adapter.steering, images_in_call(arguments), self.progress)

    def __enter__(self) -> StepControl:
        self._begin_step(self.progress)
        if self.gated is not None:
            self.gated.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.gated is not None:
            self.gated.stop()
        for name, adapter in self.adapters.items():
            self.attached[name].apply(adapter.strength, adapter.blocks)
        unused = sorted(set(self.adapters) - self.used)
        if unused and error[0] is None:
            warnings.warn(
                f"no step began inside the window of {', '.join(unused)}: the image was generated without; "
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
                self._begin_step((self.position + 1) / len(timesteps))
            return result

        return on_step_end

    def _position(self, timesteps: Tensor, timestep: Any) -> int:
        """Index of the step that just ended; schedulers of second order hold a timestep twice, so it only moves on."""
        matches = (timesteps.cpu() == float(timestep)).nonzero().flatten().tolist()
        return next((index for index in matches if index > self.position), self.position + 1)

    def _begin_step(self, progress: float) -> None:
        if self.gated is not None:
            self.gated.begin_step(progress)
        for name, adapter in self.adapters.items():
            inside = in_window(progress, adapter.window)
            factor = adapter.steering.factor(progress) if isinstance(adapter.steering, Schedule) else 1.0
            strength = adapter.strength * factor if inside else 0.0
            if inside:
                self.used.add(name)
            if strength != self.applied[name]:
                self.attached[name].apply(strength, adapter.blocks)
                self.applied[name] = strength


def changes_between_steps(adapter: LoadedAdapter) -> bool:
    """Whether the adapter's strength changes between the steps of a call."""
    return adapter.strength > 0.0 and (adapter.window != FULL_WINDOW or adapter.steering is not None)


def check_steering(pipe: Any, window: tuple[float, float], steering: Schedule | AdapterGate | None) -> None:
    """Refuse what `pipe` cannot do.

    Raises:
        ConfigError: no kind of steering, or an adapter gate with a window.
        PipelineError: the pipeline cannot change strengths between its steps.
    """
    if steering is not None and not isinstance(steering, (Schedule, AdapterGate)):
        raise ConfigError(f"steering must be a Schedule or an AdapterGate, got {type(steering).__name__}")
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


def first_progress(arguments: Mapping[str, Any]) -> float:
    """Progress of the first step, from the call's arguments: what `strength` or `denoising_start` make it skip."""
    start = arguments.get("denoising_start")
    if isinstance(start, float):
        return start
    strength = arguments.get("strength")
    return 1.0 - float(strength) if isinstance(strength, (int, float)) else 0.0

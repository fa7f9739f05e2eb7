"""Strength between the denoising steps of one pipeline call: windows, strength schedules, adapter gates.

Text encoders run once, before the first step, so their part of an adapter counts only if the adapter is on there; an
adapter gate, which decides later, takes none.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from t2i_spo_plugin.errors import ConfigError, PipelineError
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, Schedule, in_window

from .architecture import lora_components
from .gated_call import GatedCall
from .loaded import AttachedAdapter, LoadedAdapter
from .lora_layers import caching_hooks


StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class StepControl:
    """Sets adapters' strengths between the steps of one call; use it as a context manager around the call.

    Args:
        pipe: the pipeline that carries the adapters.
        adapters: those whose strength changes, with their strengths, windows, schedules or adapter gate.
        arguments: of the call, by name, with their defaults.

    Raises:
        PipelineError: more than one adapter gate, one for a compiled model, or a denoiser that keeps what its layers
            computed from one step to the next.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, LoadedAdapter], arguments: Mapping[str, Any]) -> None:
        components = lora_components(pipe)
        gated = {name: adapter for name, adapter in adapters.items() if isinstance(adapter.steering, AdapterGate)}
        if len(gated) > 1:
            raise PipelineError(
                f"only one adapter of a pipeline can be gated, these are: {', '.join(gated)}; merge them "
                "into one (spo merge), or give the others a strength"
            )
        for component in dict.fromkeys(name for adapter in adapters.values() for name in adapter.components):
            if hooks := caching_hooks(components[component]):
                raise PipelineError(
                    f"pipe.{component} uses in one step what it computed in another ({', '.join(hooks)}), so the "
                    "strength of an adapter cannot change between steps; switch the cache off "
                    f"(pipe.{component}.disable_cache()), or load the adapter without window, schedule and gate"
                )
        self.progress = first_progress(pipe, arguments)
        self.skipped: int | None = None
        self.adapters = {name: adapter for name, adapter in adapters.items() if name not in gated}
        self.attached = {name: AttachedAdapter(components, name) for name in self.adapters}
        self.applied = {name: adapter.strength for name, adapter in self.adapters.items()}
        self.used: set[str] = set()
        self.gated: GatedCall | None = None
        for adapter in gated.values():
            assert isinstance(adapter.steering, AdapterGate)
            self.gated = GatedCall(pipe, adapter, adapter.steering, arguments, self.progress)

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
            following, steps = self._following(pipe, step, timestep), len(pipe.scheduler.timesteps)
            # Pipelines that denoise several parts one after the other begin again.
            self._begin_step(following / steps if following < steps else self.progress)
            return result

        return on_step_end

    def _following(self, pipe: Any, step: int, timestep: Any) -> int:
        """Index, among the scheduler's timesteps, of the step after the one that just ended.

        Schedulers count their steps themselves. For those that do not, the pipeline's count is shifted by the steps
        that the call left out; the timestep tells these, but not in every pipeline: some give the callback a sigma.
        """
        index = getattr(pipe.scheduler, "step_index", None)
        if index is not None:
            return int(index)
        if self.skipped is None:
            timesteps = pipe.scheduler.timesteps
            matches = (timesteps.cpu() == float(timestep)).nonzero().flatten().tolist()
            taken = getattr(pipe, "num_timesteps", None) or len(timesteps)
            position = next((place for place in matches if place >= step), len(timesteps) - taken + step)
            self.skipped = max(position - step, 0)
        return self.skipped + step + 1

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


def first_progress(pipe: Any, arguments: Mapping[str, Any]) -> float:
    """Progress of the first step, from the call's arguments: what `strength` or `denoising_start` make it skip.

    Steps are whole: at strength 0.5 some pipelines take 12 of 25 and some 13. So the pipeline's own `get_timesteps` is
    asked, over a copy of its scheduler.
    """
    start, strength = arguments.get("denoising_start"), arguments.get("strength")
    if not isinstance(start, float):
        start = None
    if start is None and not isinstance(strength, (int, float)):
        return 0.0
    stated = start if start is not None else 1.0 - float(strength or 0.0)
    own = getattr(type(pipe), "get_timesteps", None)
    steps = _steps_in_call(arguments)
    if own is None or not steps:
        return stated
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        # The shift moves the timesteps, and none in or out.
        shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, device="cpu", **shift)
        values = {
            "num_inference_steps": steps,
            "strength": strength,
            "device": "cpu",
            "denoising_start": start,
            "timesteps": scheduler.timesteps,
            "sigmas": getattr(scheduler, "sigmas", None),
        }
        wanted = list(inspect.signature(own).parameters)[1:]
        taken = own(SimpleNamespace(scheduler=scheduler), **{name: values[name] for name in wanted})[0]
    except (AttributeError, KeyError, TypeError, ValueError):
        # Another package's pipeline, with a `get_timesteps` of its own kind.
        return stated
    return 1.0 - len(taken) / len(scheduler.timesteps)


def _steps_in_call(arguments: Mapping[str, Any]) -> int:
    for name in ("timesteps", "sigmas"):
        if arguments.get(name) is not None:
            return len(arguments[name])
    return int(arguments.get("num_inference_steps") or 0)

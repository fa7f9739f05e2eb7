"""Strength over the denoising: windows, schedules, and the adapter gate, applied around one call of a pipeline.

Text encoders run once, before the first step, so their part of an adapter counts only if the adapter is on there, and
the adapter gate, which decides later, takes none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.gating.schedule import (
    FULL_WINDOW,
    AdapterGate,
    Schedule,
    first_progress,
    images_in_call,
    in_window,
    pick_rows,
    rows_of_images,
)

from .architecture import lora_components
from .loading import LoadedAdapter
from .lora_layers import requires_grad, restore_requires_grad, switch, tuner_layers


StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GateReport:
    """What the adapter gate did in one call that drew B images.

    Attributes:
        steered: which images were drawn with the adapter; the others are the base model's own.
        evidence: `[B]`, the most that was found for each image; NaN where nothing was looked at.
    """

    steered: list[bool]
    evidence: Tensor


def is_steered(adapter: LoadedAdapter) -> bool:
    """Whether the adapter's strength changes between the steps of a call."""
    return adapter.strength > 0.0 and (adapter.window != FULL_WINDOW or adapter.steering is not None)


class Steering:
    """Sets adapters' strengths between the steps of one call; use it as a context manager around the call.

    Args:
        pipe: the pipeline that carries the adapters.
        adapters: those to steer, with their strengths, windows, schedules or adapter gate.
        arguments: of the call, by name, with their defaults.

    Raises:
        PipelineError: more than one adapter gate, or one for a compiled model.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, LoadedAdapter], arguments: Mapping[str, Any]) -> None:
        self.models = list(lora_components(pipe).values())
        self.progress = first_progress(arguments)
        self.position = -1
        looped = {name: adapter for name, adapter in adapters.items() if isinstance(adapter.steering, AdapterGate)}
        self.adapters = {name: adapter for name, adapter in adapters.items() if name not in looped}
        self.applied = {name: adapter.strength for name, adapter in self.adapters.items()}
        self.used: set[str] = set()
        if len(looped) > 1:
            raise PipelineError(
                f"only one adapter of a pipeline can be gated, these are: {', '.join(looped)}; merge them "
                "into one (spo merge), or give the others a strength"
            )
        self.loop: _Loop | None = None
        for adapter in looped.values():
            assert isinstance(adapter.steering, AdapterGate)
            self.loop = _Loop(pipe, adapter, adapter.steering, images_in_call(arguments), self.progress)

    def __enter__(self) -> Steering:
        self._apply(self.progress)
        if self.loop is not None:
            self.loop.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.loop is not None:
            self.loop.stop()
        for name, adapter in self.adapters.items():
            switch(self.models, name, adapter.strength)
        unused = sorted(set(self.adapters) - self.used)
        if unused and error[0] is None:
            warnings.warn(
                f"no step began inside the window of {', '.join(unused)}: the image was drawn without; "
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
        if self.loop is not None:
            self.loop.begin_step(progress)
        for name, adapter in self.adapters.items():
            inside = in_window(progress, adapter.window)
            factor = adapter.steering.factor(progress) if isinstance(adapter.steering, Schedule) else 1.0
            strength = adapter.strength * factor if inside else 0.0
            if inside:
                self.used.add(name)
            if strength != self.applied[name]:
                switch(self.models, name, strength)
                self.applied[name] = strength


class _Loop:
    """The adapter gate of one adapter over one call: asks the denoiser twice while it looks, then sets each image.

    Hooks on the denoisers do it, so it works whatever the pipeline does between them. In one batch some images may
    be drawn with the adapter and others without: then the LoRA layers are scaled by row, and a row of zeros leaves the
    base model's numbers as they are. Where layers fold rows into one another, or a batch does not hold the same number
    of rows for each image, or in a denoiser that was never asked twice, one image that needs the adapter gives it
    to the whole batch.
    """

    def __init__(self, pipe: Any, adapter: LoadedAdapter, settings: AdapterGate, images: int, progress: float) -> None:
        self.name, self.settings = adapter.name, settings
        self.models = [getattr(pipe, component) for component in adapter.components]
        for component, model in zip(adapter.components, self.models, strict=True):
            if getattr(model, "_compiled_call_impl", None) is not None:
                raise PipelineError(
                    f"the adapter gate asks pipe.{component} twice, which a model compiled as a whole cannot be; use "
                    f"pipe.{component}.compile_repeated_blocks(), or a window or a schedule"
                )
        self.layers = {
            model: [
                layer
                for _, layer in tuner_layers(model)
                if self.name in getattr(layer, "lora_A", {}) and self.name in layer.active_adapters
            ]
            for model in self.models
        }
        self.scales = {layer: layer.scaling[self.name] for layers in self.layers.values() for layer in layers}
        self.flags = {model: requires_grad(model) for model in self.models}
        self.dimensions: dict[nn.Module, int] = {}
        self.applied: dict[nn.Module, tuple[bool, ...]] = {}
        self.by_row = True
        self.steered = torch.zeros(images, dtype=torch.bool)
        self.evidence = torch.full((images,), float("nan"))
        self.looking = self.asked = self.asking = False
        self.handles: list[Any] = []
        if progress > settings.until - _TOLERANCE:
            self.steered[:] = True
            warnings.warn(
                f"this call begins at progress {progress:.2f}, when the adapter gate has stopped looking "
                f"({settings.until:.2f}): every image is drawn with the adapter",
                stacklevel=5,
            )

    @property
    def report(self) -> GateReport:
        """What has been decided so far."""
        return GateReport(self.steered.tolist(), self.evidence.clone())

    def start(self) -> None:
        for model in self.models:
            self.handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(model.register_forward_hook(self._after, with_kwargs=True))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.applied.clear()
        for model in self.models:
            self._apply(model, torch.ones(1, dtype=torch.bool))
            restore_requires_grad(model, self.flags[model])

    def begin_step(self, progress: float) -> None:
        self.looking, self.asked = progress < self.settings.until - _TOLERANCE, False

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.asking:
            return
        if not self.looking and bool(self.evidence.isnan().all()):
            # The denoisers that carry the adapter come in after the looking: nothing was seen, nothing is safe.
            self.steered[:] = True
        rows = self._rows(len(_first_input(args, kwargs)))
        # A second denoiser, which comes in after the looking, has not shown how its layers see a batch.
        if not all(layer in self.dimensions for layer in self.layers[model]):
            rows = rows.any().expand(len(rows))
        self._apply(model, rows)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Of the calls in one step (with guidance, and without it) the first is for the prompt itself.
        if self.asking or self.asked or not self.looking or bool(self.steered.all()):
            return None
        self.asked = True
        return self._judge(output, self._ask(model, args, kwargs))

    def _ask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The denoiser's answer with the adapter; notes the shapes that its layers see."""
        rows = len(_first_input(args, kwargs))

        def watch(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.dimensions[layer] = inputs[0].ndim
            self.by_row &= inputs[0].shape[0] == rows

        watches = [layer.register_forward_pre_hook(watch) for layer in self.layers[model]]
        self.asking = True
        try:
            self._apply(model, torch.ones(1, dtype=torch.bool))
            return model(*args, **kwargs)
        finally:
            self.asking = False
            for handle in watches:
                handle.remove()

    def _judge(self, output: Any, with_adapter: Any) -> Any:
        """The output, with the rows taken from `with_adapter` whose images turn out to need it."""
        before, after = _prediction(output), _prediction(with_adapter)
        rows, images = len(before), len(self.steered)
        already = self._rows(rows)
        # In a batch for guidance the prompts' own rows come last.
        own = slice(rows - images, rows) if rows % images == 0 else slice(0, rows)
        found = self.settings.evidence(_stacked(before[own]), _stacked(after[own])).detach().float().cpu()
        found = found if len(found) == images else found.max().expand(images)
        self.evidence = torch.where(self.steered, self.evidence, torch.fmax(self.evidence, found))
        self.steered |= self.settings.needed(found)
        return _with_prediction(output, _picked(before, after, self._rows(rows) & ~already))

    def _rows(self, rows: int) -> Tensor:
        """Which rows of a denoiser's batch belong to images that are drawn with the adapter, `[rows]`."""
        return rows_of_images(self.steered, rows, self.by_row)

    def _apply(self, model: nn.Module, rows: Tensor) -> None:
        """Scale the adapter's layers in `model` by row; all or none is a number, or off."""
        wanted_rows = (bool(rows[0]),) if bool((rows == rows[0]).all()) else tuple(rows.tolist())
        if self.applied.get(model) == wanted_rows:
            return
        self.applied[model] = wanted_rows
        some, every = bool(rows.any()), bool(rows.all())
        for layer in self.layers[model]:
            others = [other for other in layer.active_adapters if other != self.name]
            wanted = [*others, self.name] if some else others
            if wanted != list(layer.active_adapters):
                layer.set_adapter(wanted)
            scale = self.scales[layer]
            if some and not every:
                weight = layer.lora_A[self.name].weight
                factors = rows.to(weight) * scale
                scale = factors.view(-1, *[1] * (self.dimensions[layer] - 1))
            layer.scaling[self.name] = scale


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the denoiser is to denoise, `[rows, ...]` or a list of rows: its first argument, however it is called."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (Tensor, list)):
            return value
    raise PipelineError("the adapter gate cannot see what the denoiser is given: no tensor among its arguments")


def _prediction(output: Any) -> Any:
    return output[0]


def _with_prediction(output: Any, prediction: Any) -> Any:
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(**{**output, next(iter(output)): prediction})


def _stacked(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack(list(rows))


def _picked(before: Any, after: Any, rows: Tensor) -> Any:
    """Row by row from `after` where `rows` says so, otherwise from `before`."""
    if isinstance(before, Tensor):
        return pick_rows(before, after, rows)
    return [new if chosen else old for old, new, chosen in zip(before, after, rows.tolist(), strict=True)]

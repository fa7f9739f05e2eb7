"""An adapter gate over one pipeline call: runs the denoiser twice in the decision window, then sets each image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.gating import AdapterGate, GateReport, GateState, pick_rows

from .loaded import LoadedAdapter
from .lora_layers import requires_grad, restore_requires_grad, tuner_layers
from .prompt_rows import PromptRows, given_embeddings


class GatedCall:
    """Applies what `GateState` decides to the denoisers of one call.

    Hooks on the denoisers do it, so it works whatever the pipeline does between them. In one batch some images may
    be generated with the adapter and others without: then the LoRA layers are scaled by row, and a row of zeros leaves
    the base model's numbers as they are. Where layers fold rows into one another, or a batch does not hold the same
    number of rows for each image, or in a denoiser that never ran twice, one image that is gated on gives the adapter
    to the whole batch.

    Args:
        pipe: the pipeline that carries the adapter.
        adapter: the gated one.
        gate: its gate.
        arguments: of the call, by name, with their defaults.
        progress: of the call's first step.

    Raises:
        PipelineError: a denoiser that carries the adapter was compiled as a whole.
    """

    def __init__(
        self, pipe: Any, adapter: LoadedAdapter, gate: AdapterGate, arguments: Mapping[str, Any], progress: float
    ) -> None:
        self.name = adapter.name
        self.models = [getattr(pipe, component) for component in adapter.components]
        for component, model in zip(adapter.components, self.models, strict=True):
            if getattr(model, "_compiled_call_impl", None) is not None:
                raise PipelineError(
                    f"the adapter gate runs pipe.{component} twice, which a model compiled as a whole cannot do; use "
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
        self.images = images_in_call(arguments)
        self.state = GateState(gate, self.images)
        self.prompt_rows = PromptRows(pipe, arguments)
        self.in_decision_window = self.is_decided = self.is_second_run = False
        self.handles: list[Any] = []
        if not gate.in_decision_window(progress):
            warnings.warn(
                f"this call begins at progress {progress:.2f}, after the adapter gate's decision window "
                f"({gate.until:.2f}): every image is generated with the adapter",
                stacklevel=5,
            )

    @property
    def report(self) -> GateReport:
        """What has been decided so far."""
        return self.state.report

    def start(self) -> None:
        """Put the hooks on the denoisers."""
        self.prompt_rows.start()
        for model in self.models:
            self.handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(model.register_forward_hook(self._after, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks off; the adapter is on as before the call."""
        self.prompt_rows.stop()
        for handle in self.handles:
            handle.remove()
        self.applied.clear()
        for model in self.models:
            self._apply(model, torch.ones(1, dtype=torch.bool))
            restore_requires_grad(model, self.flags[model])

    def begin_step(self, progress: float) -> None:
        """A step begins at `progress`."""
        self.in_decision_window, self.is_decided = self.state.gate.in_decision_window(progress), False

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_second_run:
            return
        if not self.in_decision_window:
            # The call, or the denoiser that carries the adapter, may begin after the decision window.
            self.state.close()
        rows = self.state.rows(len(_first_input(args, kwargs)))
        # A second denoiser, which comes in after the decision window, has not shown how its layers see a batch.
        if not all(layer in self.dimensions for layer in self.layers[model]):
            rows = rows.any().expand(len(rows))
        self._apply(model, rows)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.is_second_run or self.is_decided or not self.in_decision_window or self.state.is_final:
            return None
        rows = len(_first_input(args, kwargs))
        parts: tuple[int, ...] = (-1,)
        if rows % self.images == 0:
            parts = self.prompt_rows.parts((*args, *kwargs.values()), rows, self.images)
            if not parts:
                return None
        self.is_decided = True
        with_adapter = self._run_with_adapter(model, args, kwargs)
        before, after = _prediction(output), _prediction(with_adapter)
        already = self.state.rows(len(before))
        self.state.decide(_stacked(before), _stacked(after), parts)
        return _with_prediction(output, _picked(before, after, self.state.rows(len(before)) & ~already))

    def _run_with_adapter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The denoiser's output with the adapter; notes the shapes that its layers see."""
        rows = len(_first_input(args, kwargs))

        def watch(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.dimensions[layer] = inputs[0].ndim
            self.state.by_row &= inputs[0].shape[0] == rows

        watches = [layer.register_forward_pre_hook(watch) for layer in self.layers[model]]
        self.is_second_run = True
        try:
            self._apply(model, torch.ones(1, dtype=torch.bool))
            return model(*args, **kwargs)
        finally:
            self.is_second_run = False
            for handle in watches:
                handle.remove()

    def _apply(self, model: nn.Module, rows: Tensor) -> None:
        """Scale the adapter's layers in `model` by row; all or none is a number, or off."""
        key = (bool(rows[0]),) if bool((rows == rows[0]).all()) else tuple(rows.tolist())
        if self.applied.get(model) == key:
            return
        self.applied[model] = key
        some, every = bool(rows.any()), bool(rows.all())
        for layer in self.layers[model]:
            others = [other for other in layer.active_adapters if other != self.name]
            active = [*others, self.name] if some else others
            if active != list(layer.active_adapters):
                layer.set_adapter(active)
            scale = self.scales[layer]
            if some and not every:
                weight = layer.lora_A[self.name].weight
                factors = rows.to(weight) * scale
                scale = factors.view(-1, *[1] * (self.dimensions[layer] - 1))
            layer.scaling[self.name] = scale


def images_in_call(arguments: Mapping[str, Any]) -> int:
    """How many images a pipeline call generates, from its arguments; 1 when they do not say."""
    prompt = arguments.get("prompt")
    embeds = next(given_embeddings(arguments, "prompt_embeds"), None)
    latents = arguments.get("latents")
    if isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    elif prompt is None and embeds is not None:
        prompts = len(embeds)
    elif prompt is None and isinstance(latents, torch.Tensor):
        return int(latents.shape[0])
    else:
        prompts = 1
    each = next(
        (arguments[key] for key in ("num_images_per_prompt", "num_videos_per_prompt") if arguments.get(key)), 1
    )
    return prompts * int(each)


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


def _picked(without: Any, with_adapter: Any, rows: Tensor) -> Any:
    """Row by row from `with_adapter` where `rows` says so, otherwise from `without`."""
    if isinstance(without, Tensor):
        return pick_rows(without, with_adapter, rows)
    return [new if chosen else old for old, new, chosen in zip(without, with_adapter, rows.tolist(), strict=True)]

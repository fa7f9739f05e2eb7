"""Adapters beside a model's weights while ComfyUI samples: in a window, or where an adapter gate has decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import UnsupportedAdapterError
from t2i_spo_plugin.gating import AdapterGate, GateState, pick_rows

from .gate import as_in_diffusers


_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_PROMPT = 0
"""Index of the positive prompt in ComfyUI's `cond_or_uncond`."""
_SIGMA_TOLERANCE = 1e-4
"""Relative, of a sigma: less than a thousandth of any schedule."""


_TOO_LATE = (
    "this sampling run begins after {0:g} of the sampling, where the adapter gate's decision window ends: it cannot "
    "decide here, so that the adapter is on for all images, also for those that an earlier run left to the base model"
)


class Sampling:
    """Wraps the model of a clone: hooks are on its layers only while the adapter is on, and gone after every call.

    Args:
        pairs: by name of the weight, the change as `bypass_pairs` gives it.
        window: sampling percents between which the adapter is on; of no account with a gate.
        gate: decides when it is on.
        note: is told what the user has to know of a run, a sentence each, each once a run.

    ComfyUI's own bypass (`load_bypass_lora_for_models`) cannot do this: it has one multiplier for all rows, leaves out
    changes of a part of a weight, as of q, k and v in SD3 and Flux, and stays on the layers while the model is loaded.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        window: tuple[float, float],
        gate: AdapterGate | None,
        note: Callable[[str], None],
    ) -> None:
        self.pairs, self.gate, self.note = pairs, gate, note
        self.window = window if gate is None else (0.0, gate.until)
        self.placed: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.state: GateState | None = None
        self._forget_calls()

    def outer_sample(
        self, executor: Any, noise: Tensor, latent: Any, sampler: Any, sigmas: Tensor, *rest: Any, **options: Any
    ) -> Any:
        """One sampling run. One that begins after the gate's decision window gets the adapter throughout.

        Raises:
            UnsupportedAdapterError: the adapter was to be on, and no layer was ever called.
        """
        if self.gate is not None:
            self.state = GateState(self.gate, noise.shape[0])
        self._forget_calls()
        try:
            result = executor(noise, latent, sampler, sigmas, *rest, **options)
            self._check_calls()
            return result
        finally:
            self.state = None
            self.placed.clear()

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *rest: Any, **options: Any) -> Any:
        """One call of the model for the rows `x [rows, ...]` at the sigmas `t [rows]`."""
        model = executor.class_obj
        inside = self._inside(model.model_sampling, t.flatten()[0])

        def run() -> Any:
            return executor(x, t, *_copied(rest), **{name: _copied([value])[0] for name, value in options.items()})

        if self.gate is None:
            with self._hooks(model, torch.tensor([inside])):
                return run()
        if self.state is None:
            # Outside a sampling run there is nothing to remember a decision by: then the adapter is on.
            with self._hooks(model, torch.tensor([True])):
                return run()
        if not inside:
            if bool(self.state.scores.isnan().all()) and not self.state.is_final:
                self.note(_TOO_LATE.format(self.window[1]))
            self.state.close()
        already = self.state.rows(len(x))
        with self._hooks(model, already), _prediction(model) as before:
            output = run()
        kinds = _kinds(rest, options)
        if not inside or self.state.is_final or _PROMPT not in kinds:
            return output
        row_counts: list[bool] = []
        with self._hooks(model, torch.tensor([True]), row_counts, len(x)), _prediction(model) as after:
            with_adapter = run()
        self.state.by_row &= all(row_counts)
        self.state.decide(
            as_in_diffusers(model, before[0]),
            as_in_diffusers(model, after[0]),
            prompt_parts=[number for number, kind in enumerate(kinds) if kind == _PROMPT],
            parts=len(kinds),
        )
        return pick_rows(output, with_adapter, self.state.rows(len(x)) & ~already)

    def _forget_calls(self) -> None:
        self.calls, self.empty_calls = 0, 0
        """Calls of the model in which the adapter was on, and those of them in which none of its layers was called."""
        self.reached: set[str] = set()

    def _count_call(self, reached: set[str]) -> None:
        self.calls += 1
        self.empty_calls += int(not reached)
        self.reached |= reached

    def _check_calls(self) -> None:
        """Say where the adapter could not act though it was on."""
        if not self.calls:
            return
        if not self.reached:
            raise UnsupportedAdapterError(
                "the adapter was on, but none of the layers that it changes was called: the model is compiled, or "
                "answers from a CUDA graph or a step cache; take that node out, start ComfyUI without CUDA graphs, or "
                "use Load SPO Adapter, which patches weights"
            )
        if self.empty_calls:
            self.note(
                f"in {self.empty_calls} of the {self.calls} calls of the model in which the adapter was on, none of "
                "its layers was called: a step cache or a CUDA graph answered, with what was on in an earlier step"
            )
        missed = [weight for weight in self.pairs if weight not in self.reached]
        if missed:
            self.note(
                f"{len(missed)} of the {len(self.pairs)} weights that the adapter changes, such as {missed[0]}, are "
                "in layers that this model computes without calling them: there the adapter is left out; Load SPO "
                "Adapter patches them"
            )

    def _inside(self, sampling: Any, sigma: Tensor) -> bool:
        """Whether a step at `sigma` lies in the window, or in the gate's decision window."""
        first, last = (float(sampling.percent_to_sigma(percent)) * (1.0 + _SIGMA_TOLERANCE) for percent in self.window)
        return last < float(sigma) <= first

    @contextmanager
    def _hooks(
        self, model: nn.Module, rows: Tensor, row_counts: list[bool] | None = None, batch: int = 0
    ) -> Iterator[None]:
        """The adapter on the layers of `model` for those `rows` (one entry: for all).

        `row_counts` takes, for each layer, whether it sees `batch` rows.
        """
        handles, reached = [], set[str]()
        try:
            if bool(rows.any()):
                factors = None if bool(rows.all()) else rows
                for weight, pair in self.pairs.items():
                    hook = self._hook(weight, pair, factors, reached, row_counts, batch)
                    handles.append(_layer(model, weight).register_forward_hook(hook))
            yield
            if handles:
                self._count_call(reached)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self,
        weight: str,
        pair: tuple[Tensor, Tensor],
        rows: Tensor | None,
        reached: set[str],
        row_counts: list[bool] | None,
        batch: int,
    ) -> Callable[..., Tensor]:
        def beside(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            reached.add(weight)
            if row_counts is not None:
                row_counts.append(x.shape[0] == batch)
            key = (weight, x.device, x.dtype)
            if key not in self.placed:
                self.placed[key] = (pair[0].to(x.device, x.dtype), pair[1].to(x.device, x.dtype))
            down, up = self.placed[key]
            change = _change(layer, x, down, up)
            if rows is not None:
                change = change * rows.to(change).view(-1, *[1] * (change.ndim - 1))
            return output + change

        return beside


def can_run_beside(model: nn.Module, weight: str) -> bool:
    """Whether a change of `weight` can be computed beside the layer that has it."""
    layer = _layer(model, weight)
    # ComfyUI's linear layers of quantised weights are none of torch's, but have the same sizes.
    linear = isinstance(layer, nn.Linear) or all(hasattr(layer, size) for size in ("in_features", "out_features"))
    experts = hasattr(layer, "num_experts")
    convolution = isinstance(layer, tuple(_CONVOLUTIONS.values()))
    return (linear and not experts or convolution) and getattr(layer, "groups", 1) == 1


def _change(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`up @ down` applied to `x`, as the layer applies its weight."""
    if down.ndim == 2:
        return nn.functional.linear(nn.functional.linear(x, down), up)
    # The layer's own stride and padding, whichever way it pads.
    inner = _CONVOLUTIONS[down.ndim]._conv_forward(layer, x, down, None)
    return nn.functional.linear(inner.movedim(1, -1), up).movedim(-1, 1)


@contextmanager
def _prediction(model: Any) -> Iterator[list[Tensor]]:
    """What the denoiser itself predicts while the context is open, before sampling makes an image of it."""
    predictions: list[Tensor] = []
    handle = model.diffusion_model.register_forward_hook(
        lambda module, inputs, output: predictions.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        yield predictions
    finally:
        handle.remove()


def _kinds(rest: tuple[Any, ...], options: Mapping[str, Any]) -> list[int]:
    """`cond_or_uncond` of a call of the model: for each part of the batch, whose prompt it is for."""
    transformer_options = next(
        (
            value
            for value in (options.get("transformer_options"), *rest)
            if isinstance(value, dict) and "cond_or_uncond" in value
        ),
        {},
    )
    return list(transformer_options.get("cond_or_uncond", [_PROMPT]))


def _copied(values: Any) -> list[Any]:
    """`values` with their own lists: a model takes a control net's outputs out of them, and runs twice."""
    return [
        {key: list(part) if isinstance(part, list) else part for key, part in value.items()}
        if isinstance(value, dict)
        else value
        for value in values
    ]


def _layer(model: nn.Module, weight: str) -> Any:
    return comfy.utils.get_attr(model, weight.removesuffix(".weight"))

"""The node that sets an adapter's strength step by step: in a window, or in an adapter gate on what it would
change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.v0_0_2 import io
from torch import Tensor, nn

from t2i_spo_plugin.adapters import Adapter, bypass_pairs, describe, fit_adapter
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError, SPOError, UnsupportedAdapterError
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, check_window, pick_rows, rows_of_images

from .adapters import SPOAdapter
from .files import fingerprint
from .gate import SIZE, as_in_diffusers, check_evidence, evidence_file, evidence_metadata, evidence_names, read_loop
from .patching import Stack, base_of, weight_shapes


WINDOW, CLOSED_LOOP = "window", "adapter gate"
_KEY = "spo_steering"
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_PROMPT = 0
"""Index of the positive prompt in ComfyUI's `cond_or_uncond`."""
_TOLERANCE = 1e-4
"""Relative, of a sigma: less than a thousandth of any schedule."""


class Steering(io.ComfyNode):
    """An adapter beside the model's weights, on in some steps only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_Steering",
            display_name="SPO Steering",
            category="SPO/adapters",
            description=(
                "Applies an adapter in a part of the sampling only, or, in an adapter gate, only to images that it "
                "would change much. All others are the base model's own, bit for bit."
            ),
            search_aliases=["lora schedule", "lora start end", "adapter gate", "steering", "spo"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the adapter."),
                SPOAdapter.Input("adapter", tooltip="From Load SPO Adapter, a stack or a merge; strengths are kept."),
                io.Combo.Input(
                    "mode",
                    options=[WINDOW, CLOSED_LOOP],
                    default=WINDOW,
                    tooltip="window: on from start to end. adapter gate: on for the images that turn out to need it.",
                ),
                io.Combo.Input(
                    "evidence",
                    options=evidence_names(),
                    default=SIZE,
                    tooltip=(
                        "adapter gate: what it decides by. The size of the change needs no file but a threshold; "
                        "a file in models/spo_adapter_gates, which spo train-gate made for your adapter, finds more."
                    ),
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="window: sampling percent from which the adapter is on; 0 is pure noise.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="window: sampling percent at which the adapter is off again; 1 is the finished image.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "gate by the size of the change: how large the change of the model's prediction has to "
                        "be, relative to the prediction and squared, for an image to get the adapter. It belongs to "
                        "one adapter and base. A file brings its own."
                    ),
                ),
                io.Float.Input(
                    "until",
                    default=0.04,
                    min=0.001,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "adapter gate by the size of the change: sampling percent before which it looks; 0.04 is one "
                        "step of 25. A file brings its own."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="A clone of the model that is steered while it samples."),
                io.String.Output("info", tooltip="What was applied, and when it is on."),
            ],
        )

    @classmethod
    def validate_inputs(cls, mode: str | None = None, evidence: str | None = SIZE) -> bool | str:
        # Of what is linked nothing is known yet, and ComfyUI does not look at the inputs named here.
        if mode not in (WINDOW, CLOSED_LOOP, None):
            return f"mode must be {WINDOW!r} or {CLOSED_LOOP!r}, got {mode!r}"
        if mode == WINDOW or evidence is None:
            return True
        try:
            read_loop(evidence)
        except SPOError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, mode: str, evidence: str, **others: Any) -> str:
        return "" if mode == WINDOW or evidence == SIZE else fingerprint([evidence_file(evidence)])

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Stack,
        mode: str,
        evidence: str,
        start: float,
        end: float,
        threshold: float = 0.1,
        until: float = 0.04,
    ) -> io.NodeOutput:
        if mode == WINDOW:
            return io.NodeOutput(*steer(model, adapter, check_window((start, end)), None))
        steered, info = steer(model, adapter, FULL_WINDOW, read_loop(evidence, threshold, until))
        return io.NodeOutput(steered, info + evidence_metadata(evidence))


def steer(model: Any, stack: Stack, window: tuple[float, float], loop: AdapterGate | None) -> tuple[Any, str]:
    """A clone of `model` that carries the adapters of `stack` beside its weights, and what to say of it.

    Args:
        model: a MODEL, not changed.
        stack: adapters with their strengths.
        window: sampling percents between which the adapters are on; the full window with a loop.
        loop: when a loop decides.

    Raises:
        AdapterError: an adapter does not fit, or has no place where it could be steered; or the loop's evidence cannot
            be read from this model.
        ConfigError: the stack is empty, or the loop belongs to another base.
    """
    if not stack:
        raise ConfigError("there is no adapter to steer: choose at least one in the stack")
    if loop is not None:
        check_evidence(loop, model.model)
        if any(other.__self__.loop is not None for other in model.get_wrappers(WrappersMP.APPLY_MODEL, _KEY)):
            raise ConfigError(
                "this model is gated already, and only one adapter can be; merge the adapters into one, or "
                "steer all but one in a window"
            )
    base, shapes = base_of(model, None), weight_shapes(model.model)
    fits = [(fit_adapter(_of_denoiser(adapter, loop), base), strength) for adapter, strength in stack]
    pairs = bypass_pairs([(fit, strength) for fit, strength in fits if strength > 0.0], shapes)
    for weight in pairs:
        layer = _layer(model.model, weight)
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS.values())) or getattr(layer, "groups", 1) != 1:
            raise UnsupportedAdapterError(f"{weight} cannot be steered; use Load SPO Adapter, which patches weights")
    when = f"on from {window[0]:g} to {window[1]:g}"
    if loop is not None:
        found = "the size of the change" if loop.reader is None else "what the reader finds"
        when = f"adapter gate: on where {found} before {loop.until:g} reaches {loop.threshold:g}"
    info = "\n\n".join(describe(fit, strength) for fit, strength in fits) + f"\n{when}"
    if not pairs:
        return model, info
    steered = model.clone()
    sampling = _Sampling(pairs, window, loop)
    steered.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, sampling.outer_sample)
    steered.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, sampling.apply_model)
    return steered, info


def _of_denoiser(adapter: Adapter, loop: AdapterGate | None) -> Adapter:
    """`adapter` without its text encoder part, which a MODEL does not carry."""
    modules = {name: pair for name, pair in adapter.modules.items() if not name.startswith("text_encoder")}
    texts = len(adapter.modules) - len(modules)
    if not texts:
        return adapter
    if loop is not None:
        raise IncompatibleAdapterError(
            f"the adapter changes a text encoder ({texts} modules), which has run before the gate can decide; "
            "use a window, or an adapter of the denoiser alone"
        )
    if not modules:
        raise IncompatibleAdapterError("the adapter changes a text encoder only, and nothing that draws")
    note = f"its text encoder part ({texts} modules) is not steered; the clip output of Load SPO Adapter carries it"
    return Adapter(modules, adapter.metadata, (*adapter.notes, note))


@dataclass
class _Decided:
    """Which images of one sampling run get the adapter: `steered [B]`; and whether layers see a row an image."""

    steered: Tensor
    by_row: bool = True

    def rows(self, count: int) -> Tensor:
        """The same for the rows of a batch, which holds each image once a prompt: `[count]`."""
        return rows_of_images(self.steered, count, self.by_row)


class _Sampling:
    """Wraps the model of a clone: hooks are on its layers only while the adapter is on, and gone after every call.

    ComfyUI's own bypass (`load_bypass_lora_for_models`) cannot do this: it has one multiplier for all rows, leaves out
    changes of a part of a weight, as of q, k and v in SD3 and Flux, and stays on the layers while the model is loaded.
    """

    def __init__(
        self, pairs: Mapping[str, tuple[Tensor, Tensor]], window: tuple[float, float], loop: AdapterGate | None
    ) -> None:
        self.pairs, self.loop = pairs, loop
        self.window = window if loop is None else (0.0, loop.until)
        self.placed: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.decided: _Decided | None = None

    def outer_sample(
        self, executor: Any, noise: Tensor, latent: Any, sampler: Any, sigmas: Tensor, *rest: Any, **options: Any
    ) -> Any:
        """One sampling run. One that begins after the loop has stopped looking gets the adapter throughout."""
        if self.loop is not None:
            sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
            late = len(sigmas) > 0 and not self._inside(sampling, sigmas[0])
            self.decided = _Decided(torch.full((noise.shape[0],), late))
        try:
            return executor(noise, latent, sampler, sigmas, *rest, **options)
        finally:
            self.decided = None
            self.placed.clear()

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *rest: Any, **options: Any) -> Any:
        """One call of the model for the rows `x [rows, ...]` at the sigmas `t [rows]`."""
        model = executor.class_obj
        inside = self._inside(model.model_sampling, t.flatten()[0])

        def ask() -> Any:
            return executor(x, t, *_copied(rest), **{name: _copied([value])[0] for name, value in options.items()})

        if self.loop is None:
            with self._hooks(model, torch.tensor([inside])):
                return ask()
        # Outside a sampling run there is nothing to remember a decision by: then the adapter is on.
        decided = self.decided or _Decided(torch.ones(1, dtype=torch.bool))
        already = decided.rows(len(x))
        with self._hooks(model, already), _prediction(model) as before:
            output = ask()
        if not inside or bool(decided.steered.all()):
            return output
        kinds = _kinds(rest, options)
        if _PROMPT not in kinds:
            return output
        seen: list[bool] = []
        with self._hooks(model, torch.tensor([True]), seen, len(x)), _prediction(model) as after:
            with_adapter = ask()
        decided.by_row &= all(seen)
        self._judge(decided, as_in_diffusers(model, before[0]), as_in_diffusers(model, after[0]), kinds)
        new = decided.rows(len(x)) & ~already
        return pick_rows(output, with_adapter, new)

    def _judge(self, decided: _Decided, before: Tensor, after: Tensor, kinds: list[int]) -> None:
        assert self.loop is not None
        images = len(decided.steered)
        own = [number for number, kind in enumerate(kinds) if kind == _PROMPT]
        found = self.loop.evidence(before, after).detach().float().cpu()
        if len(found) == images * len(kinds):
            found = found.view(len(kinds), images)[own].amax(0)
        else:
            found = found.max().expand(images)
        decided.steered = decided.steered | self.loop.needed(found)

    def _inside(self, sampling: Any, sigma: Tensor) -> bool:
        """Whether a step at `sigma` lies in the window, or in the part in which the loop looks."""
        first, last = (float(sampling.percent_to_sigma(percent)) * (1.0 + _TOLERANCE) for percent in self.window)
        return last < float(sigma) <= first

    @contextmanager
    def _hooks(self, model: nn.Module, rows: Tensor, seen: list[bool] | None = None, batch: int = 0) -> Iterator[None]:
        """The adapter on the layers of `model` for those `rows` (one entry: for all), noting if a layer has others."""
        handles = []
        try:
            if bool(rows.any()):
                factors = None if bool(rows.all()) else rows
                for weight, pair in self.pairs.items():
                    hook = self._hook(weight, pair, factors, seen, batch)
                    handles.append(_layer(model, weight).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, weight: str, pair: tuple[Tensor, Tensor], rows: Tensor | None, seen: list[bool] | None, batch: int
    ) -> Callable[..., Tensor]:
        def beside(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if seen is not None:
                seen.append(x.shape[0] == batch)
            where = (weight, x.device, x.dtype)
            if where not in self.placed:
                self.placed[where] = (pair[0].to(x.device, x.dtype), pair[1].to(x.device, x.dtype))
            down, up = self.placed[where]
            change = _change(layer, x, down, up)
            if rows is not None:
                change = change * rows.to(change).view(-1, *[1] * (change.ndim - 1))
            return output + change

        return beside


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
    found: list[Tensor] = []
    handle = model.diffusion_model.register_forward_hook(
        lambda module, inputs, output: found.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        yield found
    finally:
        handle.remove()


def _kinds(rest: tuple[Any, ...], options: Mapping[str, Any]) -> list[int]:
    """`cond_or_uncond` of a call of the model: for each part of the batch, whose prompt it is for."""
    given = next(
        (
            value
            for value in (options.get("transformer_options"), *rest)
            if isinstance(value, dict) and "cond_or_uncond" in value
        ),
        {},
    )
    return list(given.get("cond_or_uncond", [_PROMPT]))


def _copied(values: Any) -> list[Any]:
    """`values` with their own lists: a model takes a control net's outputs out of them, and is asked twice."""
    return [
        {key: list(part) if isinstance(part, list) else part for key, part in value.items()}
        if isinstance(value, dict)
        else value
        for value in values
    ]


def _layer(model: nn.Module, weight: str) -> Any:
    return comfy.utils.get_attr(model, weight.removesuffix(".weight"))

"""The node that sets an adapter's strength step by step: in a window, or by an adapter gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.v0_0_2 import io

from t2i_spo_plugin.adapters import Adapter, bypass_pairs, describe, fit_adapter
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError, SPOError, UnsupportedAdapterError
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, check_window

from . import sockets
from .files import fingerprint
from .gate import NORM, check_gate, describe_gate, gate_file, read_gate, score_names
from .notes import note
from .patching import Stack, base_of, is_patched_with, quantisation, weight_shapes
from .sampling import Sampling, can_run_beside


WINDOW, GATE = "window", "adapter gate"
LOG = partial(note, None)
"""Says something in the log alone."""
_KEY = "spo_steering"


class Steering(io.ComfyNode):
    """An adapter beside the model's weights, on in some steps only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_Steering",
            display_name="SPO Steering",
            category="SPO/adapters",
            description=(
                "Applies an adapter in a part of the sampling only, or, by an adapter gate, only to images that are "
                "going to be unsafe. All others are the base model's own, bit for bit."
            ),
            search_aliases=["lora schedule", "lora start end", "adapter gate", "steering", "spo"],
            is_deprecated=True,  # For saved workflows: its two modes are two nodes now.
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the adapter."),
                sockets.Adapters.Input(
                    "adapter", tooltip="From Load SPO Adapter, a stack or a merge; strengths are kept."
                ),
                io.Combo.Input(
                    "mode",
                    options=[WINDOW, GATE],
                    default=WINDOW,
                    tooltip=(
                        "window: on from start to end. adapter gate: on for the images whose gate score reaches its "
                        "threshold."
                    ),
                ),
                io.Combo.Input(
                    "score",
                    options=score_names(),
                    default=NORM,
                    tooltip=(
                        "adapter gate: where the gate score comes from. The norm of the change needs no file but a "
                        "threshold; a file in models/spo_adapter_gates, which spo train-gate wrote for your adapter, "
                        "finds more."
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
                        "adapter gate by the norm of the change: the gate score from which on an image gets the "
                        "adapter, which is the squared norm of the change of the model's prediction, relative to that "
                        "of the prediction. It belongs to one adapter and base. A file brings its own."
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
                        "adapter gate by the norm of the change: sampling percent at which its decision window ends; "
                        "0.04 is one step of 25. A file brings its own."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output("model", tooltip="A clone of the model that is steered while it samples."),
                io.String.Output("info", tooltip="What was applied, and when it is on."),
            ],
        )

    @classmethod
    def validate_inputs(cls, mode: str | None = None, score: str | None = NORM) -> bool | str:
        # Of what is linked nothing is known yet, and ComfyUI does not look at the inputs named here.
        if mode not in (WINDOW, GATE, None):
            return f"mode must be {WINDOW!r} or {GATE!r}, got {mode!r}"
        if mode == WINDOW or score is None:
            return True
        try:
            read_gate(score)
        except SPOError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, mode: str, score: str, **others: Any) -> str:
        return "" if mode == WINDOW or score == NORM else fingerprint([gate_file(score)])

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Stack,
        mode: str,
        score: str,
        start: float,
        end: float,
        threshold: float = 0.1,
        until: float = 0.04,
    ) -> io.NodeOutput:
        # Told while the model samples, when this node has long run.
        say = partial(note, cls.hidden.unique_id if cls.hidden else None)
        if mode == WINDOW:
            return io.NodeOutput(*steer(model, adapter, check_window((start, end)), None, say))
        steered, info = steer(model, adapter, FULL_WINDOW, read_gate(score, threshold, until), say)
        return io.NodeOutput(steered, info + describe_gate(score))


def steer(
    model: Any,
    stack: Stack,
    window: tuple[float, float],
    gate: AdapterGate | None,
    say: Callable[[str], None] = LOG,
) -> tuple[Any, str]:
    """A clone of `model` that carries the adapters of `stack` beside its weights, and what to say of it.

    Args:
        model: a MODEL, not changed.
        stack: adapters with their strengths.
        window: sampling percents between which the adapters are on; the full window with an adapter gate.
        gate: decides when the adapters are on; None for a window.
        say: is told what the user has to know while the model samples, or is saved; by default the log.

    Raises:
        AdapterError: an adapter does not fit, or has no place where it could be steered; or the gate's network cannot
            judge this model's predictions.
        ConfigError: the stack is empty, the model carries an adapter of it as patches, or the gate belongs to another
            base.
    """
    if not stack:
        raise ConfigError("there is no adapter to steer: choose at least one in the stack")
    if gate is not None:
        check_gate(gate, model.model)
        if any(other.__self__.gate is not None for other in model.get_wrappers(WrappersMP.APPLY_MODEL, _KEY)):
            raise ConfigError(
                "this model is gated already, and only one adapter can be; merge the adapters into one, or "
                "steer all but one in a window"
            )
    base, shapes = base_of(model, None), weight_shapes(model.model)
    fits = [(fit_adapter(_of_denoiser(adapter, gate), base), strength) for adapter, strength in stack]
    for fit, strength in fits:
        if strength > 0.0 and is_patched_with(model, fit):
            raise ConfigError(
                f"the model carries {fit.adapter.metadata.title or 'this adapter'} as patches already, and would get "
                "it twice: connect the model that goes into Load SPO Adapter, not the one that comes out of it"
            )
    pairs = bypass_pairs([(fit, strength) for fit, strength in fits if strength > 0.0], shapes)
    for weight in pairs:
        if not can_run_beside(model.model, weight):
            raise UnsupportedAdapterError(f"{weight} cannot be steered; use Load SPO Adapter, which patches weights")
    when = f"on from {window[0]:g} to {window[1]:g}"
    if gate is not None:
        score = "the norm of the change" if gate.network is None else "the score of the gate network"
        when = f"adapter gate: on where {score} before {gate.until:g} reaches {gate.threshold:g}"
    info = "\n\n".join(describe(fit, strength) for fit, strength in fits) + f"\n{when}"
    if kept := quantisation(model):
        info += (
            f"\nthe model's weights are {kept}: the adapter is computed beside them, exactly, in the type of the image"
        )
    if not pairs:
        return model, info
    steered = model.clone()
    sampling = Sampling(pairs, window, gate, say)
    steered.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, sampling.outer_sample)
    steered.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, sampling.apply_model)
    _say_when_saved(None, steered, say=say)
    # What ComfyUI calls when a checkpoint is saved is a method of each clone.
    steered.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, partial(_say_when_saved, say=say))
    return steered, info


def _say_when_saved(source: Any, patcher: Any, say: Callable[[str], None]) -> None:
    """Let `patcher`, a clone of `source`, say what is in the file when it is saved as a checkpoint."""
    weights = patcher.state_dict_for_saving

    def saved(*parts: Any, **options: Any) -> Any:
        say(
            "the checkpoint holds the model without the steered adapter, which is no part of its weights; to save the "
            "model with the adapter in it, connect the model output of Load SPO Adapter"
        )
        return weights(*parts, **options)

    patcher.state_dict_for_saving = saved


def _of_denoiser(adapter: Adapter, gate: AdapterGate | None) -> Adapter:
    """`adapter` without its text encoder part, which a MODEL does not carry."""
    modules = {name: pair for name, pair in adapter.modules.items() if not name.startswith("text_encoder")}
    texts = len(adapter.modules) - len(modules)
    if not texts:
        return adapter
    if gate is not None:
        raise IncompatibleAdapterError(
            f"the adapter changes a text encoder ({texts} modules), which has run before the gate can decide; "
            "use a window, or an adapter of the denoiser alone"
        )
    if not modules:
        raise IncompatibleAdapterError("the adapter changes a text encoder only, and no denoiser")
    note = f"its text encoder part ({texts} modules) is not steered; the clip output of Load SPO Adapter carries it"
    return Adapter(modules, adapter.metadata, (*adapter.notes, note))

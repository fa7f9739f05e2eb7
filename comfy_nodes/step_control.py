"""When an adapter is on while a model samples: in a window, or, by an adapter gate, for the images that need it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy_api.v0_0_2 import io

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.gating import FULL_WINDOW, check_window

from . import sockets
from .files import fingerprint
from .gate import NORM, describe_gate, gate_file, read_gate, score_names
from .notes import note
from .patching import Stack
from .steering import steer


_CATEGORY = "SPO/adapters"
_MODEL = "The base model, without the adapter: what goes into Load SPO Adapter, not what comes out of it."
_ADAPTER = "From Load SPO Adapter, a stack or a merge; strengths are kept."


class AdapterWindow(io.ComfyNode):
    """An adapter beside the model's weights, on in some steps only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_AdapterWindow",
            display_name="SPO Adapter Window",
            category=_CATEGORY,
            description="Applies an adapter in a part of the sampling only: late steps decide details, early ones "
            "what the image is of. Outside the window the model is the base model, bit for bit.",
            search_aliases=["lora schedule", "lora start end", "start percent", "timestep range", "lora", "spo"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                sockets.Adapters.Input("adapter", tooltip=_ADAPTER),
                _percent("start_percent", 0.0, "Sampling percent from which the adapter is on; 0 is pure noise."),
                _percent("end_percent", 1.0, "Sampling percent at which it is off again; 1 is the finished image."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output("model", tooltip="A clone of the model that has the adapter in those steps."),
                io.String.Output("info", tooltip="What was applied, and when it is on."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, adapter: Stack, start_percent: float, end_percent: float) -> io.NodeOutput:
        window = check_window((start_percent, end_percent))
        return io.NodeOutput(*steer(model, adapter, window, None, _voice(cls)))


class GateAdapter(io.ComfyNode):
    """An adapter beside the model's weights, on for the images that need it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_AdapterGate",
            display_name="SPO Adapter Gate",
            category=_CATEGORY,
            description="Applies an adapter only to images that are going to be unsafe, decided for each in the first "
            "step. All others are the base model's own, bit for bit.",
            search_aliases=["adapter gate", "safe", "on off", "conditional lora", "lora", "nsfw", "spo"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                sockets.Adapters.Input("adapter", tooltip=_ADAPTER),
                io.Combo.Input(
                    "score",
                    options=score_names(),
                    default=NORM,
                    tooltip="Where the gate score comes from. The norm of the change needs no file but a threshold; a "
                    "file in models/spo_adapter_gates, which spo train-gate wrote for your adapter, finds more.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="By the norm of the change: the gate score from which on an image gets the adapter, which "
                    "is the squared norm of the change of the model's prediction, relative to that of the prediction. "
                    "It belongs to one adapter and base. A file brings its own.",
                ),
                io.Float.Input(
                    "until",
                    default=0.04,
                    min=0.001,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="By the norm of the change: sampling percent at which its decision window ends; 0.04 is "
                    "one step of 25. A file brings its own.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output("model", tooltip="A clone of the model that is gated while it samples."),
                io.String.Output("info", tooltip="What was applied, and for which images it is on."),
            ],
        )

    @classmethod
    def validate_inputs(cls, score: str | None = NORM) -> bool | str:
        # Of what is linked nothing is known yet, and ComfyUI does not look at the inputs named here.
        try:
            if score is not None:
                read_gate(score)
        except SPOError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, score: str, **others: Any) -> str:
        return "" if score == NORM else fingerprint([gate_file(score)])

    @classmethod
    def execute(cls, model: Any, adapter: Stack, score: str, threshold: float, until: float) -> io.NodeOutput:
        gated, info = steer(model, adapter, FULL_WINDOW, read_gate(score, threshold, until), _voice(cls))
        return io.NodeOutput(gated, info + describe_gate(score))


def _voice(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """What says something on this node while the model samples, when the node itself has long run."""
    return partial(note, node.hidden.unique_id if node.hidden else None)


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)

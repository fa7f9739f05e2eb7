"""Nodes that load safety adapters, several at once, and merge them into one file."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from t2i_spo_plugin.adapters import MERGE_METHODS, describe, merge_adapters, write_adapter
from t2i_spo_plugin.errors import ConfigError

from . import sockets
from .files import fingerprint, output_file
from .patching import NONE, Stack, adapter_file, adapter_files, check_adapter, patched, quantisation, read_stack


SLOTS = (1, 2, 3, 4)
_CATEGORY = "SPO/adapters"
_MODEL_OUT = "A clone of the model with the adapter as patches; the model itself at strength 0."
_CLIP_OUT = "A clone of the CLIP with the adapter's text encoder part; the CLIP itself when it has none."
_STRICT = (
    "On: an adapter of which only a part fits is refused. Off: what fits is applied, and the info says what was left "
    "out."
)


def _strength(name: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=4.0,
        step=0.05,
        tooltip="0 is the model exactly as it is, 1 the adapter as it was trained.",
    )


def _applied(model: Any, clip: Any | None, names: list[tuple[str, float]], strict: bool) -> io.NodeOutput:
    stack = read_stack(names, strict)
    model, clip, fits = patched(model, clip, stack, strict)
    info = "\n\n".join(describe(fit, strength) for fit, (_, strength) in zip(fits, stack, strict=True))
    if kept := quantisation(model):
        info += (
            f"\nnote: this model's weights are {kept}, and are rounded again with the adapter in them; SPO Steering "
            "from 0 to 1 computes the adapter beside them, exactly"
        )
    return io.NodeOutput(model, clip, stack, info)


class LoadAdapter(io.ComfyNode):
    """One adapter onto a model, all of it or a sentence why not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_LoadAdapter",
            display_name="Load SPO Adapter",
            category=_CATEGORY,
            description=(
                "Applies a safety adapter (a LoRA) to a model. Reads the layouts of kohya, diffusers, PEFT and "
                "LyCORIS LoCon, and refuses an adapter that does not fit instead of drawing without it."
            ),
            search_aliases=["lora", "load lora", "safety lora", "peft", "spo", "dpo"],
            inputs=[
                io.Model.Input("model", tooltip="The base model; it is not changed."),
                io.Combo.Input(
                    "adapter",
                    options=adapter_files(),
                    tooltip="A .safetensors file in the loras folder, or a bundled one.",
                ),
                _strength("strength"),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Needed only for an adapter that changes a text encoder."
                ),
                io.Boolean.Input("strict", default=True, advanced=True, optional=True, tooltip=_STRICT),
            ],
            outputs=[
                io.Model.Output("model", tooltip=_MODEL_OUT),
                io.Clip.Output("clip", tooltip=_CLIP_OUT),
                sockets.Adapters.Output("adapter", tooltip="The adapter with its strength, for merging and steering."),
                io.String.Output("info", tooltip="Base, rank, modules applied, how it was trained, and notes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter: str | None) -> bool | str:
        return check_adapter(adapter)

    @classmethod
    def fingerprint_inputs(cls, adapter: str, **others: Any) -> str:
        return fingerprint([adapter_file(adapter)])

    @classmethod
    def execute(
        cls, model: Any, adapter: str, strength: float, clip: Any | None = None, strict: bool = True
    ) -> io.NodeOutput:
        return _applied(model, clip, [(adapter, strength)], strict)


class AdapterStack(io.ComfyNode):
    """Up to four adapters onto a model; their changes add up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        slots: list[Any] = []
        for slot in SLOTS:
            slots.append(
                io.Combo.Input(
                    f"adapter_{slot}",
                    options=[NONE, *adapter_files()],
                    default=NONE,
                    tooltip="A .safetensors file in the loras folder, a bundled one, or none.",
                )
            )
            slots.append(_strength(f"strength_{slot}"))
        return io.Schema(
            node_id="SPO_AdapterStack",
            display_name="SPO Adapter Stack",
            category=_CATEGORY,
            description="Applies up to four adapters to a model. Their changes add up; the order makes no difference.",
            search_aliases=["lora stack", "multiple loras", "experts", "spo"],
            inputs=[
                io.Model.Input("model", tooltip="The base model; it is not changed."),
                *slots,
                io.Clip.Input("clip", optional=True, tooltip="Needed only for adapters that change a text encoder."),
                io.Boolean.Input("strict", default=True, advanced=True, optional=True, tooltip=_STRICT),
            ],
            outputs=[
                io.Model.Output("model", tooltip=_MODEL_OUT),
                io.Clip.Output("clip", tooltip=_CLIP_OUT),
                sockets.Adapters.Output("adapter", tooltip="All chosen adapters with their strengths."),
                io.String.Output("info", tooltip="For each adapter: base, rank, modules applied, training, notes."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        adapter_1: str | None = NONE,
        adapter_2: str | None = NONE,
        adapter_3: str | None = NONE,
        adapter_4: str | None = NONE,
    ) -> bool | str:
        checks = (check_adapter(name, none=True) for name in (adapter_1, adapter_2, adapter_3, adapter_4))
        return next((check for check in checks if check is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        names = (inputs[f"adapter_{slot}"] for slot in SLOTS)
        return fingerprint(adapter_file(name) for name in names if name != NONE)

    @classmethod
    def execute(cls, model: Any, clip: Any | None = None, strict: bool = True, **slots: Any) -> io.NodeOutput:
        names = [(slots[f"adapter_{slot}"], slots[f"strength_{slot}"]) for slot in SLOTS]
        return _applied(model, clip, [(name, strength) for name, strength in names if name != NONE], strict)


class MergeAdapters(io.ComfyNode):
    """Several adapters as one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_MergeAdapters",
            display_name="Merge SPO Adapters",
            category=_CATEGORY,
            description=(
                "Merges adapters, each at its strength, into one safetensors file under the output folder: exactly, "
                "or at a chosen rank. The info says what the cut costs."
            ),
            search_aliases=["merge lora", "combine lora", "lora svd", "resize lora", "spo"],
            is_output_node=True,
            inputs=[
                sockets.Adapters.Input("adapter", tooltip="One or more adapters, from a loader or a stack."),
                sockets.Adapters.Input("other", optional=True, tooltip="More adapters to merge in."),
                io.Combo.Input(
                    "method",
                    options=list(MERGE_METHODS),
                    default="concat",
                    tooltip=(
                        "concat is exact, and its rank the sum of all ranks; the others give at most the rank below: "
                        "svd the nearest to the sum, ties, dare, dare-ties and magnitude value by value, comerge each "
                        "output from one adapter."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Of the merged adapter, at most; not for concat.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="spo/merged",
                    tooltip="Folder and beginning of the name, in the output folder.",
                ),
            ],
            outputs=[
                sockets.Adapters.Output("adapter", tooltip="The merged adapter at strength 1."),
                io.String.Output("info", tooltip="The file, its rank, and the error that the method makes."),
            ],
        )

    @classmethod
    def execute(
        cls, adapter: Stack, method: str, rank: int, filename_prefix: str, other: Stack | None = None
    ) -> io.NodeOutput:
        parents = [*adapter, *(other or [])]
        if not parents:
            raise ConfigError("there is no adapter to merge: choose at least one in the stack")
        merged = merge_adapters(
            [parent for parent, _ in parents],
            [strength for _, strength in parents],
            method=method,
            rank=None if method == "concat" else rank,
        )
        path = write_adapter(merged.adapter, output_file(filename_prefix, ".safetensors"))
        info = (
            f"{path.name}: {len(parents)} adapters merged by {method}, {len(merged.adapter.modules)} modules, rank "
            f"{merged.adapter.rank}, relative error {merged.error:.3g}\n{path}"
        )
        return io.NodeOutput([(merged.adapter, 1.0)], info, ui={"text": [info]})

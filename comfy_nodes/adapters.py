"""Nodes that load safety adapters, several at once or by block, and merge them into one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.v0_0_2 import io

from t2i_spo_plugin.adapters import (
    MERGE_METHODS,
    check_blocks,
    describe,
    merge_adapters,
    parse_blocks,
    scale_by_block,
    write_adapter,
)
from t2i_spo_plugin.errors import ConfigError

from . import sockets
from .files import fingerprint, output_file
from .patching import NONE, Stack, adapter_file, adapter_files, check_adapter, patched, quantisation, read_stack


SLOTS = (1, 2, 3, 4)
_CATEGORY = "SPO/adapters"
_MODEL_OUT = "A clone of the model with the adapter as patches; the model itself at strength 0."
_CLIP_OUT = "A clone of the CLIP with the adapter's text encoder part; the CLIP itself when it has none."
_FIRST = "the down blocks of a UNet, the first third of a transformer"
_MIDDLE = "the middle block of a UNet, the second third of a transformer"
_LAST = "the up blocks of a UNet, the last third of a transformer"
_STRICT = (
    "On: an adapter of which only a part fits is refused. Off: what fits is applied, and the info says what was left "
    "out."
)


def _strength(
    name: str,
    optional: bool = False,
    tooltip: str = "0 is the model exactly as it is, 1 the adapter as it was trained.",
) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=4.0, step=0.05, optional=optional, tooltip=tooltip)


def _applied(model: Any, clip: Any | None, stack: Stack, strict: bool) -> io.NodeOutput:
    model, clip, fits = patched(model, clip, stack, strict)
    info = "\n\n".join(describe(fit, strength) for fit, (_, strength) in zip(fits, stack, strict=True))
    if kept := quantisation(model):
        info += (
            f"\nnote: this model's weights are {kept}, and are rounded again with the adapter in them; SPO Adapter "
            "Window from 0 to 1 computes the adapter beside them, exactly"
        )
    return io.NodeOutput(model, clip, stack, info, ui={"text": [info]})


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
            search_aliases=[
                "lora",
                "load lora",
                "safety lora",
                "safe",
                "nsfw",
                "erase",
                "unlearn",
                "peft",
                "spo",
                "dpo",
            ],
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
        return _applied(model, clip, read_stack([(adapter, strength)], strict), strict)


class AdapterStack(io.ComfyNode):
    """Up to four adapters onto a model; their changes add up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        slots: list[Any] = []
        # All optional, so that they stay in the order of the rows; what is not given is as by default.
        for slot in SLOTS:
            slots.append(
                io.Boolean.Input(
                    f"on_{slot}",
                    default=True,
                    optional=True,
                    tooltip="Off: this adapter is left out, and its choice and strength are kept.",
                )
            )
            slots.append(
                io.Combo.Input(
                    f"adapter_{slot}",
                    options=[NONE, *adapter_files()],
                    default=NONE,
                    optional=True,
                    tooltip="A .safetensors file in the loras folder, a bundled one, or none.",
                )
            )
            slots.append(_strength(f"strength_{slot}", optional=True))
        return io.Schema(
            node_id="SPO_AdapterStack",
            display_name="SPO Adapter Stack",
            category=_CATEGORY,
            description="Applies up to four adapters to a model, each in a row that can be switched off. Their "
            "changes add up; the order makes no difference.",
            search_aliases=["lora stack", "multiple loras", "safety lora", "erase", "experts", "spo"],
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
        on_1: bool | None = True,
        on_2: bool | None = True,
        on_3: bool | None = True,
        on_4: bool | None = True,
    ) -> bool | str:
        rows = ((adapter_1, on_1), (adapter_2, on_2), (adapter_3, on_3), (adapter_4, on_4))
        # What is linked is None here.
        checks = (check_adapter(name, none=True) for name, on in rows if on is not False)
        return next((check for check in checks if check is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return fingerprint(adapter_file(name) for name, _ in _rows(inputs))

    @classmethod
    def execute(cls, model: Any, clip: Any | None = None, strict: bool = True, **slots: Any) -> io.NodeOutput:
        return _applied(model, clip, read_stack(_rows(slots), strict), strict)


class ApplyByBlock(io.ComfyNode):
    """An adapter onto a model, with a strength for each part of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_ApplyByBlock",
            display_name="Apply SPO Adapter by Block",
            category=_CATEGORY,
            description="Applies an adapter with a strength of its own for each part of the model: what the image is "
            "of comes from other blocks than its style and details.",
            search_aliases=["lora block weight", "lbw", "lora by block", "strength by block", "safety lora", "spo"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the adapter; it is not changed."),
                sockets.Adapters.Input(
                    "adapter", tooltip="From Load SPO Adapter, a stack or a merge; its strength counts too."
                ),
                _strength("first", tooltip=f"For the first blocks: {_FIRST}."),
                _strength("middle", tooltip=f"For the blocks between: {_MIDDLE}."),
                _strength("last", tooltip=f"For the last blocks: {_LAST}."),
                _strength("other", tooltip="For what lies outside the blocks, such as the first and the last layer."),
                _strength("text_encoder", tooltip="For the text encoders, where the adapter changes them."),
                io.String.Input(
                    "blocks",
                    multiline=True,
                    default="",
                    advanced=True,
                    optional=True,
                    tooltip="For single blocks, one line each, such as unet.up_blocks.1 = 0.5; the longest name that "
                    "fits counts, and goes before the numbers above.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Needed only for adapters that change a text encoder."),
                io.Boolean.Input("strict", default=True, advanced=True, optional=True, tooltip=_STRICT),
            ],
            outputs=[
                io.Model.Output("model", tooltip=_MODEL_OUT),
                io.Clip.Output("clip", tooltip=_CLIP_OUT),
                sockets.Adapters.Output("adapter", tooltip="The adapters with these strengths, to merge or to gate."),
                io.String.Output("info", tooltip="For each adapter: base, rank, modules applied, training, notes."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Stack,
        first: float,
        middle: float,
        last: float,
        other: float,
        text_encoder: float,
        blocks: str = "",
        clip: Any | None = None,
        strict: bool = True,
    ) -> io.NodeOutput:
        parts = {"first": first, "middle": middle, "last": last, "other": other, "text encoder": text_encoder}
        named = parse_blocks(blocks)
        check_blocks(named, {name for one, _ in adapter for name in one.modules})
        stack = [(scale_by_block(one, parts, named), strength) for one, strength in adapter]
        return _applied(model, clip, stack, strict)


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
            search_aliases=["merge lora", "combine lora", "lora svd", "resize lora", "safety lora", "spo"],
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


def _rows(slots: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The adapters of a stack's rows that are on, with their strengths."""
    return [
        (name, slots.get(f"strength_{slot}", 1.0))
        for slot in SLOTS
        if (name := slots.get(f"adapter_{slot}", NONE)) != NONE and slots.get(f"on_{slot}", True)
    ]

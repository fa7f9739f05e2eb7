"""What an adapter file is and what is odd about it, without loading it anywhere."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.files import sha256_of

from . import layouts
from .adapter import Adapter
from .alpha_statements import alpha_source
from .io import find_adapter_file, read_tensors
from .lora import block_of
from .metadata import metadata_from_header


@dataclass(frozen=True)
class Inspection:
    """An adapter file in words and numbers.

    Attributes:
        file: its path.
        bytes: its size.
        layout: one of `layouts.LAYOUTS`, or `original` where modules have the names of the model's own code.
        title, base_architecture, prediction_type: as the header says; empty when it does not.
        components: pipeline components that it changes.
        modules: how many modules it changes.
        parameters: how many numbers it holds, alphas not counted.
        dtypes: of the weights as they are read: 8-bit floats are float16, those with a scale float32.
        ranks, alphas, scales: the values that occur, ascending; a scale is alpha / rank.
        norm: of all changes at strength 1 together, Frobenius.
        block_norms: the same by block.
        metadata: what else the header says about base and training.
        warnings: what a user should know before loading it; a sentence each.
        loads: whether `read_adapter` takes the file, all of it.
        architectures_by_keys: the architectures whose modules these may be, by their names; several share some names.
        alpha_from: where the file states its alphas.
    """

    file: str
    bytes: int
    layout: str
    title: str
    base_architecture: str
    prediction_type: str
    components: list[str]
    modules: int
    parameters: int
    dtypes: list[str]
    ranks: list[int]
    alphas: list[float]
    scales: list[float]
    norm: float
    block_norms: dict[str, float]
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loads: bool = True
    architectures_by_keys: list[str] = field(default_factory=list)
    alpha_from: str = ""


def inspect_adapter(path: str | Path) -> Inspection:
    """Read the file, or the one adapter file of a folder; keys that are no LoRA weights are left out, with a warning.

    Raises:
        UnreadableAdapterError: no such file, or not a safetensors file.
        UnsupportedAdapterError: nothing in it is understood as a LoRA.
        InvalidAdapterError: matrices are missing, or do not fit each other.
    """
    path = find_adapter_file(path)
    tensors, header, peft_config = read_tensors(path)
    try:
        layout = layouts.layout_of(tensors, header, peft_config)
        foreign = layouts.foreign_keys(tensors, peft_config is not None)
        loras = {key: tensors[key] for key in sorted(set(tensors) - set(foreign))}
        metadata = metadata_from_header(header)
        alphas = alpha_source(layout, loras, header, peft_config)
        modules = layouts.decode(loras | alphas.tensors, header, alphas.config, metadata.base_architecture)
        adapter = Adapter(modules, metadata)
    except AdapterError as error:
        raise type(error)(f"{path.name}: {error}") from error
    pairs = adapter.modules.values()
    squares: dict[str, float] = {}
    for name, pair in adapter.modules.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + pair.norm() ** 2
    flaws = [*_flaws(adapter, foreign, len(tensors)), *alphas.conflicts, *alphas.problems]
    return Inspection(
        file=str(path),
        bytes=path.stat().st_size,
        layout=layout,
        title=header.get("modelspec.title", ""),
        base_architecture=metadata.base_architecture,
        prediction_type=metadata.prediction_type,
        components=sorted({name.partition(".")[0] for name in adapter.modules}),
        modules=len(adapter.modules),
        parameters=adapter.num_parameters(),
        dtypes=sorted({str(matrix.dtype).removeprefix("torch.") for pair in pairs for matrix in (pair.down, pair.up)}),
        ranks=sorted({pair.rank for pair in pairs}),
        alphas=sorted({pair.alpha for pair in pairs}),
        scales=sorted({pair.scale for pair in pairs}),
        norm=math.sqrt(sum(squares.values())),
        block_norms={block: math.sqrt(square) for block, square in sorted(squares.items())},
        metadata=dict(sorted(metadata.extra.items())),
        warnings=[
            *(f"{flaw}: loading refuses the file" for flaw in flaws),
            *(f"{note}: if it was another, the strength is off by that factor" for note in alphas.notes),
            *_header_warnings(path, adapter, header),
            *_weight_warnings(adapter),
        ],
        loads=not flaws,
        architectures_by_keys=layouts.denoiser.architectures_of(adapter.modules),
        alpha_from=alphas.where,
    )


def _flaws(adapter: Adapter, foreign: Sequence[str], total: int) -> list[str]:
    """Why loading refuses the file; its alphas apart."""
    flaws = []
    if foreign:
        flaws.append(layouts.foreign_weights(foreign, total))
    try:
        adapter.validate()
    except AdapterError as error:
        flaws.append(str(error))
    return flaws


def _header_warnings(path: Path, adapter: Adapter, metadata: Mapping[str, str]) -> list[str]:
    messages = []
    if not adapter.metadata.base_architecture:
        messages.append("the header does not say which architecture it was made for: loading cannot check that")
    elif not adapter.metadata.prediction_type:
        messages.append("the header does not say what the base model predicts: loading cannot check that")
    digest = metadata.get("sshs_model_hash", "")
    if digest and digest != _digest(path):
        messages.append(
            "the weights are not those that the header's hash was taken of: the file was changed afterwards"
        )
    return messages


def _weight_warnings(adapter: Adapter) -> list[str]:
    messages = []
    idle = [name for name, pair in adapter.modules.items() if not (pair.up.any() and pair.down.any())]
    if idle:
        messages.append(f"{len(idle)} of {len(adapter.modules)} modules change nothing, such as {idle[0]}")
    tiny = torch.finfo(torch.float16).tiny
    narrow = [
        matrix for pair in adapter.modules.values() for matrix in (pair.down, pair.up) if matrix.dtype == torch.float16
    ]
    faint = sum(bool(matrix.any()) and float(matrix.abs().amax()) < tiny for matrix in narrow)
    if faint:
        messages.append(f"{faint} matrices lie below what float16 holds exactly: much of them is lost")
    texts = sorted({name.partition(".")[0] for name in adapter.modules if name.startswith("text_encoder")})
    if texts:
        messages.append(f"it changes {', '.join(texts)} too; in ComfyUI that part has a strength of its own")
    return messages


def _digest(path: Path) -> str:
    """sha256 of the bytes after the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return sha256_of(path, 8 + length)


def as_lines(inspection: Inspection) -> dict[str, Any]:
    """The inspection as `{label: text}` for people, metadata after the numbers."""
    short = [f"{value:g}" for value in inspection.scales[:6]] + (["..."] if len(inspection.scales) > 6 else [])
    return {
        "file": f"{inspection.file} ({inspection.bytes / 1e6:.2f} MB)",
        "title": inspection.title or "none",
        "layout": inspection.layout,
        "architecture": inspection.base_architecture or _by_keys(inspection.architectures_by_keys),
        "prediction": inspection.prediction_type or "not stated",
        "modules": f"{inspection.modules} in {', '.join(inspection.components)}",
        "rank": f"{_span(inspection.ranks)}, alpha {_span(inspection.alphas)}, alpha / rank {', '.join(short)}",
        "alpha from": inspection.alpha_from,
        "parameters": f"{inspection.parameters:,} in {', '.join(inspection.dtypes)}",
        "norm": f"{inspection.norm:.4g}",
        **{f"  {block}": f"{norm:.4g}" for block, norm in inspection.block_norms.items()},
        **inspection.metadata,
    }


def _by_keys(architectures: Sequence[str]) -> str:
    return f"not stated; by its keys {' or '.join(architectures)}" if architectures else "not stated"


def _span(values: Sequence[float]) -> str:
    """The range of ascending numbers."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"

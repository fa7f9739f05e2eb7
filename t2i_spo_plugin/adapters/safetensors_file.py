"""A safetensors file: its header, checked before anything else opens the file, and writing with equal bytes.

The format is eight bytes of length (little endian), so many bytes of JSON, then the weights, without a gap and to the
last byte. Reading a header is bounded in time and memory whatever the bytes are."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import UnreadableAdapterError, UnreadableFileError, UnsupportedAdapterError
from t2i_spo_plugin.files import MAX_JSON, atomic, parse_json, quoted, read_json


__all__ = [
    "ITEM_SIZES",
    "Header",
    "TensorEntry",
    "data_hash",
    "parse_metadata",
    "read_config",
    "read_header",
    "write_tensors",
]

MAX_NAME = 512
"""Characters of a tensor's name or a key of the metadata."""

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of a number, by the type's name in the header."""

_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
"""What is written, by torch's type."""

_MAX_DIMENSIONS = 8
_WEB_PAGE = "it is a web page, not the file behind it"
_LOOKALIKES = (
    (b"version https://git-lfs", "it is a git-lfs pointer, the file itself was not downloaded (git lfs pull)"),
    (b"<!", _WEB_PAGE),
    (b"<h", _WEB_PAGE),
    (b"<H", _WEB_PAGE),
    (b"PK\x03\x04", "it is a zip archive or a PyTorch pickle, which can run code and is never opened"),
    (b"\x80", "it is a pickle, which can run code and is never opened"),
    (b"GGUF", "it is a GGUF file"),
)


@dataclass(frozen=True)
class TensorEntry:
    """Type and shape of one tensor, as the header states them."""

    dtype: str
    shape: tuple[int, ...]

    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors that a file says it holds."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """The header of the safetensors file `path`, in order with itself and with the file's size.

    Raises:
        UnreadableAdapterError: the file cannot be read, is something else, is cut off, or its header does not add up.
        UnsupportedAdapterError: a tensor is of a type that is not understood.
    """
    try:
        # A pipe would be waited on for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableAdapterError("it is no regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = _header_length(start, size)
            file.seek(8)
            text = file.read(length)
        content = parse_json(text, "its header")
        if not isinstance(content, dict):
            raise UnreadableAdapterError("its header is not a mapping")
        metadata = _metadata(content.pop("__metadata__", {}))
        tensors = _tensors(content, size - 8 - length)
    except OSError as error:
        raise UnreadableAdapterError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except UnreadableFileError as error:
        raise UnreadableAdapterError(f"{path.name} is not a readable safetensors file: {error}") from error
    except UnsupportedAdapterError as error:
        raise UnsupportedAdapterError(f"{path.name}: {error}") from error
    return Header(metadata, tensors)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes, in whatever order they come.

    `safetensors` itself writes the metadata in an order that changes from run to run.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in _order(tensors):
            file.write(_bytes(tensors[name]))


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what follows the header in the file that `write_tensors` writes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in _order(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    # Wide types first, as safetensors itself does: readers view the bytes in place and need them aligned.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _header_length(start: bytes, size: int) -> int:
    if size == 0:
        raise UnreadableAdapterError("it is empty")
    if start[8:9] != b"{":
        for mark, what in _LOOKALIKES:
            if start.lstrip().startswith(mark):
                raise UnreadableAdapterError(what)
    if size < 10:
        raise UnreadableAdapterError(f"it has {size} bytes, which is no header")
    length = int(struct.unpack("<Q", start[:8])[0])
    if length > size - 8:
        raise UnreadableAdapterError(f"its header is said to have {length:,} bytes, and only {size - 8:,} follow")
    if length > MAX_JSON:
        raise UnreadableAdapterError(f"its header has {length:,} bytes, more than {MAX_JSON:,}")
    if start[8:9] != b"{":
        raise UnreadableAdapterError("its header does not begin with a brace")
    return length


def _metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        raise UnreadableAdapterError("its metadata is not a mapping")
    for key, value in content.items():
        if len(key) > MAX_NAME:
            raise UnreadableAdapterError(f"a key of its metadata has {len(key):,} characters: {quoted(key)}")
        if not isinstance(value, str):
            raise UnreadableAdapterError(f"its metadata {quoted(key)} is not text but {type(value).__name__}")
    return content


def _tensors(content: Mapping[str, Any], data_size: int) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in content.items():
        _check_name(name)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise UnreadableAdapterError(
                f"the tensor {quoted(name)} needs dtype, shape and data_offsets, and nothing else"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise UnreadableAdapterError(f"the tensor {quoted(name)} names no type")
        if dtype not in ITEM_SIZES:
            raise UnsupportedAdapterError(
                f"the tensor {quoted(name)} is of type {quoted(dtype)}; understood are {', '.join(ITEM_SIZES)}"
            )
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise UnreadableAdapterError(f"the shape of {quoted(name)} is no list of up to {_MAX_DIMENSIONS} sizes")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise UnreadableAdapterError(f"the data_offsets of {quoted(name)} are no begin and end")
        begin, end = offsets
        if end > data_size:
            raise UnreadableAdapterError(
                f"the tensor {quoted(name)} ends at byte {end:,}, the weights at {data_size:,}: it is cut off"
            )
        tensors[name] = TensorEntry(dtype, tuple(shape))
        if tensors[name].num_bytes() != end - begin:
            raise UnreadableAdapterError(
                f"the tensor {quoted(name)} of shape {shape} and type {dtype} cannot have {end - begin:,} bytes"
            )
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            problem = "overlaps the one before it" if begin < reached else "leaves a gap before it"
            raise UnreadableAdapterError(f"the tensor {quoted(name)} {problem}")
        reached = end
    if reached != data_size:
        raise UnreadableAdapterError(f"{data_size - reached:,} bytes follow the last tensor")
    return tensors


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME:
        raise UnreadableAdapterError(f"a tensor's name has {len(name):,} characters: {quoted(name)}")
    if not name.isprintable() or "/" in name or "\\" in name:
        raise UnreadableAdapterError(f"the tensor name {quoted(name)} holds a slash or a control character")


def parse_metadata(text: str, what: str) -> Any:
    """The value of JSON in an adapter's header; `what` begins the message.

    Raises:
        UnreadableAdapterError: as `files.parse_json` refuses it.
    """
    try:
        return parse_json(text.encode("utf-8"), what)
    except UnreadableFileError as error:
        raise UnreadableAdapterError(str(error)) from error


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file beside an adapter's or a model's weights, such as `adapter_config.json`.

    Raises:
        UnreadableAdapterError: as `files.read_json` refuses it.
    """
    try:
        return read_json(path)
    except UnreadableFileError as error:
        raise UnreadableAdapterError(str(error)) from error

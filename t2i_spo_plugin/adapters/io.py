"""Adapter files: which file of a folder it is, reading it in any layout, writing it with equal bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnreadableAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from . import layouts
from .adapter import Adapter
from .alpha_statements import alpha_source
from .dtypes import read_weights, weight_names
from .metadata import metadata_from_header, metadata_to_header
from .safetensors_file import data_hash, read_config, read_header, write_tensors


_PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
_DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def read_adapter(
    path: str | Path, strict: bool = True, architecture: str = "", converter: layouts.Converter | None = None
) -> Adapter:
    """Read and validate an adapter file, or the one adapter file of a folder. No pickle is ever opened.

    Args:
        path: a safetensors file in any layout of `layouts`, or a folder. Weights stored as 8-bit floats become
            float16, which holds each of them exactly; where a scale stands beside them, float32.
        strict: refuse a file of which a part is no LoRA weight, or in which only some modules state an alpha; False
            leaves that part out, and takes those alphas to be the rank, with a warning.
        architecture: of the model it is for, where that is known; it decides between names that several models share.
        converter: asked about files whose layout, or whose model's names, are not known here.

    Raises:
        UnreadableAdapterError: no such file, a pickle, not a safetensors file, or its header does not add up.
        UnsupportedAdapterError: an unknown layout, another method than LoRA, a whole model, or foreign weights.
        InvalidAdapterError: weights that `validate` refuses, or alphas or ranks that contradict each other.
    """
    path = find_adapter_file(path)
    header = read_header(path)
    try:
        config = _peft_config(path)
        metadata = metadata_from_header(header.metadata)
        weights = weight_names(header.tensors)
        layout, foreign = _recognised(weights, config, converter)
        names = sorted(set(weights) - set(foreign))
        problems = [layouts.foreign_weights(foreign, len(weights))] if foreign else []
        _refuse(problems, strict)
        tensors = read_weights(path, header.tensors, names)
        alphas = alpha_source(layout, tensors, header.metadata, config)
        if alphas.conflicts:
            raise InvalidAdapterError("; ".join(alphas.conflicts))
        _refuse(alphas.problems, strict)
        problems += alphas.problems
        modules = layouts.decode(
            tensors | alphas.tensors,
            header.metadata,
            alphas.config,
            architecture or metadata.base_architecture,
            layout,
            converter,
        )
        adapter = Adapter(modules, metadata, (*problems, *alphas.notes)).validate()
    except AdapterError as error:
        raise type(error)(f"{path.name}: {error}") from error
    if problems:
        warnings.warn(f"{path.name}: {'; '.join(problems)}", stacklevel=2)
    return adapter


def _recognised(
    weights: Sequence[str], config: Mapping[str, Any] | None, converter: layouts.Converter | None
) -> tuple[str, list[str]]:
    """As `layouts.recognise`; a LoRA of no known layout is of the layout `converted` where there is a converter."""
    try:
        return layouts.recognise(weights, config is not None)
    except UnsupportedAdapterError:
        if converter is None or config is not None or not layouts.is_plain_lora(weights):
            raise
        return "converted", []


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any] | None]:
    """The tensors and the header of a safetensors file, and the `adapter_config.json` beside it, not yet understood.

    Weights stored as 8-bit floats become float16, which holds each of them exactly; where a scale stands beside them,
    float32. The scales are not among the tensors.

    Raises:
        UnreadableAdapterError: the file or the configuration is not readable.
        UnsupportedAdapterError: a tensor is of a type that is not understood.
        InvalidAdapterError: a scale is neither one number nor one a row.
    """
    header = read_header(path)
    tensors = read_weights(path, header.tensors, weight_names(header.tensors))
    return tensors, header.metadata, _peft_config(path)


def write_adapter(adapter: Adapter, path: str | Path, layout: str = "") -> Path:
    """Write `adapter` as safetensors, atomically; equal adapters give equal bytes.

    SD1, SD2 and SDXL are written in the kohya layout with alpha, all others in the native layout with alpha folded
    into B, unless `layout` names another one of `layouts.LAYOUTS`. There is no date unless SOURCE_DATE_EPOCH is set.

    Raises:
        AdapterError: the adapter is not valid, does not name its architecture, has a module that the layout cannot
            name, or `path` does not end in .safetensors.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise AdapterError(f"adapters are written as .safetensors, got {path.name}")
    adapter.validate()
    if not adapter.metadata.base_architecture:
        raise AdapterError("an adapter must name its base architecture, so that loading can check it")
    layout = layout or layouts.default_layout(adapter.metadata.base_architecture)
    tensors = layouts.encode(adapter.modules, adapter.metadata.base_architecture, layout)
    metadata = metadata_to_header(adapter.metadata, adapter.modules, data_hash(tensors), folded=layout == "native")
    if layout == "diffusers":
        metadata |= layouts.diffusers.alpha_metadata(adapter.modules)
    write_tensors(path, tensors, metadata)
    return path


def find_adapter_file(path: str | Path) -> Path:
    """`path` itself, or the one safetensors file in the folder `path`.

    Raises:
        UnreadableAdapterError: there is none, more than one and none has the usual name, or it is a pickle or a pipe.
    """
    if not str(path):
        raise UnreadableAdapterError("the adapter's name is empty; pass a file or a folder")
    try:
        path = Path(path).expanduser()
        if path.is_dir():
            return path / choose_adapter_file([file.name for file in path.iterdir()], str(path))
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UnreadableAdapterError(f"{quoted(str(path))} is no path that can be read: {error}") from error
    refuse_pickle(path.name)
    if not path.is_file():
        raise UnreadableAdapterError(
            f"{path} is no regular file but a pipe or a device" if exists else f"there is no file {path}"
        )
    return path


def choose_adapter_file(names: Iterable[str], where: str, cure: str = "pass one of them") -> str:
    """The one safetensors file among the file names of a folder, or the one that diffusers gives its name to.

    Args:
        names: of all files in the folder.
        where: the folder's name, for messages.
        cure: what to do when there are several, for messages.

    Raises:
        UnreadableAdapterError: there is none, or more than one and none has the usual name.
    """
    names = sorted(names)
    files = [name for name in names if name.endswith(".safetensors")]
    if _DIFFUSERS_NAME in files:
        return _DIFFUSERS_NAME
    if len(files) > 1:
        raise UnreadableAdapterError(f"{where} holds {len(files)} safetensors files ({', '.join(files)}); {cure}")
    if not files:
        pickles = [name for name in names if Path(name).suffix in _PICKLES]
        hint = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
        raise UnreadableAdapterError(f"{where} holds no safetensors file{hint}")
    return files[0]


def refuse_pickle(name: str) -> None:
    """Raise for a file name that is not safetensors.

    Raises:
        UnreadableAdapterError: always, unless `name` ends in .safetensors.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        raise UnreadableAdapterError(
            f"{name} is a pickle, which can run code and is never opened; convert it to .safetensors"
        )
    if suffix != ".safetensors":
        raise UnreadableAdapterError(f"{name} is not a .safetensors file")


def _refuse(problems: Sequence[str], strict: bool) -> None:
    if problems and strict:
        raise UnsupportedAdapterError(f"{'; '.join(problems)}; without strict, the rest is read")


def _peft_config(path: Path) -> dict[str, Any] | None:
    config = path.parent / "adapter_config.json"
    return read_config(config) if config.is_file() else None

"""Adapter files: which file of a folder it is, reading it in any layout, writing it with equal bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, UnreadableAdapterError, UnsupportedAdapterError

from . import layouts
from .adapter import Adapter
from .dtypes import read_weights, weight_names
from .metadata import FORMAT_KEY, metadata_from_header, metadata_to_header
from .safetensors_file import data_hash, read_config, read_header, write_tensors


_PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
_DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def read_adapter(path: str | Path, strict: bool = True) -> Adapter:
    """Read and validate an adapter file, or the one adapter file of a folder. No pickle is ever opened.

    Args:
        path: a safetensors file in any layout of `layouts`, or a folder. Weights stored as 8-bit floats become
            float16, which holds each of them exactly; where a scale stands beside them, float32.
        strict: refuse a file of which a part is no LoRA weight, or in which only some modules state an alpha; False
            leaves that part out, and takes those alphas to be the rank, with a warning.

    Raises:
        UnreadableAdapterError: no such file, a pickle, not a safetensors file, or its header does not add up.
        UnsupportedAdapterError: an unknown layout, another method than LoRA, a whole model, or foreign weights.
        InvalidAdapterError: weights that `validate` refuses.
    """
    path = find_adapter_file(path)
    header = read_header(path)
    try:
        config = _peft_config(path)
        weights = weight_names(header.tensors)
        layout, foreign = layouts.recognise(weights, config is not None)
        names = sorted(set(weights) - set(foreign))
        problems = [layouts.foreign_weights(foreign, len(weights))] if foreign else []
        alphas, notes = stated_alphas(layout, names, header.metadata)
        problems += alphas
        if problems and strict:
            raise UnsupportedAdapterError(f"{'; '.join(problems)}; strict=False reads the rest")
        modules = layouts.decode(read_weights(path, header.tensors, names), header.metadata, config)
        adapter = Adapter(modules, metadata_from_header(header.metadata), (*problems, *notes)).validate()
    except AdapterError as error:
        raise type(error)(f"{path.name}: {error}") from error
    if problems:
        warnings.warn(f"{path.name}: {'; '.join(problems)}", stacklevel=2)
    return adapter


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
    path = Path(path)
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
        UnreadableAdapterError: there is none, more than one and none has the usual name, or it is a pickle.
    """
    path = Path(path)
    if path.is_dir():
        return path / choose_adapter_file([file.name for file in path.iterdir()], str(path))
    refuse_pickle(path.name)
    if not path.is_file():
        raise UnreadableAdapterError(f"there is no file {path}")
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


def stated_alphas(layout: str, names: Sequence[str], metadata: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is wrong, and what is to be noted, about where the alphas of a file come from.

    Args:
        layout: as `layouts.recognise` or `layouts.layout_of` names it.
        names: of the file's LoRA weights.
        metadata: the file's header.
    """
    if layout == "peft" or layouts.diffusers.METADATA_KEY in metadata or FORMAT_KEY in metadata:
        return [], []
    stated = sum(name.endswith(".alpha") for name in names)
    modules = (len(names) - stated) // 2
    if stated == 0:
        return [], ["the file states no alpha; it is taken to be the rank, as other programs do"]
    return ([f"only {stated} of {modules} modules state an alpha"] if stated < modules else []), []


def _peft_config(path: Path) -> dict[str, Any] | None:
    config = path.parent / "adapter_config.json"
    return read_config(config) if config.is_file() else None

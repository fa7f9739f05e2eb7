"""Tensors from files of others: safetensors as they are, pickles only with the user's word.

Pickles are read by a reader that builds tensors, arrays and plain containers and nothing else.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, UnreadableFileError


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.{module}", name) for core in ("core", "_core") for module, name in (
        ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))),
}  # fmt: skip
"""What a pickled array is made of."""
_CALLS = "it calls {}, which no tensor needs; it was not opened"


def read_foreign_tensors(path: str | Path, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a file by name, names of nested mappings with dots; an array by itself is called `tensor`.

    Args:
        path: a .safetensors file, or a pickle (.pt, .pth, .p, .pkl, .ckpt, .bin).
        trust: open a pickle. Even then nothing is called but what builds tensors and arrays.

    Raises:
        ConfigError: a pickle without `trust`.
        UnreadableFileError: it cannot be read, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableFileError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UnreadableFileError(f"cannot read {path}: {error}") from error
    if not trust:
        raise ConfigError(
            f"{path} is a pickle, a program that runs when it is opened; if you know who made it, say --trust: it is "
            "then read once, by a reader that builds tensors and nothing else, and written as safetensors"
        )
    tensors = dict(_named(_unpickled(path)))
    if not tensors:
        raise UnreadableFileError(f"{path} holds no tensors")
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of older pickle protocols
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the file makes it raise
        # What torch advises then, to open the file without a check, is no advice.
        called = re.search(r"GLOBAL (\S+)", str(error))
    if called:
        raise UnreadableFileError(f"cannot read {path}: {_CALLS.format(called[1])}")
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableFileError(f"cannot read {path}, a file of neither weights nor arrays: {reason}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(_CALLS.format(f"{module}.{name}"))
        return super().find_class(module, name)


def _named(content: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        return [pair for key, value in content.items() for pair in _named(value, f"{prefix}{key}.")]
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiu":
        content = torch.from_numpy(content.copy())
    return [(prefix.rstrip(".") or "tensor", content)] if isinstance(content, Tensor) else []

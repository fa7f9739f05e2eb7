"""Lets ComfyUI start beside a torch for the CPU; installed into its environment as a start-up hook, never elsewhere.

The wheels of torchvision on PyPI are built for CUDA. Their native library does not load beside a torch for the CPU,
and the import fails because two operators it would have brought are unknown: they are declared here first. torchaudio,
which ComfyUI imports and an image never needs, is answered with a module that holds nothing of use.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types


_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep = []


class _Nothing(types.ModuleType):
    """A module whose every attribute is a class that nobody may make an instance of."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is not available here")

        return type(name, (), {"__init__": refuse})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not _keep:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                library.define(operator)
            _keep.append(library)
        if name.partition(".")[0] == "torchaudio":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Nothing(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())

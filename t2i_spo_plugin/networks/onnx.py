"""Networks that come as ONNX files inside other packages, run by onnxruntime on the CPU.

A network can be cut off at an inner tensor, so that its linear head is applied here, to every place of the image.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import MissingExtraError, SPOError, require_extra


def packaged_file(package: str, name: str, cure: str) -> Path:
    """Where the file `name` of an installed package is; the package is not imported.

    Args:
        package: the import name of a top-level package.
        name: path of the file below the package's folder.
        cure: the command that installs it, for the error.

    Raises:
        MissingExtraError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / name
        if path.is_file():
            return path
    state = "is not installed" if spec is None else f"has no file {name}"
    raise MissingExtraError(f"{package} {state}; install it with: {cure}", name=package)


class OnnxNetwork:
    """A network from an ONNX file, on the CPU, with as many threads as torch uses.

    Args:
        path: the file.
        sha256: of the file; another file may mean something else by the same outputs.
        extra: of this package, that brings the libraries.
        inner: the tensor that the network ends at; None is its own output.
        weights: initialisers to read out, such as those of the head that `inner` cuts off.

    Attributes:
        weights: the initialisers asked for, by name.

    Raises:
        SPOError: the file is another one.
        MissingExtraError: onnxruntime, or onnx where a network is cut, is not installed.
    """

    def __init__(
        self, path: Path, sha256: str, extra: str, inner: str | None = None, weights: Sequence[str] = ()
    ) -> None:
        self._arguments = (path, sha256, extra, inner, tuple(weights))
        content = path.read_bytes()
        actual = hashlib.sha256(content).hexdigest()
        if actual != sha256:
            raise SPOError(f"{path} is not the network this was made for: its SHA-256 is {actual}, expected {sha256}")
        self.sha256 = sha256
        self.weights: dict[str, Tensor] = {}
        if inner is not None:
            content = self._cut(content, inner, weights, extra)
        runtime: Any = require_extra("onnxruntime", extra)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, pixels: Tensor) -> Tensor:
        """The network's end for the pixels of one image, in the form that the network takes them."""
        (output,) = self._session.run(None, {self._input: pixels.contiguous().numpy()})
        return torch.from_numpy(output)

    def __reduce__(self) -> Any:
        return type(self), self._arguments

    def _cut(self, content: bytes, inner: str, weights: Sequence[str], extra: str) -> bytes:
        onnx: Any = require_extra("onnx", extra)
        model = onnx.load_model_from_string(content)
        for initializer in model.graph.initializer:
            if initializer.name in weights:
                self.weights[initializer.name] = torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=inner))
        return bytes(model.SerializeToString())

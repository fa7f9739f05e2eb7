"""Adapter gates as safetensors files: threshold, decision window, and the gate network where there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_spo_plugin.adapters import refuse_pickle
from t2i_spo_plugin.adapters.safetensors_file import read_header, write_tensors
from t2i_spo_plugin.errors import AdapterError, ConfigError
from t2i_spo_plugin.files import quoted, user_path

from .gate import AdapterGate
from .gate_network import GateNetwork


_FORMAT = "spo-adapter-gate/1"
_DIMENSIONS = ("channels", "width")


def save_adapter_gate(gate: AdapterGate, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `gate` as one safetensors file, the network in float16; equal input, equal bytes.

    Args:
        gate: the adapter gate.
        path: the file to write.
        metadata: texts for the header, such as the adapter's name and what was measured.
    """
    path = user_path(path)
    settings = {"threshold": gate.threshold, "until": gate.until}
    tensors: dict[str, Tensor] = {}
    if gate.network is not None:
        settings |= {name: getattr(gate.network, name) for name in _DIMENSIONS}
        tensors = {name: tensor.half().contiguous() for name, tensor in gate.network.state_dict().items()}
    header = {"format": _FORMAT, "adapter_gate": json.dumps(settings, sort_keys=True), **dict(metadata or {})}
    write_tensors(path, tensors, {"spo": json.dumps(header, sort_keys=True)})
    return path


def load_adapter_gate(path: str | Path) -> AdapterGate:
    """Read what `save_adapter_gate` wrote. No pickle is opened.

    Raises:
        AdapterError: there is no such file, or it is not an adapter gate.
    """
    path = user_path(path)
    header = _read_header(path)
    try:
        settings = json.loads(header["adapter_gate"])
        tensors = load_file(path)
        network = None
        if tensors:
            with torch.device("meta"):  # No memory for sizes that the weights do not have, and no random numbers.
                network = GateNetwork(*(int(settings[name]) for name in _DIMENSIONS))
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
            network.eval().requires_grad_(False)
        return AdapterGate(float(settings["threshold"]), float(settings["until"]), network)
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise _not_a_gate(path, error) from error


def gate_metadata(path: str | Path) -> dict[str, str]:
    """The texts that `save_adapter_gate` was given, such as the adapter that the gate was trained for.

    Raises:
        AdapterError: as `load_adapter_gate`.
    """
    header = _read_header(user_path(path))
    return {key: str(header[key]) for key in sorted(header.keys() - {"format", "adapter_gate"})}


def _read_header(path: Path) -> dict[str, Any]:
    """What the header says, of a file in this format."""
    refuse_pickle(path.name)
    metadata = read_header(path).metadata
    try:
        header = dict(json.loads(metadata["spo"]))
        version = header["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_gate(path, error) from error
    if version != _FORMAT:
        raise AdapterError(
            f"{path.name} is no file of an adapter gate that this version reads: its format is {quoted(str(version))}"
        )
    return header


def _not_a_gate(path: Path, error: Exception) -> AdapterError:
    return AdapterError(f"{path.name} is no file of an adapter gate: {type(error).__name__} {quoted(str(error))}")

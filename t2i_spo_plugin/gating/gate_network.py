"""Evidence for the adapter gate: a small network that reads what an adapter would change in the denoiser's prediction.

The size of the change alone misses harmful prompts whose safe image looks much alike (a knife that becomes a spoon);
what is changed into what tells more. The network sees predictions only, never the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i_spo_plugin.adapters import refuse_pickle
from t2i_spo_plugin.adapters.safetensors_file import read_header, write_tensors
from t2i_spo_plugin.errors import AdapterError, ConfigError
from t2i_spo_plugin.files import quoted

from .schedule import AdapterGate


_FORMAT = "spo-adapter-gate/1"
_SIZES = ("channels", "width")


class GateNetwork(nn.Module):
    """A logit that an image is going to be unsafe, from predictions without and with the adapter.

    Args:
        channels: of a prediction: its second dimension `[B, C, H, W]`, or its last `[B, L, C]` where an image is a
            sequence of tokens.
        width: of the hidden layers.
    """

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(2 * channels))
        self.register_buffer("std", torch.ones(2 * channels))
        self.near = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.head = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`[B]` logits of `features [B, 2 C, H, W]`, see `change_features`."""
        x = (features - self.mean[:, None, None]) / self.std[:, None, None]
        x = nn.functional.silu(self.far(nn.functional.silu(self.near(x))))
        return self.head(x.mean((2, 3)))[:, 0]

    @torch.no_grad()
    def evidence(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        """`[B]` logits from predictions `[B, ...]` without and with the adapter, on the CPU in float32.

        Raises:
            ConfigError: the predictions have another number of channels.
        """
        features = change_features(without, with_adapter).cpu()
        if features.shape[1] != 2 * self.channels:
            raise ConfigError(
                f"the adapter gate was made for predictions with {self.channels} channels, these have "
                f"{features.shape[1] // 2}: it belongs to another base model"
            )
        return self(features)


def change_features(without: Tensor, with_adapter: Tensor) -> Tensor:
    """The change and the prediction without the adapter as `[B, 2 C, H, W]` in float32.

    Tokens `[B, L, C]` become `[B, C, L, 1]`; frames `[B, C, T, H, W]` are put below one another.

    Raises:
        ConfigError: the predictions have fewer than three dimensions.
    """
    if without.ndim < 3:
        raise ConfigError(f"the adapter gate cannot read predictions of shape {tuple(without.shape)}")

    def as_map(prediction: Tensor) -> Tensor:
        if prediction.ndim == 3:
            return prediction.float().transpose(1, 2)[..., None]
        return prediction.float().flatten(2, -2)

    return torch.cat([as_map(with_adapter) - as_map(without), as_map(without)], 1)


def save_adapter_gate(loop: AdapterGate, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `loop` as one safetensors file, the reader in float16; equal input, equal bytes.

    Args:
        metadata: texts for the header, such as the adapter's name and what was measured.
    """
    path = Path(path)
    header = {"threshold": loop.threshold, "until": loop.until}
    tensors: dict[str, Tensor] = {}
    if loop.reader is not None:
        header |= {name: getattr(loop.reader, name) for name in _SIZES}
        tensors = {name: tensor.half().contiguous() for name, tensor in loop.reader.state_dict().items()}
    told = {"format": _FORMAT, "adapter_gate": json.dumps(header, sort_keys=True), **dict(metadata or {})}
    write_tensors(path, tensors, {"spo": json.dumps(told, sort_keys=True)})
    return path


def load_adapter_gate(path: str | Path) -> AdapterGate:
    """Read what `save_adapter_gate` wrote. No pickle is opened.

    Raises:
        AdapterError: there is no such file, or it is none of an adapter gate.
    """
    path = Path(path)
    told = _told(path)
    try:
        header = json.loads(told["adapter_gate"])
        tensors = load_file(path)
        reader = None
        if tensors:
            with torch.device("meta"):  # No memory for sizes that the weights do not have, and no random numbers.
                reader = GateNetwork(*(int(header[name]) for name in _SIZES))
            reader.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
            reader.eval().requires_grad_(False)
        return AdapterGate(float(header["threshold"]), float(header["until"]), reader)
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise _no_adapter_gate(path, error) from error


def gate_metadata(path: str | Path) -> dict[str, str]:
    """The texts that `save_adapter_gate` was given, such as the adapter that the loop was made for.

    Raises:
        AdapterError: as `load_adapter_gate`.
    """
    told = _told(Path(path))
    return {key: str(told[key]) for key in sorted(told.keys() - {"format", "adapter_gate"})}


def _told(path: Path) -> dict[str, Any]:
    """What the header says, of a file in this format."""
    refuse_pickle(path.name)
    metadata = read_header(path).metadata
    try:
        told = dict(json.loads(metadata["spo"]))
        kind = told["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_adapter_gate(path, error) from error
    if kind != _FORMAT:
        raise AdapterError(
            f"{path.name} is no file of an adapter gate that this version reads: its format is {quoted(str(kind))}"
        )
    return told


def _no_adapter_gate(path: Path, error: Exception) -> AdapterError:
    return AdapterError(f"{path.name} is no file of an adapter gate: {type(error).__name__} {quoted(str(error))}")

"""A model in a folder: `metadata.json`, which says what it is, and its weights as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_spo_plugin.errors import UnreadableFileError
from t2i_spo_plugin.files import read_json, write_json


METADATA, WEIGHTS = "metadata.json", "model.safetensors"
_COPY = "copy the model's folder again, with all its files"


def write_model(folder: Path | str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into `folder`, which is made when there is none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / METADATA, dict(sorted(metadata.items())))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_metadata(folder: Path | str, *needed: str) -> dict[str, Any]:
    """The `metadata.json` of a model folder.

    Raises:
        UnreadableFileError: there is none, it is no JSON mapping, or it does not say what is `needed`.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise UnreadableFileError(f"{folder} is no model folder of this package: it has no {METADATA}")
    metadata = read_json(path)
    missing = [name for name in needed if name not in metadata]
    if missing:
        raise UnreadableFileError(f"{path} does not say {', '.join(missing)}; {_COPY}")
    return metadata


def read_weights(folder: Path | str, name: str = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of a model folder, as they are stored.

    Raises:
        UnreadableFileError: there is no such file, or it is broken.
    """
    path = Path(folder) / name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UnreadableFileError(f"cannot read the weights {path}: {error}; {_COPY}") from error


def load_weights(network: nn.Module, folder: Path | str, rename: Callable[[str], str] = str) -> None:
    """Load the weights of `folder` into `network` as float32, and switch it to inference.

    `rename` gives the network's name of a weight by the file's.

    Raises:
        UnreadableFileError: as `read_weights`, or they are another network's.
    """
    load_state(network, {rename(name): tensor for name, tensor in read_weights(folder).items()}, folder)


def load_state(network: nn.Module, state: Mapping[str, Tensor], folder: Path | str) -> None:
    """Load `state`, read from `folder`, into `network` as float32, and switch it to inference.

    Raises:
        UnreadableFileError: it is another network's.
    """
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UnreadableFileError(
            f"the weights of {folder} are not those of the model it describes: {error}"
        ) from error
    network.eval().requires_grad_(False)


def read_config(folder: Path | str) -> Any:
    """The transformers configuration of a model folder.

    Raises:
        UnreadableFileError: there is none, or it is broken.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnreadableFileError(f"cannot read the configuration of {folder}: {reason}; {_COPY}") from error

"""The weights of a model on disk, tensor by tensor: diffusers folders and safetensors files, sharded or not.

Nothing is loaded into a pipeline and no pickle is ever opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, UnreadableAdapterError, UnsupportedAdapterError

from .architecture import architecture_from_config, prediction_from_config, weight_shapes
from .io import find_adapter_file
from .lora import COMPONENTS
from .safetensors_file import read_config, read_header


_STEMS = ("diffusion_pytorch_model", "model")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_MARKS = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks."),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.", "encoder.layers."),
}


@dataclass(frozen=True)
class ModelFiles:
    """Where the weights of a model lie.

    Attributes:
        name: of the folder or file, for people.
        components: for each component that can carry a LoRA, its folder or file.
        is_pipeline: whether it is a whole pipeline's folder.
        architecture: of the denoiser, empty when the files do not say.
        prediction_type: empty when the files do not say.
    """

    name: str
    components: dict[str, Path]
    is_pipeline: bool = False
    architecture: str = ""
    prediction_type: str = ""


def find_model(path: str | Path, component: str = "") -> ModelFiles:
    """What lies at `path`: a pipeline's folder, a component's folder, or a safetensors file with diffusers' names.

    Args:
        path: local; nothing is downloaded.
        component: what a component's folder or a file is, where its name and keys do not tell; of a pipeline, the
            only component to look at.

    Raises:
        AdapterError: there is no such component.
        UnreadableAdapterError: nothing is there, or its configuration is not readable.
        UnsupportedAdapterError: it is no such thing, or which component it is cannot be told.
    """
    path = Path(path).expanduser()
    if component and component not in COMPONENTS:
        raise AdapterError(f"there is no component {component}; there are {', '.join(COMPONENTS)}")
    if (path / "model_index.json").is_file():
        return _pipeline(path, component)
    if not path.exists():
        raise UnreadableAdapterError(f"there is no file or folder {path}")
    config = read_config(path / "config.json") if (path / "config.json").is_file() else {}
    component = component or _component_of(path, config)
    kind = str(config.get("_class_name", ""))
    architecture = architecture_from_config(kind, config) if kind and component not in _TEXT_ENCODERS else ""
    return ModelFiles(path.resolve().name, {component: path}, architecture=architecture)


def layer_names(path: Path) -> frozenset[str] | None:
    """The linear layers and convolutions of the diffusers model in folder `path`; None where its class is not at hand.

    Names and shapes of tensors do not tell them from other matrices, such as the router of a mixture of experts. The
    model is built from its configuration without memory for its weights.
    """
    config = read_config(path / "config.json") if (path / "config.json").is_file() else {}
    if "_class_name" not in config:
        return None
    try:
        import diffusers
    except ImportError:
        return None
    kind: Any = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        return None
    with torch.device("meta"):
        model = kind.from_config(config)  # type: ignore[attr-defined]
    return frozenset(weight_shapes(model))


class Weights:
    """The tensors of one component by name, read when they are asked for.

    No file stays open between: the pages of a mapped file would count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        """Check the headers of what lies at `path`: a folder, with or without an index of shards, or a file.

        Raises:
            UnreadableAdapterError: there is no safetensors file, more than one without an index, a shard is missing or
                does not hold what the index says, or a header is not readable.
            UnsupportedAdapterError: a tensor is of a type that is not understood.
        """
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file, expected in _shards(path):
            tensors = read_header(file).tensors
            keys = set(tensors) if expected is None else expected
            if lacking := keys - set(tensors):
                raise UnreadableAdapterError(f"{file.name} lacks {min(lacking)}, which the index places there")
            self._files |= dict.fromkeys(keys, file)
            self._shapes |= {key: tensors[key].shape for key in keys}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name, sorted; no tensor is read."""
        return dict(sorted(self._shapes.items()))

    def read(self, key: str) -> Tensor:
        """One tensor.

        Raises:
            UnreadableAdapterError: the file is not readable any more.
        """
        try:
            with safe_open(self._files[key], framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UnreadableAdapterError(f"{self._files[key]} is not readable as safetensors: {error}") from error
        return tensor


def _pipeline(path: Path, component: str) -> ModelFiles:
    import diffusers

    kind = str(read_config(path / "model_index.json").get("_class_name", ""))
    loadable = tuple(getattr(getattr(diffusers, kind, None), "_lora_loadable_modules", ()))
    if not loadable:
        raise UnsupportedAdapterError(
            f"{path.name}: the installed diffusers knows no pipeline {kind} that can load a LoRA"
        )
    components = {name: path / name for name in loadable if (path / name).is_dir()}
    if not components or (component and component not in components):
        raise UnreadableAdapterError(f"{path.name} has no folder {component or ' or '.join(loadable)}")
    denoiser = next((name for name in components if name not in _TEXT_ENCODERS), "")
    config = read_config(path / denoiser / "config.json") if denoiser else {}
    architecture = architecture_from_config(str(config["_class_name"]), config) if "_class_name" in config else ""
    scheduler = path / "scheduler" / "scheduler_config.json"
    settings = read_config(scheduler) if scheduler.is_file() else {}
    return ModelFiles(
        path.resolve().name,
        {component: components[component]} if component else components,
        True,
        architecture,
        prediction_from_config(str(settings.get("_class_name", "")), settings),
    )


def _component_of(path: Path, config: Mapping[str, Any]) -> str:
    if path.name in COMPONENTS:
        return path.name
    kind = str(config.get("_class_name", ""))
    for mark, component in (("UNet", "unet"), ("Transformer", "transformer")):
        if mark in kind:
            return component
    keys = list(Weights(path).shapes())
    for component, marks in _MARKS.items():
        if any(key.startswith(marks) for key in keys):
            return component
    raise UnsupportedAdapterError(
        f"{path.name} begins with {keys[0] if keys else 'no tensor'}: that is no denoiser or text encoder with the "
        "names that diffusers uses; convert the checkpoint to a diffusers folder, or say which component it is"
    )


def _shards(path: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files at `path`, each with the keys that an index places there."""
    if not path.is_dir():
        return [(find_adapter_file(path), None)]
    for stem in _STEMS:
        index = path / f"{stem}.safetensors.index.json"
        if index.is_file():
            places = read_config(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise UnreadableAdapterError(f"{index} has no weight_map")
            shards: dict[str, set[str]] = {}
            for key, name in places.items():
                if not isinstance(name, str) or Path(name).name != name:
                    raise UnreadableAdapterError(f"{index} places {key} outside its own folder, in {name!r}")
                shards.setdefault(name, set()).add(key)
            return [(find_adapter_file(path / name), keys) for name, keys in sorted(shards.items())]
        if (path / f"{stem}.safetensors").is_file():
            return [(path / f"{stem}.safetensors", None)]
    return [(find_adapter_file(path), None)]

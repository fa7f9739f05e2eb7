"""A safety adapter in memory and as a file: weights, alpha, base architecture, training metadata in the header."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnreadableAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted, write_bytes

from . import layouts
from .dtypes import read_weights, weight_names
from .layouts import LoraPair
from .safetensors_file import read_config, read_header


__all__ = [
    "Adapter",
    "AdapterMetadata",
    "LoraPair",
    "find_adapter_file",
    "read_adapter",
    "read_tensors",
    "write_adapter",
]

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "sample")
MAX_SCALE = 1000.0
"""Largest `alpha / rank` taken for meant."""

_LONGEST_NAME = 100
_PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
_DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_FORMAT = "1"

_KOHYA_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-3": "sd3",
    "flux-1-dev": "flux1",
}
_SPELLINGS = {
    "stable-diffusion-v2-512": "stable-diffusion-v2",
    "stable-diffusion-v2-768-v": "stable-diffusion-v2",
    "stable-diffusion-3-medium": "stable-diffusion-3",
    "stable-diffusion-v3-medium": "stable-diffusion-3",
    "flux-1-schnell": "flux-1-dev",
}
_SPELLED_PREDICTIONS = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
_VERSION_OF_V = "_v"
"""What sd-scripts puts behind the base model's version when it predicts v."""
_RESOLUTIONS = {"stable-diffusion-v1": "512x512", "stable-diffusion-v2": "768x768"}
_SPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}
_OUR_KEYS = ("spo.base_architecture", "spo.prediction_type", "spo.format")
_WRITTEN_KEYS = (
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.prediction_type",
    "modelspec.date",
    "modelspec.hash_sha256",
)


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter says about itself.

    Attributes:
        base_architecture: such as `stable-diffusion-v1` or `flux-1-dev`; empty when a foreign file does not say.
        prediction_type: `epsilon`, `v_prediction`, `flow` or `sample`; empty when unknown.
        title: for people.
        extra: more metadata. A bare key such as `base_fingerprint` stands in the header as `spo.base_fingerprint`;
            keys that begin with `modelspec.` stand there as they are.
    """

    base_architecture: str = ""
    prediction_type: str = ""
    title: str = "Safety adapter"
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction_type and self.prediction_type not in PREDICTION_TYPES:
            raise InvalidAdapterError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        for key, value in self.extra.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise InvalidAdapterError(f"metadata are text, got {key!r}: {value!r}")


@dataclass(frozen=True)
class Adapter:
    """Low-rank pairs by module name, such as `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.

    Attributes:
        modules: the pairs.
        metadata: what the header says.
        notes: what reading had to leave out or assume, a sentence each.
    """

    modules: dict[str, LoraPair]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def validate(self) -> Adapter:
        """Return the adapter itself when its numbers can be meant.

        Raises:
            InvalidAdapterError: no module, a module name without component, NaN or Inf, an alpha that is not positive
                or out of proportion to the rank, or weights that change nothing.
        """
        if not self.modules:
            raise InvalidAdapterError("the adapter has no module")
        changes_something = False
        for name, pair in self.modules.items():
            if name.partition(".")[0] not in layouts.COMPONENTS or "." not in name:
                raise InvalidAdapterError(f"{name}: a module name starts with one of {', '.join(layouts.COMPONENTS)}")
            if not (math.isfinite(pair.alpha) and 0.0 < pair.alpha <= MAX_SCALE * pair.rank):
                raise InvalidAdapterError(
                    f"{name}: alpha {pair.alpha} makes no sense for rank {pair.rank}; it must be positive and at most "
                    f"{MAX_SCALE:.0f} times the rank"
                )
            peaks = [_peak(half, name) for half in (pair.down, pair.up)]
            changes_something = changes_something or all(peak > 0.0 for peak in peaks)
        if not changes_something:
            raise InvalidAdapterError("all weights are zero: the adapter changes nothing")
        return self

    @property
    def rank(self) -> int:
        """The most common rank."""
        return Counter(pair.rank for pair in self.modules.values()).most_common(1)[0][0]

    def num_parameters(self) -> int:
        return sum(pair.down.numel() + pair.up.numel() for pair in self.modules.values())


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
    # Wide types first, as safetensors itself does: readers view the bytes in place and need them aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    data = [_bytes(tensors[name]) for name in names]
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    metadata = _header(adapter, digest.hexdigest(), layout)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, part in zip(names, data, strict=True):
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(part)],
        }
        offset += len(part)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    write_bytes(path, struct.pack("<Q", len(text)), text, *data)
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


def normalise_architecture(name: str) -> str:
    """One spelling for an architecture: `stable-diffusion-v2-768-v/lora` is `stable-diffusion-v2`."""
    name = _bare(name)
    return _SPELLINGS.get(name, name)


def _bare(architecture: str) -> str:
    return architecture.partition("/")[0].strip().lower()


def stated_alphas(layout: str, names: Sequence[str], metadata: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What is wrong, and what is to be noted, about where the alphas of a file come from.

    Args:
        layout: as `layouts.recognise` or `layouts.layout_of` names it.
        names: of the file's LoRA weights.
        metadata: the file's header.
    """
    if layout == "peft" or layouts.diffusers.METADATA_KEY in metadata or "spo.format" in metadata:
        return [], []
    stated = sum(name.endswith(".alpha") for name in names)
    modules = (len(names) - stated) // 2
    if stated == 0:
        return [], ["the file states no alpha; it is taken to be the rank, as other programs do"]
    return ([f"only {stated} of {modules} modules state an alpha"] if stated < modules else []), []


def metadata_from_header(metadata: Mapping[str, str]) -> AdapterMetadata:
    """What the header of an adapter file says, ours or another program's.

    Raises:
        InvalidAdapterError: the prediction type is none that exists, or the architecture's name makes no sense.
    """
    spelled = metadata.get("spo.base_architecture") or metadata.get("modelspec.architecture", "")
    version = metadata.get("ss_base_model_version", "")
    if not spelled:
        bare = version.removesuffix(_VERSION_OF_V)
        spelled = next((name for name, kohya in _KOHYA_VERSIONS.items() if bare == kohya), "")
    architecture = normalise_architecture(spelled)
    if len(architecture) > _LONGEST_NAME or not architecture.isprintable():
        raise InvalidAdapterError(f"the name of its architecture makes no sense: {quoted(architecture)}")
    prediction = metadata.get("spo.prediction_type", "")
    if not prediction:
        spec = metadata.get("modelspec.prediction_type", "")
        prediction = next((ours for ours, theirs in _SPEC_PREDICTION.items() if theirs == spec), "")
    if not prediction:
        said_v = version in {f"{known}{_VERSION_OF_V}" for known in _KOHYA_VERSIONS.values()}
        prediction = "v_prediction" if said_v else _SPELLED_PREDICTIONS.get(_bare(spelled), "")
    extra = {key.removeprefix("spo."): value for key, value in metadata.items() if _is_own_fact(key)}
    for key, value in metadata.items():
        is_default = key == "modelspec.resolution" and value == _RESOLUTIONS.get(architecture, "1024x1024")
        if key.startswith("modelspec.") and key not in _WRITTEN_KEYS and not is_default:
            extra[key] = value
    return AdapterMetadata(architecture, prediction, metadata.get("modelspec.title", "Safety adapter"), extra)


def _is_own_fact(key: str) -> bool:
    return key.startswith("spo.") and key not in _OUR_KEYS


def _header(adapter: Adapter, digest: str, layout: str) -> dict[str, str]:
    metadata, folded = adapter.metadata, layout == "native"
    ranks = {pair.rank for pair in adapter.modules.values()}
    alphas = {float(pair.rank) if folded else pair.alpha for pair in adapter.modules.values()}
    architecture = metadata.base_architecture
    if architecture == "stable-diffusion-v2":
        architecture += "-768-v" if metadata.prediction_type == "v_prediction" else "-512"
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": metadata.title,
        "modelspec.resolution": _RESOLUTIONS.get(metadata.base_architecture, "1024x1024"),
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "spo.base_architecture": metadata.base_architecture,
        "spo.format": _FORMAT,
    }
    if metadata.prediction_type:
        header["spo.prediction_type"] = metadata.prediction_type
    if metadata.prediction_type in _SPEC_PREDICTION:
        header["modelspec.prediction_type"] = _SPEC_PREDICTION[metadata.prediction_type]
    if metadata.base_architecture in _KOHYA_VERSIONS:
        of_v = metadata.prediction_type == "v_prediction"
        header["ss_base_model_version"] = _KOHYA_VERSIONS[metadata.base_architecture] + (_VERSION_OF_V if of_v else "")
    if layout == "diffusers":
        header |= layouts.diffusers.alpha_metadata(adapter.modules)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is not None:
        header["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch)))
    for key, value in metadata.extra.items():
        full = key if key.startswith("modelspec.") else f"spo.{key}"
        if full in _OUR_KEYS or full in _WRITTEN_KEYS:
            raise AdapterError(f"the fact {key} is written from the adapter itself and cannot be given")
        header[full] = value
    return header


def _peft_config(path: Path) -> dict[str, Any] | None:
    config = path.parent / "adapter_config.json"
    return read_config(config) if config.is_file() else None


def _peak(half: Tensor, name: str) -> float:
    if not half.is_floating_point():
        raise InvalidAdapterError(f"{name}: weights must be floating point, got {half.dtype}")
    half = half.detach()
    # One pass: the largest magnitude is NaN or Inf when any weight is, and 0 when all are.
    peak = float((half if half.element_size() > 1 else half.float()).abs().amax())
    if not math.isfinite(peak):
        raise InvalidAdapterError(f"{name}: the weights hold NaN or Inf")
    return peak


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

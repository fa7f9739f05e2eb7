"""What an adapter gate decides by: the files to choose from, and predictions as those files know them from
diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.common_dit
import folder_paths
import torch
from torch import Tensor

from t2i_spo_plugin.errors import UnreadableAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.gating import AdapterGate, gate_metadata
from t2i_spo_plugin.registry import ADAPTER_GATES as GATES
from t2i_spo_plugin.registry import load_adapter_gate

from . import ADAPTER_GATES
from .patching import architecture


SIZE = "size of the change"
_BUNDLED = {"sticker demo: reader (bundled)": "sticker", "sticker demo: size (bundled)": "sticker-size"}
_TOKENS = "flux-1-dev"
"""Its prediction is a sequence of patches in diffusers, and a map in ComfyUI."""
_ALIKE = (
    "stable-diffusion-v1",
    "stable-diffusion-v2",
    "stable-diffusion-xl-v1-base",
    "stable-diffusion-3",
    _TOKENS,
)
"""Where both programs are known to give the same prediction, which is what a reader has learned from."""


def evidence_names() -> list[str]:
    """What can be chosen: the size, the files in the adapter gate folders, and those that come with the package."""
    files = (name for name in folder_paths.get_filename_list(ADAPTER_GATES) if name.endswith(".safetensors"))
    return [SIZE, *files, *_BUNDLED]


def evidence_file(name: str) -> Path:
    """The file of one of `evidence_names`.

    Raises:
        UnreadableAdapterError: there is none.
    """
    if name in _BUNDLED:
        return GATES.rows[_BUNDLED[name]].path
    path = folder_paths.get_full_path(ADAPTER_GATES, name)
    if path is None:
        raise UnreadableAdapterError(
            f"there is no adapter gate {name!r}; make one for your adapter with spo train-gate, put the file into "
            f"ComfyUI/models/{ADAPTER_GATES} and choose it there, or choose {SIZE!r}"
        )
    return Path(path)


def read_loop(name: str, threshold: float = 0.1, until: float = 0.04) -> AdapterGate:
    """The adapter gate by one of `evidence_names`; `threshold` and `until` are for the size, files have their own.

    Raises:
        AdapterError: there is no such file, or it is none of an adapter gate.
        ConfigError: a threshold or `until` that makes no sense.
    """
    return AdapterGate(threshold, until) if name == SIZE else load_adapter_gate(evidence_file(name))


def evidence_metadata(name: str) -> str:
    """What the file of one of `evidence_names` says of itself, a line to append; empty for the size."""
    if name == SIZE:
        return ""
    metadata = ", ".join(f"{key} {value}" for key, value in gate_metadata(evidence_file(name)).items())
    return f"\n{name} was made for: {metadata or 'not said'}"


def check_evidence(loop: AdapterGate, model: Any) -> None:
    """Refuse a `loop` whose reader cannot judge the predictions of `model`, a ComfyUI base model.

    Raises:
        UnsupportedAdapterError: it is not known that they are those that diffusers gives.
        ConfigError: they have another number of channels.
    """
    if loop.reader is None:
        return
    if architecture(model) not in _ALIKE:
        raise UnsupportedAdapterError(
            f"an adapter gate that was learned is for Stable Diffusion 1, 2, XL and 3 and Flux.1, this model is "
            f"{type(model).__name__}; choose the {SIZE}"
        )
    nothing = as_in_diffusers(model, torch.zeros(1, model.latent_format.latent_channels, 8, 8))
    loop.evidence(nothing, nothing)


def as_in_diffusers(model: Any, prediction: Tensor) -> Tensor:
    """`prediction [B, C, H, W]` of the denoiser of `model` as diffusers' own gives it.

    Of Flux, which sees patches of p x p, these are tokens `[B, H W / p^2, C p^2]`.
    """
    if architecture(model) != _TOKENS:
        return prediction
    size = model.diffusion_model.patch_size
    patches = comfy.ldm.common_dit.pad_to_patch_size(prediction, (size, size))
    patches = patches.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

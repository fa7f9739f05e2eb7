"""Adapter gates to choose from, and predictions as these know them from diffusers."""

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
from t2i_spo_plugin.registry import STICKER, load_adapter_gate

from . import ADAPTER_GATES
from .files import listed
from .patching import architecture


NORM = "norm of the change"
_BUNDLED = {"sticker demo: network (bundled)": STICKER, "sticker demo: norm (bundled)": "sticker-norm"}
_TOKENS = "flux-1-dev"
"""Its prediction is a sequence of patches in diffusers, and a map in ComfyUI."""
_ALIKE = (
    "stable-diffusion-v1",
    "stable-diffusion-v2",
    "stable-diffusion-xl-v1-base",
    "stable-diffusion-3",
    _TOKENS,
)
"""Where both programs are known to give the same prediction, which is what a gate network was trained on."""


def score_names() -> list[str]:
    """Where a gate score can come from: the norm, the files in the adapter gate folders, and the bundled files."""
    files = (name for name in folder_paths.get_filename_list(ADAPTER_GATES) if name.endswith(".safetensors"))
    return [NORM, *files, *_BUNDLED]


def gate_file(name: str) -> Path:
    """The file of one of `score_names`.

    Raises:
        UnreadableAdapterError: there is none.
    """
    if name in _BUNDLED:
        return GATES.rows[_BUNDLED[name]].path
    path = folder_paths.get_full_path(ADAPTER_GATES, listed(name, score_names()))
    if path is None:
        raise UnreadableAdapterError(
            f"there is no adapter gate {name!r}; train one for your adapter with spo train-gate, put the file into "
            f"ComfyUI/models/{ADAPTER_GATES} and choose it there, or choose {NORM!r}"
        )
    return Path(path)


def read_gate(name: str, threshold: float = 0.1, until: float = 0.04) -> AdapterGate:
    """The adapter gate by one of `score_names`; `threshold` and `until` are for the norm, files have their own.

    Raises:
        AdapterError: there is no such file, or it is not an adapter gate.
        ConfigError: a threshold or `until` out of range.
    """
    return AdapterGate(threshold, until) if name == NORM else load_adapter_gate(gate_file(name))


def describe_gate(name: str) -> str:
    """What the file of one of `score_names` says of itself, a line to append; empty for the norm."""
    if name == NORM:
        return ""
    metadata = ", ".join(f"{key} {value}" for key, value in gate_metadata(gate_file(name)).items())
    return f"\n{name} was trained for: {metadata or 'not said'}"


def check_gate(gate: AdapterGate, model: Any) -> None:
    """Refuse a `gate` whose network cannot judge the predictions of `model`, a ComfyUI base model.

    Raises:
        UnsupportedAdapterError: it is not known that they are those that diffusers gives.
        ConfigError: they have another number of channels.
    """
    if gate.network is None:
        return
    if architecture(model) not in _ALIKE:
        raise UnsupportedAdapterError(
            f"an adapter gate with a network is for Stable Diffusion 1, 2, XL and 3 and Flux.1, this model is "
            f"{type(model).__name__}; choose the {NORM}"
        )
    nothing = as_in_diffusers(model, torch.zeros(1, model.latent_format.latent_channels, 8, 8))
    gate.score(nothing, nothing)


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

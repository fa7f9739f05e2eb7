"""What ComfyUI and ai-toolkit name by the model's own code: `diffusion_model.<path>`, `text_encoders.clip_l.…`.

The paths are those that kohya files flatten, so reading is renaming. Understood are the UNets of Stable Diffusion 1,
2 and XL (LDM), and the transformers of `bases` by their own code's names or by diffusers'; the former are also
written without the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from t2i_spo_plugin.errors import UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair
from . import denoiser, kohya, native
from .alphas import configured_alphas
from .diffusers import SUFFIXES


_PREFIXES = {
    "base_model.model.diffusion_model.": "lora_unet_",
    "model.diffusion_model.": "lora_unet_",
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
_PEFT_PREFIX = "base_model.model."


def owns(key: str) -> bool:
    """Whether `key` is a matrix or an alpha under such a name."""
    name = _split(key)[0]
    return bool(name) and (name.startswith(tuple(_PREFIXES)) or denoiser.is_original(name.removeprefix(_PEFT_PREFIX)))


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict[str, LoraPair]:
    """The neutral form; a module without `.alpha` has the alpha of PEFT's `config`, without that its rank.

    Raises:
        UnsupportedAdapterError: a name of another model's code.
        InvalidAdapterError: the matrices do not fit, or a module stands there twice.
    """
    flats = {key: _flat(key) for key in tensors}
    if config is None:
        return kohya.decode(tensors, flats.__getitem__)
    paths = {flats[key][0]: _path(_split(key)[0]) for key in tensors}

    def alphas_of(ranks: Mapping[str, int]) -> dict[str, float]:
        alphas = configured_alphas({paths[flat]: rank for flat, rank in ranks.items()}, config)
        return {flat: alphas[paths[flat]] for flat in ranks}

    return kohya.decode(tensors, flats.__getitem__, alphas_of)


def encode(modules: Mapping[str, LoraPair], architecture: str) -> dict[str, Tensor] | None:
    """The tensors of a file with alphas folded into B, or None where not every module has a name of its own code."""
    names = {name: denoiser.original_name(name, architecture) for name in modules}
    if not all(names.values()):
        return None
    return native.encode({f"diffusion_model.{names[name]}": pair for name, pair in modules.items()})


def _flat(key: str) -> tuple[str, str]:
    """The name and the role of a key, as the kohya layout would have them."""
    name, role = _split(key)
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    path = _path(name).replace(".", "_")
    flat = _PREFIXES.get(prefix, "lora_unet_")
    if flat == "lora_unet_" and not (path.startswith(kohya.UNET_NAMES) or denoiser.owns(path)):
        raise UnsupportedAdapterError(
            f"{quoted(key)} names no module of a model whose own names are known here; convert the file to "
            "diffusers' names first"
        )
    return flat + path, role


def _path(name: str) -> str:
    prefix = next((prefix for prefix in (*_PREFIXES, _PEFT_PREFIX) if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _split(key: str) -> tuple[str, str]:
    suffix = next((suffix for suffix in SUFFIXES if suffix[0] == "." and key.endswith(suffix)), "")
    return (key.removesuffix(suffix), SUFFIXES[suffix]) if suffix else ("", "")

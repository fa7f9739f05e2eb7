"""What ComfyUI and ai-toolkit name by the model's own code: `diffusion_model.<path>`, `text_encoders.clip_l.…`.

The paths are those that kohya files flatten, so reading is renaming. Understood are the UNets of Stable Diffusion 1,
2 and XL (LDM) and Flux, which is also written without the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from t2i_spo_plugin.errors import UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair
from . import flux, kohya
from .diffusers import SUFFIXES


_PREFIXES = {
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
_UNETS = ("input_blocks_", "middle_block_", "output_blocks_", *kohya.LDM_OUTSIDE)


def owns(key: str) -> bool:
    """Whether `key` is a matrix or an alpha under such a name."""
    name = _split(key)[0]
    return bool(name) and (name.startswith(tuple(_PREFIXES)) or flux.owns(name.replace(".", "_")))


def decode(tensors: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """The neutral form; a module without `.alpha` has alpha equal to its rank.

    Raises:
        UnsupportedAdapterError: a name of another model's code.
        InvalidAdapterError: the matrices do not fit, or a module stands there twice.
    """
    return kohya.decode(tensors, _flat)


def _flat(key: str) -> tuple[str, str]:
    """The name and the role of a key, as the kohya layout would have them."""
    name, role = _split(key)
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    path = name.removeprefix(prefix).replace(".", "_")
    flat = _PREFIXES.get(prefix, "lora_unet_")
    if flat == "lora_unet_" and not (path.startswith(_UNETS) or flux.owns(path)):
        raise UnsupportedAdapterError(
            f"{quoted(key)} is named by the code of a model that is not mapped to diffusers' names (mapped are Stable "
            "Diffusion 1, 2 and XL, and Flux); convert the file to diffusers' names first"
        )
    return flat + path, role


def _split(key: str) -> tuple[str, str]:
    suffix = next((suffix for suffix in SUFFIXES if suffix[0] == "." and key.endswith(suffix)), "")
    return (key.removesuffix(suffix), SUFFIXES[suffix]) if suffix else ("", "")

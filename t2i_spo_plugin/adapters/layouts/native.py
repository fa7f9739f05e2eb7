"""The native layout: `<component>.<path>.lora_A.weight` and `.lora_B.weight`, nothing else.

Transformer models (SD3, Flux and later) are read in it by diffusers and by ComfyUI. Neither finds an alpha there, so
writing folds `alpha / rank` into B; reading is the diffusers codec without a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..lora import LoraPair


def encode(modules: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """A native file of the neutral form, computed in float32 and kept in the type of B."""
    tensors: dict[str, Tensor] = {}
    for name, pair in modules.items():
        up = pair.up if pair.scale == 1.0 else (pair.up.float() * pair.scale).to(pair.up.dtype)
        tensors[f"{name}.lora_A.weight"] = pair.down
        tensors[f"{name}.lora_B.weight"] = up
    return tensors

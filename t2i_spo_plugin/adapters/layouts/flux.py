"""Flux by the names of its original code, such as `double_blocks.0.img_attn.qkv`, in diffusers' names.

sd-scripts and ComfyUI name the modules so. Several layers of diffusers are one layer there: its rows are theirs, one
after the other, so that each takes its rows of B and all share A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair


_BLOCK = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_IN_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_IN_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_SHIFT_AND_SCALE = "final_layer_adaLN_modulation_1"
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    _SHIFT_AND_SCALE: "norm_out.linear",
}


def owns(path: str) -> bool:
    """Whether `path`, with underscores for dots, is a module of the original code."""
    return path in _OUTSIDE or _BLOCK.match(path) is not None


def in_diffusers_names(modules: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """`modules` with those that the original code names, `transformer.double_blocks_0_...`, as diffusers names them.

    Raises:
        UnsupportedAdapterError: a block has no such module.
        InvalidAdapterError: a fused layer has other sizes than Flux gives it, or a module is changed under two names.
    """
    renamed: dict[str, LoraPair] = {}
    for name, pair in modules.items():
        path = name.partition(".")[2]
        for target, part in _parts(path, pair).items() if owns(path) else [(name, pair)]:
            if target in renamed:
                raise InvalidAdapterError(f"{target} is changed twice, under two names")
            renamed[target] = part
    return dict(sorted(renamed.items()))


def _parts(path: str, pair: LoraPair) -> dict[str, LoraPair]:
    if path == _SHIFT_AND_SCALE:
        # The original code computes (shift, scale), diffusers (scale, shift).
        pair = LoraPair(pair.down, _swapped(pair.up, path), pair.alpha)
    names = _targets(path)
    if len(names) == 1:
        return {names[0]: pair}
    rows, width = pair.up.shape[0], pair.down.shape[1]
    sizes = [width] * 3 + ([rows - 3 * width] if len(names) == 4 else [])
    if pair.down.ndim != 2 or sum(sizes) != rows or sizes[-1] <= 0:
        raise InvalidAdapterError(
            f"{quoted(path)} changes a weight of {list(pair.shape)}: that is no {len(names)} layers side by side"
        )
    ups = zip(names, pair.up.split(sizes), strict=True)
    return {name: LoraPair(pair.down.clone(), up.clone(), pair.alpha) for name, up in ups}


def _targets(path: str) -> list[str]:
    block = _BLOCK.match(path)
    if block is None:
        return [f"transformer.{_OUTSIDE[path]}"]
    is_double = block[1] == "double"
    inside = (_IN_DOUBLE if is_double else _IN_SINGLE).get(block[3])
    if inside is None:
        raise UnsupportedAdapterError(f"{quoted(path)} names no module of a Flux transformer")
    blocks = "transformer_blocks" if is_double else "single_transformer_blocks"
    return [f"transformer.{blocks}.{block[2]}.{name}" for name in inside]


def _swapped(up: Tensor, path: str) -> Tensor:
    if up.shape[0] % 2:
        raise InvalidAdapterError(f"{quoted(path)} has {up.shape[0]} rows, which are no shift and scale")
    return torch.cat(up.chunk(2)[::-1])

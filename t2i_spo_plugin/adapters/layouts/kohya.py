"""The kohya layout: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

It is the one layout of UNet models that both diffusers and ComfyUI read. Dots are lost in it; reading puts them back
by a list of the names that carry underscores themselves. Block names may be LDM's; those of the transformers of
`bases` stay flat for `denoiser.in_diffusers_names`, be they diffusers' or of the own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair
from . import denoiser
from .base import PairBuilder


PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
"""Component by the beginning of a key; LyCORIS does not name the one model it was made for."""

_SUFFIXES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}

UNET_BEGINNINGS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")

_NAMES_WITH_UNDERSCORES = frozenset(
    "add_embedding add_k_proj add_q_proj add_v_proj class_embedding conv_in conv_out conv_shortcut down_blocks "
    "encoder_hid_proj linear_1 linear_2 mid_block motion_modules out_proj position_embedding proj_in proj_out k_proj "
    "q_proj self_attn temporal_transformer text_model text_projection time_emb_proj time_embedding to_add_out to_k "
    "to_out to_q to_v token_embedding transformer_blocks up_blocks v_proj visual_projection "
    "context_embedder ff_context guidance_embedder norm1_context norm_out pos_embed proj_mlp "
    "single_transformer_blocks text_embedder time_text_embed timestep_embedder x_embedder".split()
)
_LONGEST = max(name.count("_") + 1 for name in _NAMES_WITH_UNDERSCORES)

_LDM_BLOCK = re.compile(r"^(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)$|^(middle_block)_(\d+)_(.+)$")
LDM_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
UNET_NAMES = (*UNET_BEGINNINGS, "input_blocks_", "middle_block_", "output_blocks_", *LDM_OUTSIDE)
"""How flat names of a UNet's modules begin, diffusers' or LDM's."""

_LDM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


def owns(key: str) -> bool:
    """Whether `key` names a matrix or an alpha in this layout."""
    flat, _, suffix = key.partition(".")
    return suffix in _SUFFIXES and flat.startswith(tuple(PREFIXES))


def split(key: str) -> tuple[str, str]:
    """`lora_unet_..._to_q.lora_up.weight` as (`lora_unet_..._to_q`, `up`)."""
    flat, _, suffix = key.partition(".")
    return flat, _SUFFIXES[suffix]


def decode(
    tensors: Mapping[str, Tensor],
    split: Callable[[str], tuple[str, str]] = split,
    alphas_of: Callable[[Mapping[str, int]], Mapping[str, float]] | None = None,
) -> dict[str, LoraPair]:
    """The neutral form of a kohya file; a module without `.alpha` has alpha equal to its rank.

    Args:
        tensors: as the file has them.
        split: flat name and role by key, for files that spell the same names otherwise.
        alphas_of: alphas by flat name, from the ranks, for files that keep them elsewhere.

    Raises:
        UnsupportedAdapterError: a name of no module of a diffusers UNet or of a CLIP text encoder.
        InvalidAdapterError: the matrices do not fit, or a module stands there twice.
    """
    builder = PairBuilder()
    named = {key: split(key) for key in tensors}
    is_unet = all(_is_of_unet(flat) for flat, _ in named.values())
    names = {flat: unflatten(flat, is_unet) for flat, _ in named.values()}
    for key, tensor in tensors.items():
        flat, role = named[key]
        builder.add(names[flat], role, tensor, key)
    if alphas_of is None:
        return builder.build()
    ranks = builder.ranks()
    alphas = alphas_of({flat: ranks[name] for flat, name in names.items() if name in ranks})
    return builder.build({names[flat]: alpha for flat, alpha in alphas.items()})


def _is_of_unet(flat: str) -> bool:
    """Whether it may be a module of a UNet, or is none of a denoiser at all."""
    prefix = next((prefix for prefix in PREFIXES if flat.startswith(prefix)), "")
    if PREFIXES.get(prefix) not in ("unet", ""):
        return PREFIXES.get(prefix) != "transformer"
    return flat.removeprefix(prefix).startswith(UNET_NAMES)


def encode(modules: Mapping[str, LoraPair], two_text_encoders: bool) -> dict[str, Tensor]:
    """A kohya file of the neutral form, alphas kept apart as float32 scalars.

    Raises:
        AdapterError: a module of a component that the layout has no name for.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in modules.items():
        flat = flatten(name, two_text_encoders)
        tensors[f"{flat}.lora_down.weight"] = pair.down
        tensors[f"{flat}.lora_up.weight"] = pair.up
        tensors[f"{flat}.alpha"] = pair.down.new_tensor(pair.alpha, dtype=torch.float32)
    return tensors


def flatten(name: str, two_text_encoders: bool) -> str:
    component, _, path = name.partition(".")
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if two_text_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    if component not in prefixes:
        raise AdapterError(f"{name}: the kohya layout has no name for the component {component}")
    return prefixes[component] + path.replace(".", "_")


def unflatten(flat: str, is_unet: bool = True) -> str:
    """`lora_unet_down_blocks_0_..._to_q` as `unet.down_blocks.0....to_q`.

    Args:
        flat: with its prefix.
        is_unet: False keeps the modules of transformers flat, as `denoiser.in_diffusers_names` takes them.
    """
    prefix = next((prefix for prefix in PREFIXES if flat.startswith(prefix)), None)
    if prefix is None:
        raise UnsupportedAdapterError(f"{quoted(flat)} does not start with any of {', '.join(PREFIXES)}")
    path = flat.removeprefix(prefix)
    if not is_unet and not PREFIXES[prefix].startswith("text_encoder"):
        if denoiser.owns(path):
            return f"transformer.{path}"
        if PREFIXES[prefix] == "unet":
            raise UnsupportedAdapterError(
                f"{quoted(flat)} names no module of a model whose own names are known here; convert the file to "
                "diffusers' names first"
            )
    path = LDM_OUTSIDE.get(path, path)
    component = PREFIXES[prefix] or ("unet" if path.startswith(UNET_BEGINNINGS) else "transformer")
    block = _LDM_BLOCK.match(path)
    if block is not None:
        path = _diffusers_block(block, flat)
    words = path.split("_")
    names = []
    while words:
        length = next(
            (n for n in range(min(_LONGEST, len(words)), 1, -1) if "_".join(words[:n]) in _NAMES_WITH_UNDERSCORES), 1
        )
        names.append("_".join(words[:length]))
        words = words[length:]
    return ".".join([component, *names])


def _diffusers_block(block: re.Match[str], flat: str) -> str:
    """LDM block names (two resnets a block, as in SD and SDXL) in diffusers' names, underscores still in place."""
    if block[5]:
        part, rest = int(block[6]), block[7]
        where = {0: "mid_block_resnets_0", 1: "mid_block_attentions_0", 2: "mid_block_resnets_1"}.get(part)
        is_resnet = part != 1
    else:
        number, part, rest = int(block[2]), int(block[3]), block[4]
        down = block[1] == "input_blocks"
        level, layer = divmod(number - 1 if down else number, 3)
        side = f"{'down' if down else 'up'}_blocks_{level}"
        if down and layer == 2:
            where, rest, is_resnet = f"{side}_downsamplers_0", rest.replace("op", "conv", 1), False
        elif not down and (part == 2 or rest == "conv"):
            where, is_resnet = f"{side}_upsamplers_0", False
        else:
            where = {0: f"{side}_resnets_{layer}", 1: f"{side}_attentions_{layer}"}.get(part)
            is_resnet = part == 0
    if where is None or (is_resnet and rest not in _LDM_RESNET):
        raise UnsupportedAdapterError(f"{quoted(flat)} names no module of a diffusers UNet")
    return f"{where}_{_LDM_RESNET[rest] if is_resnet else rest}"

"""open_clip's checkpoints of CLIP as transformers' CLIP models: the same weights under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from t2i_spo_plugin.errors import UnreadableFileError


_LAYER = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<number>\d+)\.(?P<rest>.+)")
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def transformers_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `CLIPModel` from that of an open_clip `CLIP` with a ViT.

    The attention's one matrix for query, key and value is cut in three, and the projections are transposed.

    Raises:
        UnreadableFileError: a tensor that such a model does not have.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        match = _LAYER.fullmatch(name)
        if name in ("text_projection", "visual.proj"):
            state[f"{'text' if name.startswith('text') else 'visual'}_projection.weight"] = tensor.T
        elif name in _OUTSIDE:
            state[_OUTSIDE[name]] = tensor
        elif match:
            tower = "vision_model" if match["tower"] else "text_model"
            place = f"{tower}.encoder.layers.{match['number']}"
            part, _, kind = match["rest"].rpartition(".")
            if match["rest"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = match["rest"].removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{place}.self_attn.{letter}_proj.{kind}"] = third
            elif part in _IN_LAYER:
                state[f"{place}.{_IN_LAYER[part]}.{kind}"] = tensor
            else:
                raise UnreadableFileError(f"{name} belongs to no CLIP with a ViT, as open_clip names its weights")
        elif name != "attn_mask":
            raise UnreadableFileError(f"{name} belongs to no CLIP with a ViT, as open_clip names its weights")
    return state

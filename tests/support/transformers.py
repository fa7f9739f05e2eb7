"""Tiny random transformers of the bases that trainers write for today, each in its pipeline; nothing else is in it."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .pipelines import fresh


_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, **_HEADS}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zimage": (
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 4, 8],
            "axes_lens": [64, 32, 32],
        },
    ),
    "qwen-image": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            **_HEADS,
        },
    ),
    "flux-2": ("Flux2KleinPipeline", "Flux2Transformer2DModel", {"axes_dims_rope": (4, 4, 4, 4), **_FLUX}),
    "chroma": (
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
            **_FLUX,
        },
    ),
    "krea2": (
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 8),
            **_HEADS,
        },
    ),
    "lumina2": (
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
    ),
    "hi-dream-image": (
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [16, 16],
            "text_emb_dim": 32,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (8, 8),
            "llama_layers": [0, 1],
            **_HEADS,
        },
    ),
    "ernie-image": (
        "ErnieImagePipeline",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 4, 8),
        },
    ),
    "wan": (
        "WanPipeline",
        "WanTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 64,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **_HEADS,
        },
    ),
    "ltxvideo": (
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 16,
            "out_channels": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
            **_HEADS,
        },
    ),
    "cosmos": (
        "AnimaModularPipeline",
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": None,
            **_HEADS,
        },
    ),
    "ideogram4": (
        "Ideogram4Pipeline",
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
            **_HEADS,
        },
    ),
}
"""By architecture: the pipeline's class, the transformer's class and its configuration."""
_BUILT_WHOLE = {"flux-1-dev": "flux", "stable-diffusion-3": "sd3"}
ARCHITECTURES = (*_BUILT_WHOLE, *(name for name in MODELS if name != "ideogram4"))
"""Those whose own names the codecs know; of Ideogram 4 the pipeline's own reader does."""


@cache
def _prototype(architecture: str) -> Any:
    if architecture in _BUILT_WHOLE:
        return fresh(_BUILT_WHOLE[architecture])
    pipeline, model, config = MODELS[architecture]
    if not (hasattr(diffusers, pipeline) and hasattr(diffusers, model)):
        pytest.skip(f"this diffusers has no {pipeline}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = getattr(diffusers, model)(**config).eval()
        if architecture == "cosmos":
            conditioner = diffusers.AnimaTextConditioner(16, 16, 16, 1, 2, target_vocab_size=64).eval()
            pipe = diffusers.AnimaModularPipeline()
            pipe.update_components(transformer=transformer, text_conditioner=conditioner)
            return pipe
    parts = dict.fromkeys(_components(getattr(diffusers, pipeline)))
    return getattr(diffusers, pipeline)(
        **(parts | {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()})
    )


def _components(pipeline: type) -> list[str]:
    """The names of the models, tokenizers and processors that a pipeline is made of."""
    required, optional = pipeline._get_signature_keys(pipeline)
    return sorted(set(required) | {"transformer", "scheduler"})


def base_pipeline(architecture: str) -> Any:
    """A pipeline of one's own whose transformer is of `architecture`; text encoders and VAE are mostly absent."""
    return copy.deepcopy(_prototype(architecture))

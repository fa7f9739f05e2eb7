"""Whole tiny pipelines of the transformer families that can be trained, text encoder and autoencoder included."""

from __future__ import annotations

import copy
import string
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .pipelines import SIZE, _t5, _vae, fresh, t5_tokenizer
from .transformers import MODELS


WIDTH = 16
"""Of the language models' hidden states."""
FAMILIES = ("flux1", "flux2", "zimage", "qwen-image", "chroma", "lumina2")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a chat template that gives the text alone."""
    pieces = [("<pad>", 0.0), ("<unk>", -10.0), *((symbol, -3.0) for symbol in "▁" + string.printable)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=1))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
    made.padding_side = "right"
    return made


def _language(config: str, model: str, layers: int, **options: Any) -> Any:
    """A tiny model of transformers, by the names of its configuration and class."""
    import transformers

    shape = {
        "vocab_size": 128,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return getattr(transformers, model)(getattr(transformers, config)(**(shape | options))).eval()


def _transformer(name: str, **changes: Any) -> Any:
    _, model, config = MODELS[name]
    return getattr(diffusers, model)(**(config | changes)).eval()


def _flux2() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).eval()
    vae.bn.running_mean.copy_(torch.randn(16))
    vae.bn.running_var.copy_(torch.rand(16) + 0.5)
    # The pipeline takes the hidden states of three layers, the last of them the 27th.
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_language("Qwen3Config", "Qwen3ForCausalLM", 27),
        tokenizer=tokenizer(),
        transformer=_transformer("flux-2", joint_attention_dim=3 * WIDTH, guidance_embeds=False),
    )


def _zimage() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift=0.1159),
        text_encoder=_language("Qwen3Config", "Qwen3Model", 2),
        tokenizer=tokenizer(),
        transformer=_transformer("zimage", cap_feat_dim=WIDTH),
    )


def _qwen_image() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 128,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    ).eval()
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer(),
        transformer=_transformer("qwen-image", joint_attention_dim=WIDTH),
    )


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift=0.1159),
        text_encoder=_t5(32),
        tokenizer=t5_tokenizer(),
        transformer=_transformer("chroma"),
    )


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift=0.1159),
        text_encoder=_language("Gemma2Config", "Gemma2Model", 2, query_pre_attn_scalar=8),
        tokenizer=tokenizer(),
        transformer=_transformer("lumina2", cap_feat_dim=WIDTH, axes_lens=(300, 32, 32)),
    )


_BUILT = {"flux2": _flux2, "zimage": _zimage, "qwen-image": _qwen_image, "chroma": _chroma, "lumina2": _lumina2}
_CLASSES = {
    "flux2": "Flux2KleinPipeline",
    "zimage": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline",
    "chroma": "ChromaPipeline",
    "lumina2": "Lumina2Pipeline",
}


@cache
def _prototype(name: str) -> Any:
    if not hasattr(diffusers, _CLASSES[name]):
        pytest.skip(f"this diffusers has no {_CLASSES[name]}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = _BUILT[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_pipeline(name: str) -> Any:
    """A pipeline of one's own of one of `FAMILIES`."""
    return fresh("flux") if name == "flux1" else copy.deepcopy(_prototype(name))

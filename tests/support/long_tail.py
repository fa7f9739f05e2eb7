"""Tiny random pipelines of video, of Kandinsky and the rest of Z-Image's: for the slow tests of `guided_pipelines`.

Most need no autoencoder, since their latents are what the tests look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


Built = tuple[Any, dict[str, Any]]
PROMPTS = 2


def embeddings(width: int, length: int = 8, seed: int = 0, prompts: int = PROMPTS) -> torch.Tensor:
    """Random embeddings `[prompts, length, width]`."""
    return torch.randn(prompts, length, width, generator=torch.Generator().manual_seed(seed))


def guided(channels: int, masks: str = "", **options: Any) -> dict[str, Any]:
    """Embeddings of prompts and of negative prompts, with masks of that name, and further options of a call."""
    call = {"prompt_embeds": embeddings(channels), "negative_prompt_embeds": embeddings(channels, seed=1)} | options
    if masks:
        call |= {prefix + masks: torch.ones(PROMPTS, 8, dtype=torch.long) for prefix in ("", "negative_")}
    return call


def _ltx() -> Built:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
    )
    pipe = diffusers.LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    call = guided(16, "prompt_attention_mask", guidance_scale=3.0, num_frames=9, height=64, width=64)
    return pipe, call


def _cogvideox() -> Built:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=8,
    )
    pipe = diffusers.CogVideoXPipeline(None, None, None, transformer, diffusers.CogVideoXDDIMScheduler())
    return pipe, guided(16, guidance_scale=3.0, num_frames=9, max_sequence_length=8)


def _hunyuan_video() -> Built:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, None, FlowMatchEulerDiscreteScheduler(), None, None)
    pooled = {f"{prefix}pooled_prompt_embeds": embeddings(8, seed=seed)[:, 0] for prefix, seed in _SIGNS}
    return pipe, guided(16, "prompt_attention_mask", true_cfg_scale=3.0, num_frames=9, **pooled)


def _mochi() -> Built:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=8,
    )
    pipe = diffusers.MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    call = guided(16, guidance_scale=3.0, num_frames=7)
    masks = {f"{prefix}prompt_attention_mask": torch.ones(PROMPTS, 8, dtype=torch.bool) for prefix, _ in _SIGNS}
    return pipe, call | masks


def _sana_video() -> Built:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
    )
    pipe = diffusers.SanaVideoPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler())
    call = guided(8, "prompt_attention_mask", guidance_scale=3.0, frames=5, use_resolution_binning=False)
    return pipe, call | {"negative_prompt": None, "height": 32, "width": 32}


def _kandinsky5(kind: str, **options: Any) -> Built:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=32,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        visual_cond="V" in kind,
    )
    with torch.no_grad():
        # Modulations that begin at zero would let nothing through.
        for weight in transformer.parameters():
            if not weight.any():
                weight.normal_(std=0.2)
    pipe = getattr(diffusers, kind)(transformer, None, None, None, None, None, FlowMatchEulerDiscreteScheduler())
    pipe.resolutions = [(16, 16)]
    lengths = torch.tensor([0, 8, 16], dtype=torch.int32)
    call: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": None} | options
    for prefix, seed in _SIGNS:
        call[f"{prefix}prompt_embeds_qwen"] = embeddings(16, seed=seed)
        call[f"{prefix}prompt_embeds_clip"] = embeddings(8, seed=seed)[:, 0]
        call[f"{prefix}prompt_cu_seqlens"] = lengths
    return pipe, call


_SIGNS = (("", 0), ("negative_", 1))

BUILDERS: dict[str, Callable[[], Built]] = {
    "ltx": _ltx,
    "cogvideox": _cogvideox,
    "hunyuan_video": _hunyuan_video,
    "mochi": _mochi,
    "sana_video": _sana_video,
    "kandinsky5_image": lambda: _kandinsky5("Kandinsky5T2IPipeline"),
    "kandinsky5_video": lambda: _kandinsky5("Kandinsky5T2VPipeline", num_frames=5),
}

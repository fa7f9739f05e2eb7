"""Small random models of five families, the same weights for diffusers and for ComfyUI."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from support.pipelines import fresh
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


UNET_FAMILIES = ("sd1", "sdxl")
FAMILIES = (*UNET_FAMILIES, "sd3", "flux")
_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "sample_size": 8,
}
_SHAPE = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
}
"""`_UNET` in the words of ComfyUI."""


@cache
def pipeline(family: str) -> Any:
    """A diffusers pipeline of `family` that nobody may change; ComfyUI knows its denoiser, and text encoders of UNets.

    Besides `FAMILIES` there is `sd2`, which predicts v, and whose denoiser alone is known to ComfyUI.

    The weights are what 16 bits hold, as they are in the files; the arithmetic is in 32 bits.
    """
    pipe = fresh(family, prediction_type="v_prediction") if family == "sd2" else fresh(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family in (*UNET_FAMILIES, "sd2"):
            pipe.unet = _unet(family)
        if family in UNET_FAMILIES:
            pipe.text_encoder = CLIPTextModel(_text_config("quick_gelu")).eval()
        if family == "sdxl":
            pipe.text_encoder_2 = CLIPTextModelWithProjection(_text_config("gelu")).eval()
        if family == "sd3":
            pipe.transformer = SD3Transformer2DModel(
                sample_size=8,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                caption_projection_dim=128,
                joint_attention_dim=4096,
                pooled_projection_dim=2048,
                out_channels=16,
                pos_embed_max_size=16,
            ).eval()
        if family == "flux":
            pipe.transformer = FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=128,
                num_attention_heads=1,
                joint_attention_dim=4096,
                pooled_projection_dim=768,
                guidance_embeds=True,
            ).eval()
    for model in (getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")):
        if model is not None:
            model.half().float()
    return pipe


def write_model(family: str, models: Path) -> str:
    """Write the model of `family` below ComfyUI's folder `models`, and return the file's name.

    Stable Diffusion becomes a checkpoint with text encoders and a small random autoencoder; SD3 and Flux become
    diffusion models in the layout of diffusers.
    """
    pipe, name = pipeline(family), f"miniature-{family}.safetensors"
    if family in UNET_FAMILIES:
        folder, tensors = models / "checkpoints", _checkpoint(family, pipe)
    else:
        folder, tensors = models / "diffusion_models", pipe.transformer.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, folder / name)
    return name


def load_transformer(family: str) -> Any:
    """SD3 or Flux as a MODEL."""
    return _load(pipeline(family).transformer.state_dict())


def load_unet(family: str) -> Any:
    """A UNet as a MODEL, without its text encoder; the test nodes have to be loaded."""
    return _load(_of_ldm(pipeline(family).unet))


def _load(weights: dict[str, torch.Tensor]) -> Any:
    """ComfyUI changes the weights that it converts, so it is given copies."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict({name: weight.clone() for name, weight in weights.items()})


def _of_ldm(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights of `unet` by the names that they have in checkpoints."""
    from comfy.utils import unet_to_diffusers

    names = unet_to_diffusers(_SHAPE)
    return {f"model.diffusion_model.{names[key]}": value for key, value in unet.state_dict().items()}


def _checkpoint(family: str, pipe: Any) -> dict[str, torch.Tensor]:
    from comfy.taesd.taesd import TAESD

    tensors = _of_ldm(pipe.unet)
    texts = {"cond_stage_model.": pipe.text_encoder}
    if family == "sdxl":
        texts = {"conditioner.clip_l.": pipe.text_encoder, "conditioner.clip_g.": pipe.text_encoder_2}
    for prefix, model in texts.items():
        for key, value in model.state_dict().items():
            inner = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
            tensors[f"{prefix}transformer.{inner}"] = value
    generator = torch.Generator().manual_seed(0)
    for key, value in TAESD().state_dict().items():
        weight = torch.zeros_like(value)
        if value.dim() == 4:
            weight = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        tensors[f"first_stage_model.{key}"] = torch.ones_like(value) if key == "vae_scale" else weight
    return tensors


def _unet(family: str) -> UNet2DConditionModel:
    if family == "sd1":
        return UNet2DConditionModel(**_UNET, attention_head_dim=8, cross_attention_dim=32).eval()
    if family == "sd2":
        heads = {"attention_head_dim": (2, 4), "use_linear_projection": True}
        return UNet2DConditionModel(**_UNET, **heads, cross_attention_dim=1024).eval()
    return UNet2DConditionModel(
        **_UNET,
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1568,
    ).eval()


def _text_config(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
    )

"""Tiny random pipelines beyond the four families, called with embeddings: no text encoder, no decoding.

Each builder gives a pipeline and the options of a call on two prompts, whose embeddings differ from the negative ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from . import long_tail
from .long_tail import PROMPTS, guided
from .pipelines import fresh


SIZE = 16


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        shift_factor=0.1,
    ).eval()


def _cogview4() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    pipe = diffusers.CogView4Pipeline(None, None, _vae(4), transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, guided(32, guidance_scale=3.0)


def _z_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        # Left empty by the model, to be overwritten by a checkpoint.
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipe = diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(), _vae(4), None, None, transformer)
    call = guided(16, guidance_scale=3.0)
    return pipe, {key: list(value) if isinstance(value, torch.Tensor) else value for key, value in call.items()}


def _z_image_controlnet(kind: str, channels: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = _z_image()
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    pipe = getattr(diffusers, kind)(**pipe.components, controlnet=controlnet)
    return pipe, call | {"control_image": _image()} | options


def _z_image_omni() -> tuple[Any, dict[str, Any]]:
    pipe, call = _z_image()
    pipe = diffusers.ZImageOmniPipeline(**pipe.components, siglip=None, siglip_processor=None)
    # A list of texts around the images of each prompt; without images there is one.
    return pipe, {key: [[one] for one in value] if isinstance(value, list) else value for key, value in call.items()}


def _lumina2() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), _vae(4), None, None)
    return pipe, guided(32, "prompt_attention_mask", guidance_scale=3.0)


def _aura_flow() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(None, None, _vae(4), transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, guided(32, "prompt_attention_mask", guidance_scale=3.0)


def _qwen_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    return pipe, guided(16, "prompt_embeds_mask", true_cfg_scale=3.0)


def _chroma() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(FlowMatchEulerDiscreteScheduler(), _vae(4), None, None, transformer)
    masks = {key: torch.ones(PROMPTS, 8) for key in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, guided(32, guidance_scale=3.0, **masks)


def _sana() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    pipe = diffusers.SanaPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, guided(
        16,
        "prompt_attention_mask",
        guidance_scale=3.0,
        use_resolution_binning=False,
        negative_prompt=None,
        height=32,
        width=32,
    )


def _wan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = diffusers.WanPipeline(
        None,
        None,
        vae,
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer,
    )
    return pipe, guided(16, guidance_scale=3.0, num_frames=1)


def _instruct_pix2pix() -> tuple[Any, dict[str, Any]]:
    base = fresh("sd1")
    unet = diffusers.UNet2DConditionModel.from_config(base.unet.config, in_channels=8).eval()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        base.vae,
        base.text_encoder,
        base.tokenizer,
        unet,
        base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt": ["a knife", "a sunny street"], "image": _image()}


def _image() -> torch.Tensor:
    return torch.rand(PROMPTS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def _derived(base: Callable[[], tuple[Any, dict[str, Any]]], kind: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Another pipeline of the models of `base`."""
    pipe, options = base()
    return getattr(diffusers, kind)(**pipe.components), options | more


def _of_family(family: str, kind: str = "", **more: Any) -> tuple[Any, dict[str, Any]]:
    """One of the four families, or another pipeline of its models, which is given texts."""
    pipe = fresh(family)
    if kind:
        given = pipe.components | {"requires_safety_checker": False}
        known = inspect.signature(getattr(diffusers, kind).__init__).parameters
        pipe = getattr(diffusers, kind)(**{key: value for key, value in given.items() if key in known})
    if hasattr(pipe, "tokenizer_2"):
        more = {"max_sequence_length": 16} | more
    known = inspect.signature(type(pipe).__call__).parameters
    return pipe, {"prompt": ["a knife", "a sunny street"]} | {key: more[key] for key in more if key in known}


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd1": lambda: _of_family("sd1"),
    "sdxl": lambda: _of_family("sdxl"),
    "sd3": lambda: _of_family("sd3"),
    "flux": lambda: _of_family("flux", true_cfg_scale=3.0, negative_prompt=["blurred", "dull"]),
    "sd1_pag": lambda: _of_family("sd1", "StableDiffusionPAGPipeline", pag_applied_layers=["mid"]),
    "sdxl_pag": lambda: _of_family("sdxl", "StableDiffusionXLPAGPipeline"),
    "sd3_pag": lambda: _of_family("sd3", "StableDiffusion3PAGPipeline"),
    "sd1_img2img": lambda: _of_family("sd1", "StableDiffusionImg2ImgPipeline", image=_image(), strength=1.0),
    "sdxl_img2img": lambda: _of_family("sdxl", "StableDiffusionXLImg2ImgPipeline", image=_image(), strength=1.0),
    "sd3_img2img": lambda: _of_family("sd3", "StableDiffusion3Img2ImgPipeline", image=_image(), strength=1.0),
    "z_image_img2img": lambda: _derived(_z_image, "ZImageImg2ImgPipeline", image=_image(), strength=1.0),
    "z_image_inpaint": lambda: _derived(
        _z_image, "ZImageInpaintPipeline", image=_image(), mask_image=_image()[:, :1].round(), strength=1.0
    ),
    "z_image_controlnet": lambda: _z_image_controlnet("ZImageControlNetPipeline", 4),
    "z_image_controlnet_inpaint": lambda: _z_image_controlnet(
        "ZImageControlNetInpaintPipeline", 9, image=_image(), mask_image=_image()[:, :1].round()
    ),
    "z_image_omni": _z_image_omni,
    "chroma_img2img": lambda: _derived(_chroma, "ChromaImg2ImgPipeline", image=_image(), strength=1.0),
    "qwen_image_img2img": lambda: _derived(_qwen_image, "QwenImageImg2ImgPipeline", image=_image(), strength=1.0),
    "cogview4": _cogview4,
    "z_image": _z_image,
    "lumina2": _lumina2,
    "aura_flow": _aura_flow,
    "qwen_image": _qwen_image,
    "chroma": _chroma,
    "sana": _sana,
    "wan": _wan,
    "instruct_pix2pix": _instruct_pix2pix,
    **long_tail.BUILDERS,
}


USUAL = ("sd1", "flux", "instruct_pix2pix", "cogview4", "z_image", "lumina2", "aura_flow", "qwen_image", "sana", "wan")
"""One of each way to count steps and to order a batch; the others are for the slow tests."""
CASES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS]


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline and the options of a call on `PROMPTS` prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, options = BUILDERS[name]()
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


def call(pipe: Any, options: dict[str, Any], **more: Any) -> Any:
    """The latents that `pipe` gives in four steps."""
    defaults = {"num_inference_steps": 4, "height": SIZE, "width": SIZE, "output_type": "latent"}
    known = inspect.signature(type(pipe).__call__).parameters
    given = {key: value for key, value in defaults.items() if key in known} | options | more
    return pipe(generator=torch.Generator().manual_seed(0), **given)

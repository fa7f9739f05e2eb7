"""Tiny random pipelines of four families, built in memory: real models, real schedulers, no download."""

from __future__ import annotations

import copy
import inspect
import string
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    T5TokenizerFast,
)

from t2i_spo_plugin.adapters import Adapter, LoraPair, canonical
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.pipelines.architecture import lora_components
from t2i_spo_plugin.pipelines.loading import adapter_metadata
from t2i_spo_plugin.sticker.build.tokenizer import clip_tokenizer


FAMILIES = ("sd1", "sdxl", "sd3", "flux")
TWO_FAMILIES = ("sd1", "flux", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sdxl", "sd3")))
"""For tests of many cases: one family of either kind, and the others among the slow tests."""
needs_metadata = pytest.mark.skipif(
    "unet_lora_adapter_metadata" not in inspect.signature(StableDiffusionPipeline.save_lora_weights).parameters,
    reason="this diffusers keeps no alphas in a file's header",
)
STEPS = 2
SIZE = 16


def tiny_pipeline(family: str, seed: int = 0, width: int = 32, prediction_type: str = "epsilon") -> DiffusionPipeline:
    """A fresh tiny pipeline of one of `FAMILIES` or of `sd2`, whose text is 1024 wide.

    `seed` draws the weights; `width` sets the channels of the SD1 and SD2 UNets, `prediction_type` what they predict.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family in ("sd1", "sd2"):
            pipe = _sd(width, prediction_type, 32 if family == "sd1" else 1024)
        else:
            pipe = {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | list[str] = "a sunny street", seed: int = 0, **options: Any) -> Any:
    """The output of `pipe`, called the same way every time; numpy images unless `options` say otherwise."""
    defaults = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np"}
    if hasattr(pipe, "text_encoder_3") or type(pipe).__name__.startswith("Flux"):
        defaults["max_sequence_length"] = 16
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **(defaults | options))


def images(pipe: Any, **options: Any) -> torch.Tensor:
    """The drawn images `[B, H, W, 3]`, for comparison bit for bit."""
    return torch.from_numpy(draw(pipe, **options).images)


def denoiser(pipe: Any) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@cache
def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    symbols = [chr(code) for code in range(33, 127)]
    vocab = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(vocab)}
    return clip_tokenizer(numbers, [], model_max_length=16, pad_token=pad_token)


@cache
def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((symbol, -3.0) for symbol in "▁" + string.printable)]
    if "vocab" in inspect.signature(T5Tokenizer).parameters:
        return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=16)


def _clip_config(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def _vae(latent_channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        shift_factor=shift,
        sample_size=SIZE,
    ).eval()


def _sd(width: int, prediction_type: str, text_width: int) -> StableDiffusionPipeline:
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        use_linear_projection=text_width == 1024,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, text_width)).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer("!")
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=SIZE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd3() -> StableDiffusion3Pipeline:
    tokenizer = _clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=SIZE,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(4, shift=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
        text_encoder_3=_t5(64),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> FluxPipeline:
    tokenizer = _clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return FluxPipeline(
        vae=_vae(4, shift=0.0609),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        text_encoder_2=_t5(32),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


@cache
def _prototype(family: str, width: int, prediction_type: str) -> DiffusionPipeline:
    return tiny_pipeline(family, width=width, prediction_type=prediction_type)


def fresh(family: str, width: int = 32, prediction_type: str = "epsilon") -> Any:
    """A pipeline of one's own: a copy of the one that is built once a session and never called."""
    return copy.deepcopy(_prototype(family, width, prediction_type))


@cache
def base_image(family: str) -> torch.Tensor:
    """What `fresh(family)` draws."""
    return images(fresh(family))


def random_adapter(
    pipe: Any,
    rank: int = 4,
    alpha: float = 2.0,
    seed: int = 0,
    components: tuple[str, ...] = ("unet", "transformer"),
    layers: tuple[str, ...] = ("to_q", "to_v", "to_out.0", "q_proj", "fc1", "to_query"),
    dtype: torch.dtype = torch.float32,
    **metadata: str,
) -> Adapter:
    """A random adapter for `pipe`, strong enough to change its images."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for component, model in lora_components(pipe).items():
        for path, (out, *inner) in weight_shapes(model).items():
            if component in components and path.endswith(layers):
                down = torch.randn(rank, *inner, generator=generator)
                up = torch.randn(out, rank, *(1,) * (len(inner) - 1), generator=generator)
                name = canonical(f"{component}.{path}")
                modules[name] = LoraPair((0.4 * down).to(dtype), (0.4 * up).to(dtype), alpha)
    return Adapter(modules, adapter_metadata(pipe, **metadata))

"""The node that loads the bundled sticker world as an ordinary MODEL, CLIP and VAE of ComfyUI.

It is a small Stable Diffusion whose sizes ComfyUI's own loader does not look for. Everything is built of ComfyUI's
classes, and nothing is registered or replaced in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.sticker import pipeline_path

from .tiny_autoencoder import factor, tiny_autoencoder


_LEAST_ALPHA = 4.8973451890853435e-08
"""What ComfyUI takes for a terminal signal of zero, whose sigma would be infinite."""


class StickerDemoLoader(io.ComfyNode):
    """The bundled demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_StickerDemoLoader",
            display_name="Sticker Demo Loader",
            category="SPO/adapters",
            description=(
                "Loads the small demo model that comes with the package (128 x 128 images of emoji stickers), to try "
                "safety adapters without any download. Use an empty latent of 128 x 128, cfg 3, 25 steps, euler or "
                "ddim with the sgm_uniform scheduler."
            ),
            search_aliases=["sticker world", "demo checkpoint", "load checkpoint", "spo"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The denoiser of the sticker world, in float32."),
                io.Clip.Output("clip", tooltip="Its text encoder, with a vocabulary of about 20000 tokens."),
                io.Vae.Output("vae", tooltip="Its autoencoder: 16 channels, images 16 times as large as the latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folder = pipeline_path()
        return io.NodeOutput(load_model(folder), load_clip(folder), load_vae(folder))


class StickerLatents(comfy.latent_formats.LatentFormat):
    """Latents of the sticker world's autoencoder."""

    def __init__(self, channels: int, downscale: int, scale_factor: float) -> None:
        self.latent_channels, self.spacial_downscale_ratio = channels, downscale
        self.scale_factor = scale_factor


class StickerModel(comfy.supported_models.SD15):
    """The model configuration: Stable Diffusion 1 in everything but its sizes and what it predicts."""

    unet_extra_config: dict[str, Any] = {}

    def __init__(self, unet_config: dict[str, Any], vae_config: dict[str, Any]) -> None:
        self.latent_format = partial(
            StickerLatents, vae_config["latent_channels"], factor(vae_config), vae_config["scaling_factor"]
        )
        super().__init__(unet_config)

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False


class _Multiple(float):
    """A channel multiplier that need not be whole, though its products are."""

    def __mul__(self, other: float) -> int:
        return round(float(self) * other)

    __rmul__ = __mul__


class StickerTokenizer(comfy.sd1_clip.SDTokenizer):
    """The sticker world's own tokens, read from its tokenizer.json."""

    def __init__(self, folder: Path, length: int, width: int, embedding_directory: Any, tokenizer_data: Any) -> None:
        super().__init__(
            str(folder),
            max_length=length,
            embedding_directory=embedding_directory,
            embedding_size=width,
            tokenizer_class=PreTrainedTokenizerFast,
            tokenizer_data=tokenizer_data,
            tokenizer_args={"local_files_only": True},
        )


class _SmallVocabulary(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with as many tokens as the configuration says."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings.token_embedding = operations.Embedding(
            config["vocab_size"], config["hidden_size"], dtype=dtype, device=device
        )


class StickerTextModel(comfy.sd1_clip.SDClipModel):
    """The sticker world's CLIP text encoder."""

    def __init__(self, config: dict[str, Any], device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
        end = config["eos_token_id"]
        super().__init__(
            device=device,
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            dtype=dtype,
            model_class=_SmallVocabulary,
            special_tokens={"start": config["bos_token_id"], "end": end, "pad": config["pad_token_id"]},
            return_projected_pooled=False,
            model_options=model_options,
        )


def load_model(folder: Path) -> Any:
    """The MODEL of the pipeline in `folder`."""
    config = _config(folder / "unet")
    model_config = StickerModel(_unet_config(config), _config(folder / "vae"))
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device=offload)
    for module in model.diffusion_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
    model.model_sampling.set_sigmas(zero_terminal_sigmas(_config(folder / "scheduler", "scheduler_config.json")))
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    weights = _weights(folder / "unet" / "diffusion_pytorch_model.safetensors")
    lost = sorted(weights.keys() - names.keys())
    if lost:
        raise SPOError(f"ComfyUI has no name for {len(lost)} weights of the sticker world, such as {lost[0]}")
    model.diffusion_model.load_state_dict({names[name]: weight for name, weight in weights.items()})
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)


def load_clip(folder: Path) -> Any:
    """The CLIP of the pipeline in `folder`."""
    config = _config(folder / "text_encoder")
    length, width = config["max_position_embeddings"], config["hidden_size"]
    tokenizer = partial(
        comfy.sd1_clip.SD1Tokenizer, tokenizer=partial(StickerTokenizer, folder / "tokenizer", length, width)
    )
    encoder = partial(comfy.sd1_clip.SD1ClipModel, clip_model=partial(StickerTextModel, config))
    prefix = "clip_l.transformer."
    weights = {
        prefix + "text_model." + name.removeprefix("text_model."): weight
        for name, weight in _weights(folder / "text_encoder" / "model.safetensors").items()
    }
    # Stable Diffusion 1 has no projection and does not use it; ComfyUI's layer would be left without numbers.
    weights[prefix + "text_projection.weight"] = torch.eye(width)
    weights["clip_l.logit_scale"] = torch.zeros(())
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    return comfy.sd.CLIP(
        target,
        parameters=sum(weight.numel() for weight in weights.values()),
        state_dict=weights,
        model_options={"dtype": torch.float32},
    )


def load_vae(folder: Path) -> Any:
    """The VAE of the pipeline in `folder`: ComfyUI's TAESD with encoder and decoder of other sizes."""
    config = _config(folder / "vae")
    encoder, decoder = tiny_autoencoder(config, _weights(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    # Made of ComfyUI's own weights first, for it reads the kind of an autoencoder off them.
    vae = comfy.sd.VAE(
        sd=comfy.taesd.taesd.TAESD(latent_channels=config["latent_channels"]).state_dict(), dtype=torch.float32
    )
    stage = vae.first_stage_model
    stage.taesd_encoder, stage.taesd_decoder = encoder.eval(), decoder.eval()
    vae.downscale_ratio = vae.upscale_ratio = factor(config)
    return vae


def zero_terminal_sigmas(config: dict[str, Any]) -> Tensor:
    """The sigmas `[steps]` of a squared-cosine schedule rescaled to end in pure noise, as diffusers computes them."""
    if config["beta_schedule"] != "squaredcos_cap_v2" or not config["rescale_betas_zero_snr"]:
        raise SPOError("the sticker world's noise schedule is not the one that this loader was made for")
    steps = config["num_train_timesteps"]
    bars = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    betas = torch.tensor([min(1 - after / before, 0.999) for before, after in zip(bars, bars[1:], strict=False)])
    roots = (1.0 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    alphas = roots.square().double().clamp(min=_LEAST_ALPHA)
    return ((1.0 - alphas) / alphas).sqrt()


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text(encoding="utf-8")))


def _weights(path: Path) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in load_file(path).items()}


def _unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's description of a diffusers UNet with one resnet a level."""
    width, levels = config["block_out_channels"][0], len(config["block_out_channels"])
    resnets = config["layers_per_block"]

    def depth(kinds: Sequence[str], layers: int) -> list[int]:
        return [int(kind.startswith("CrossAttn")) for kind in kinds for _ in range(layers)]

    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": width,
        "channel_mult": [_Multiple(channels / width) for channels in config["block_out_channels"]],
        "num_res_blocks": [resnets] * levels,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "transformer_depth": depth(config["down_block_types"], resnets),
        "transformer_depth_middle": 1,
        "transformer_depth_output": depth(config["up_block_types"], resnets + 1)[::-1],
        "context_dim": config["cross_attention_dim"],
        # By its name it is the width of a head; diffusers takes it for their number in this kind of UNet.
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }

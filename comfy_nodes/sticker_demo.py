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


_TAESD_BLOCKS = ((1, 3, 3, 3), (3, 3, 3, 1))
"""Blocks a level of the encoder and the decoder that ComfyUI knows."""
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
                "Loads the small demo model that comes with the package (64 x 64 images of emoji stickers), to try "
                "safety adapters without any download. Use an empty latent of 64 x 64, cfg 3, 25 steps, euler or ddim "
                "with the sgm_uniform scheduler."
            ),
            search_aliases=["sticker world", "demo checkpoint", "load checkpoint", "spo"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The denoiser of the sticker world, in float32."),
                io.Clip.Output("clip", tooltip="Its text encoder, with a vocabulary of about 2000 tokens."),
                io.Vae.Output("vae", tooltip="Its autoencoder: 8 channels, images 8 times as large as the latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folder = pipeline_path()
        return io.NodeOutput(load_model(folder), load_clip(folder), load_vae(folder))


class StickerLatents(comfy.latent_formats.LatentFormat):
    """Latents of the sticker world's autoencoder."""

    latent_channels = 8

    def __init__(self, scale_factor: float) -> None:
        self.scale_factor = scale_factor


class StickerModel(comfy.supported_models.SD15):
    """The model configuration: Stable Diffusion 1 in everything but its sizes and what it predicts."""

    unet_extra_config: dict[str, Any] = {}

    def __init__(self, unet_config: dict[str, Any], scale_factor: float) -> None:
        self.latent_format = partial(StickerLatents, scale_factor)
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
    model_config = StickerModel(_unet_config(config), _config(folder / "vae")["scaling_factor"])
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
    """The VAE of the pipeline in `folder`."""
    config = _config(folder / "vae")
    weights = _weights(folder / "vae" / "diffusion_pytorch_model.safetensors")
    blocks = (config["num_encoder_blocks"], config["num_decoder_blocks"])
    return comfy.sd.VAE(sd=as_taesd(weights, blocks), dtype=torch.float32)


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


def as_taesd(weights: dict[str, Tensor], blocks: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """A narrower autoencoder of the same kind in the one size that ComfyUI knows, without changing what it computes.

    Channels and blocks that are too many get weights of zero: nothing is normalised, so they add nothing. A block of
    zeros still cuts off what is below zero; after the encoder's first layer, which no block of its own follows, the
    channels are therefore there twice, with both signs.

    Args:
        weights: of a diffusers AutoencoderTiny.
        blocks: how many it has on each level of the encoder, none on the first, and of the decoder.
    """
    channels = weights["decoder.layers.0.weight"].shape[1]
    sizes = comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict()
    found = {name: torch.zeros(size.shape) for name, size in sizes.items()}
    found["vae_scale"] += 1.0
    for side, have, room in zip(("encoder", "decoder"), blocks, _TAESD_BLOCKS, strict=True):
        clamp = int(side == "decoder")
        sources = _convolutions(have, side == "decoder")
        for place, (number, inner) in _convolutions(room, side == "decoder").items():
            if place not in sources:
                continue
            source, layer = sources[place]
            for kind in ("weight", "bias"):
                weight = weights.get(f"{side}.layers.{source}{layer}.{kind}")
                if weight is not None:
                    corner = tuple(slice(size) for size in weight.shape)
                    found[f"taesd_{side}.{number + clamp}{inner}.{kind}"][corner] = weight
    width = weights["encoder.layers.0.weight"].shape[0]
    for name in ("taesd_encoder.0.weight", "taesd_encoder.0.bias"):
        found[name][width : 2 * width] = -found[name][:width]
    following = found["taesd_encoder.2.weight"]
    following[:, width : 2 * width] = -following[:, :width]
    return found


def _convolutions(blocks: Sequence[int], decoder: bool) -> dict[tuple[int, int, int], tuple[int, str]]:
    """Where the convolutions of an encoder or decoder stand in its sequence of layers: number, and name in a block.

    By level, block (0 is the convolution that a level begins with) and convolution of the block. The first one of a
    decoder is followed by an activation, and each but the last level by an upsampling.
    """
    found: dict[tuple[int, int, int], tuple[int, str]] = {}
    number = 0
    for level, count in enumerate(blocks):
        found[level, 0, 0] = (number, "")
        number += 2 if decoder and level == 0 else 1
        for block in range(1, count + 1):
            found |= {(level, block, layer): (number, f".conv.{layer}") for layer in (0, 2, 4)}
            number += 1
        number += int(decoder and level < len(blocks) - 1)
    found[len(blocks), 0, 0] = (number, "")
    return found


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

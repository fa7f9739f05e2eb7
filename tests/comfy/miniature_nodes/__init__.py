"""A custom node folder for tests alone: models that the stock loaders accept, and nodes that give and keep values.

ComfyUI tells model families apart by exact widths. Here it learns more: Stable Diffusion 1, 2 and XL in the sizes of
`miniature.py`, and Z-Image in that of `own_models.py`. All the rest of them is ComfyUI's own code. Text encoders of
billions of weights are stood in for by one that makes numbers of the right widths from the tokens; files that hold
nothing but `miniature` ask for it.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

import comfy.model_base
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.z_image
import comfy.utils
import torch


TEXT_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
SIZES = {"clip_l_model_config": TEXT_ENCODER, "clip_g_model_config": {**TEXT_ENCODER, "projection_dim": 32}}
RECORDED: dict[str, list[object]] = {}
"""What the nodes TestRecord have been given, by the name in their inputs."""
GIVEN: dict[str, object] = {}
"""What the nodes TestImages hand on, by the name in their inputs."""


class MiniatureSD1TextEncoder(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=MappingProxyType({})):
        super().__init__(device=device, dtype=dtype, model_options={**model_options, **SIZES})


class MiniatureSDXLTextEncoder(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=MappingProxyType({})):
        super().__init__(device=device, dtype=dtype, model_options={**model_options, **SIZES})


class MiniatureSD1(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 32, "model_channels": 32}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, MiniatureSD1TextEncoder)


class MiniatureSD2(comfy.supported_models.SD20):
    unet_config = {**comfy.supported_models.SD20.unet_config, "model_channels": 32}
    unet_extra_config = {**comfy.supported_models.SD20.unet_extra_config, "num_head_channels": 16}

    def model_type(self, state_dict, prefix=""):
        # ComfyUI looks at a layer that is not in here.
        return comfy.model_base.ModelType.V_PREDICTION


class MiniatureSDXL(comfy.supported_models.SDXL):
    unet_config = {
        **comfy.supported_models.SDXL.unet_config,
        "context_dim": 64,
        "model_channels": 32,
        "transformer_depth": [0, 1],
        "adm_in_channels": 1568,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 16, "num_classes": "sequential"}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, MiniatureSDXLTextEncoder)

    def process_clip_state_dict(self, state_dict):
        return comfy.utils.state_dict_prefix_replace(state_dict, {"conditioner.": ""}, filter_keys=True)


class MiniatureZImage(comfy.supported_models.ZImage):
    unet_config = {"image_model": "lumina2", "dim": 256}


class StandInTextEncoder(torch.nn.Module):
    """Random numbers that depend on the tokens alone: widths of the output and of the pooled one."""

    def __init__(self, widths, device="cpu", dtype=None, model_options=MappingProxyType({})):
        super().__init__()
        self.widths, self.dtypes = widths, {torch.float32}
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def set_clip_options(self, options):
        pass

    def reset_clip_options(self):
        pass

    def load_sd(self, weights):
        return [], []

    def encode_token_weights(self, tokens):
        numbers = [token for part in tokens.values() for token, *_ in part[0] if isinstance(token, int)]
        longest = max(len(part[0]) for part in tokens.values())
        generator = torch.Generator().manual_seed(sum((place + 1) * token for place, token in enumerate(numbers)))
        wide, pooled = self.widths
        output = 0.1 * torch.randn(1, longest, wide, generator=generator)
        return output, 0.1 * torch.randn(1, pooled, generator=generator) if pooled else None


def detect(state_dict, key_prefix, *rest, **options):
    found = _detect(state_dict, key_prefix, *rest, **options)
    if found and found.get("image_model") == "lumina2" and found["dim"] == MiniatureZImage.unet_config["dim"]:
        found |= {"n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512]}
        found |= {
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
        }
    return found


def load_clip(ckpt_paths, *rest, **options):
    if any(set(comfy.utils.load_torch_file(path, safe_load=True)) != {"miniature"} for path in ckpt_paths):
        return _load_clip(ckpt_paths, *rest, **options)
    is_pair = len(ckpt_paths) == 2
    tokenizer = comfy.text_encoders.flux.FluxTokenizer if is_pair else comfy.text_encoders.z_image.ZImageTokenizer
    encoder = partial(StandInTextEncoder, (4096, 768) if is_pair else (2560, 0))
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    return comfy.sd.CLIP(target, parameters=1, state_dict={"miniature": torch.zeros(1)})


class _Anything(str):
    def __ne__(self, other):
        return False


class TestRecord:
    """Keeps whatever it is given, a list of one value unless the output is a list."""

    CATEGORY = "tests"
    FUNCTION = "record"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (_Anything("*"),), "name": ("STRING", {"default": ""})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def record(self, value, name):
        RECORDED[name[0]] = value
        return {}


class TestImages:
    """Hands on images as they are, as a stock node would."""

    CATEGORY = "tests"
    FUNCTION = "give"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {"default": "images"})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def give(self, name):
        return (GIVEN[name],)


if MiniatureSD1 not in comfy.supported_models.models:
    comfy.supported_models.models += [MiniatureSD1, MiniatureSD2, MiniatureSDXL]
    # Before Lumina 2, which would take it for its own.
    comfy.supported_models.models.insert(0, MiniatureZImage)
    _detect, comfy.model_detection.detect_unet_config = comfy.model_detection.detect_unet_config, detect
    _load_clip, comfy.sd.load_clip = comfy.sd.load_clip, load_clip
NODE_CLASS_MAPPINGS = {"TestImages": TestImages, "TestRecord": TestRecord}

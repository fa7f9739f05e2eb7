"""A custom node folder for tests alone: models that the stock loaders accept, and nodes that give and keep values.

ComfyUI tells model families apart by exact widths. Here it learns three more: Stable Diffusion 1, 2 and XL in the
sizes of `miniature.py`. All the rest of them is ComfyUI's own code.
"""

from __future__ import annotations

from types import MappingProxyType

import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils


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
NODE_CLASS_MAPPINGS = {"TestImages": TestImages, "TestRecord": TestRecord}

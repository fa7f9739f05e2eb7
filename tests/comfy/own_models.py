"""Miniature models under the file names that the examples for one's own checkpoint ask for; see `examples.OWN_FILES`.

Random and small, but of the real classes: ComfyUI's own loaders read them. Only text encoders too large for a test are
stood in for, by `miniature_nodes`.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from miniature import pipeline, write_model
from safetensors.torch import save_file
from support.pipelines import random_adapter

from examples import OWN_FILES, PHOTO, Example
from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, write_adapter
from t2i_spo_plugin.cost.vision import VisionCostModel, load_cost_model
from t2i_spo_plugin.sticker import pipeline_path


LOADERS = {"CheckpointLoaderSimple", "UNETLoader"}
_Z_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 2560,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "qk_norm": True,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}


def is_own(example: Example) -> bool:
    """Whether it runs on a checkpoint of one's own."""
    return any(node["type"] in LOADERS for row in example.rows for column in row for node in column)


def with_own_files(base: Path) -> Path:
    """Write all of `OWN_FILES`, and the cost model for photographs, below a base directory of ComfyUI."""
    models = base / "models"
    for family, kind in (("sd1", "sd15"), ("sdxl", "sdxl"), ("flux", "flux")):
        written = write_model(family, models)
        folder, name = OWN_FILES[kind]
        shutil.copy(models / folder / written, models / folder / name)  # under both names, for other tests
        adapter = random_adapter(pipeline(family), components=("unet", "transformer"))
        write_adapter(adapter, _path(models, f"{kind} adapter"))
    texts = random_adapter(pipeline("sd1"), components=("unet", "text_encoder"), seed=1)
    write_adapter(texts, _path(models, "lora"))
    _write_z_image(_path(models, "z_image"))
    write_adapter(_z_image_adapter(), _path(models, "z_image adapter"))
    for kind in ("clip_l", "t5xxl", "qwen"):
        save_file({"miniature": torch.zeros(1)}, _path(models, kind))
    save_file(_autoencoder(16), _path(models, "vae"))
    _write_cost_model(models / "safety_cost" / PHOTO)
    return base


def shrunk(workflow: dict[str, Any], side: int = 64, steps: int = 2) -> dict[str, Any]:
    """A saved workflow with small latents and few steps, so that it runs on a processor in seconds."""
    small = copy.deepcopy(workflow)
    for node in small["nodes"]:
        if node["type"] in ("EmptyLatentImage", "EmptySD3LatentImage"):
            node["widgets_values"][:2] = [side, side]
        if node["type"] == "KSampler":
            node["widgets_values"][2] = steps
    return small


def _path(models: Path, kind: str) -> Path:
    folder, name = OWN_FILES[kind]
    (models / folder).mkdir(parents=True, exist_ok=True)
    return models / folder / name


def _autoencoder(channels: int) -> dict[str, torch.Tensor]:
    """A small random autoencoder for latents of so many channels."""
    from comfy.taesd.taesd import TAESD

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in TAESD(latent_channels=channels).state_dict().items():
        weight = torch.zeros_like(value)
        if value.dim() == 4:
            weight = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        tensors[key] = (torch.ones_like(value) if key == "vae_scale" else weight).half()
    return tensors


def _write_z_image(path: Path) -> None:
    import comfy.ops
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(**_Z_IMAGE, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in model.state_dict().items():
        # ComfyUI's layers are left without numbers when they are made.
        is_norm = value.dim() == 1 and "norm" in key
        weight = torch.ones_like(value) if is_norm else torch.randn(value.shape, generator=generator)
        tensors[key] = weight if is_norm else weight / max(value.shape[-1], 1) ** 0.5
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, path)


def _z_image_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(_Z_IMAGE["n_layers"]):  # type: ignore[call-overload]
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            down, up = (torch.randn(shape, generator=generator) for shape in ((4, 256), (256, 4)))
            modules[f"transformer.layers.{layer}.attention.{name}"] = LoraPair(0.4 * down, 0.4 * up, 4.0)
    return Adapter(modules, AdapterMetadata("zimage", "flow", "Safety adapter"))


def _write_cost_model(folder: Path) -> None:
    """The sticker world's cost model with one category of photographs: it judges nothing, but of the real class."""
    source = load_cost_model(pipeline_path().parent / "cost_model")
    network = copy.deepcopy(source.network)
    for name in ("weight", "bias"):
        setattr(network.head, name, torch.nn.Parameter(getattr(network.head, name)[:1].clone(), requires_grad=False))
    network.head.out_channels = 1
    VisionCostModel(network, ("sexual",), "photo", source.size).save_pretrained(folder)

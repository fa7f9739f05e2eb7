"""Tiny random CLIP and SigLIP models, saved to a folder as a real one lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from support.pipelines import _clip_tokenizer, t5_tokenizer
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from t2i_spo_plugin import ClipCostModel, clip_tower


CATEGORIES = {"weapons": ["a knife", "a photo of a gun"], "alcohol": ["a glass of wine"]}
SIZE, PATCH, WIDTH, EMBEDDING = 32, 8, 24, 20


def saved_model(kind: Literal["clip", "siglip"], folder: Path) -> Any:
    """A tiny random model and its tokenizer in `folder`."""
    tokenizer = _clip_tokenizer() if kind == "clip" else t5_tokenizer()
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": SIZE, "patch_size": PATCH}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **special}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))
        else:
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        for parameter in model.vision_model.parameters():  # off the small numbers they start with
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def patch_head(folder: Path, seed: int = 0) -> ClipCostModel:
    """A head of random weights on the mean over patches, with the `CATEGORIES`."""
    rng = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, WIDTH, generator=rng), torch.tensor([0.5, -0.5])
    return ClipCostModel(clip_tower(folder), folder, weight, bias, list(CATEGORIES), features="patches")

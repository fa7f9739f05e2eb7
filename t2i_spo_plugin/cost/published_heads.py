"""Heads that others published as pickles, converted once into a folder of safetensors that `load_cost_model` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, UnreadableFileError
from t2i_spo_plugin.networks.clip import clip_tower
from t2i_spo_plugin.networks.clip_head import ClipHead, published_layers
from t2i_spo_plugin.networks.pickles import read_foreign_tensors
from t2i_spo_plugin.options import check_choice

from .clip import ClipCostModel
from .clip_heads import ClipHeadsCostModel


HeadKind = Literal["q16", "mhsc", "laion-nsfw"]
TOWERS: dict[str, str] = {
    "q16": "openai/clip-vit-large-patch14",
    "mhsc": "openai/clip-vit-large-patch14",
    "laion-nsfw": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
"""The CLIP model that each kind was trained on."""
_Q16_SCALE = 100.0


def convert_cost_head(
    kind: HeadKind, files: Sequence[Path], clip: str | Path = "", trust: bool = False
) -> ClipCostModel | ClipHeadsCostModel:
    """A cost model from the user's own files of a published head.

    - `q16`: the tuned prompts (`prompts.p`, two rows: appropriate, inappropriate). One category, `inappropriate`: the
      logit is 100 times the difference of the image's cosines with the two, as its softmax at scale 100 has it.
    - `mhsc`: one file a category, named after it (`sexual.pt`, `violent.pt`, ...): 768-384-ReLU-batch norm-1.
    - `laion-nsfw`: the detector for CLIP ViT-H/14. One category, `sexual`; its output is read as a probability.

    Args:
        kind: which head.
        files: of the head.
        clip: the CLIP model, by default the one that it was trained on.
        trust: open pickles; see `read_foreign_tensors`.

    Raises:
        SPOError: a file is missing, not trusted, or does not hold this kind of head.
    """
    check_choice("kind", kind, TOWERS)
    source = str(clip) or TOWERS[kind]
    if not files or (kind != "mhsc" and len(files) != 1):
        raise ConfigError(f"{kind} takes {'a file for each category' if kind == 'mhsc' else 'one file'}")
    contents = [read_foreign_tensors(file, trust) for file in files]
    tower = clip_tower(source)
    if kind == "q16":
        weight = _q16_weight(contents[0], files[0])
        return ClipCostModel(tower, source, weight, torch.zeros(1), ["inappropriate"])
    layers = [published_layers(tensors, str(file), True) for tensors, file in zip(contents, files, strict=True)]
    if kind == "mhsc":
        return ClipHeadsCostModel(tower, source, ClipHead(layers, unit=False), [file.stem for file in files])
    return ClipHeadsCostModel(tower, source, ClipHead(layers, unit=True), ["sexual"], "probability")


def _q16_weight(tensors: dict[str, Tensor], file: Path) -> Tensor:
    prompts = next(iter(tensors.values())).float().squeeze()
    if len(tensors) != 1 or prompts.ndim != 2 or len(prompts) != 2:
        raise UnreadableFileError(f"{file} holds no two prompts: {', '.join(map(str, tensors))}")
    safe, unsafe = torch.nn.functional.normalize(prompts, dim=-1)
    return _Q16_SCALE * (unsafe - safe)[None]

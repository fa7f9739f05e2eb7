"""A cost model from its folder, whatever it stands on."""

from __future__ import annotations

from pathlib import Path

from t2i_spo_plugin.networks.model_folder import read_metadata

from . import clip, clip_heads, vision
from .base import CostModel


def load_cost_model(folder: str | Path, local_files_only: bool = False) -> CostModel:
    """The cost model of a folder that `save_pretrained` of a cost model wrote.

    Args:
        folder: the folder.
        local_files_only: download nothing, also where the folder names a model on the Hub that it stands on.

    Raises:
        SPOError: it is no such folder, or a part of it is missing or broken.
    """
    kind = read_metadata(folder).get("kind")
    if kind == clip.KIND:
        return clip.load_clip_head(folder, local_files_only)
    if kind == clip_heads.KIND:
        return clip_heads.load_clip_heads(folder, local_files_only)
    return vision.load_cost_model(folder)

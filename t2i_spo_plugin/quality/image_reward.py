"""ImageReward, where its own package loads: it needs an older transformers than most set-ups have."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, MissingExtraError, SPOError
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor

from .clipscore import refuse


class ImageRewardScore:
    """Follows `QualityReward`: what the package's own `score` says (arXiv 2304.05977), roughly from -2 to 2.

    Args:
        model: as `ImageReward.load` gives it.
        name: of the checkpoint, which is all that is known of it.
    """

    reads_prompt = True
    domain = "photo"

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    @property
    def identity(self) -> str:
        """The checkpoint's name."""
        return f"imagereward {self.name}"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`, one image at a time."""
        shown = [to_pil(to_tensor(image))[0] for image in split(images)]
        with torch.no_grad():
            return torch.tensor([float(self.model.score(p, i)) for i, p in zip(shown, prompts, strict=True)])


def load_image_reward(
    source: str, local_files_only: bool = False, trust: bool = False, **options: Any
) -> ImageRewardScore:
    """ImageReward by the name or file of its checkpoint, such as `ImageReward-v1.0`.

    Args:
        source: as the package's own `load` takes it.
        local_files_only: refuse a name, for the package downloads it.
        trust: open the checkpoint, which is a pickle that the package reads by its own code.
        options: none.

    Raises:
        MissingExtraError: the package is not installed.
        SPOError: without `trust`, or the package does not load beside this transformers.
    """
    refuse(options, "imagereward", "trust")
    if not trust:
        raise ConfigError(
            f"the checkpoint {source} is a pickle, which the ImageReward package opens by its own code; to trust it, "
            "say so in a YAML file: `trust: true`"
        )
    if local_files_only and not Path(source).is_file():
        raise ConfigError(f"{source} is no file, and downloads were ruled out here")
    try:
        package = importlib.import_module("ImageReward")
    except ModuleNotFoundError as error:
        if error.name == "ImageReward":
            raise MissingExtraError("ImageReward is not installed: pip install --no-deps image-reward") from error
        raise SPOError(f"ImageReward does not load here: {error}") from error
    except Exception as error:  # its own code, written for other versions
        raise SPOError(f"ImageReward does not load beside what is installed: {error}") from error
    return ImageRewardScore(package.load(source), source)

"""Features of images by any CLIP, SigLIP or DINOv2 model: what nearest neighbours are looked for in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images

from .clip import STATISTICS
from .preprocessing import parts, read_preprocessing


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_AT_ONCE = 32


class ImageFeatures:
    """Features `[B, D]` of images, each on its own: the embedding of CLIP and SigLIP, the pooled state of others.

    Args:
        source: a Hub id or folder with safetensors weights.
        local_files_only: download nothing.

    Raises:
        SPOError: there is no such model.
    """

    def __init__(self, source: str | Path, local_files_only: bool = False) -> None:
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(source, use_safetensors=True, local_files_only=local_files_only)
        except (OSError, ValueError) as error:
            raise SPOError(f"cannot load the model {source}: {str(error).strip().splitlines()[0]}") from error
        self.source = str(source)
        self.model: Any = model.float().eval().requires_grad_(False)
        config = model.config
        size = getattr(getattr(config, "vision_config", config), "image_size", 224)
        stated = STATISTICS.get(config.model_type, _IMAGENET)
        self.preprocessing = read_preprocessing(source, size, *stated, local_files_only)

    @property
    def identity(self) -> str:
        """By content."""
        return content_hash(self.model, repr(self.preprocessing))

    def to(self, device: torch.device | str) -> ImageFeatures:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """The image's middle, as these models were trained on it -> `[B, D]`, on the CPU."""
        looked = parts(self.preprocessing.cropped(images), _AT_ONCE, self.model.device)
        return torch.cat([self._features(self.preprocessing.normalised(part)).cpu() for part in looked])

    def _features(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixels)
            features: Tensor = getattr(output, "pooler_output", output)
            return features
        pooled: Tensor = self.model(pixels).pooler_output
        return pooled

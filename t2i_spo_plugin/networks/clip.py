"""The image tower of a CLIP or SigLIP checkpoint, and its embedding of prompts: what a head can be put on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import SPOError


Features = Literal["embedding", "patches"]

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation of the pixels, by the kind of model."""


class ClipTower(nn.Module):
    """The image tower of a transformers CLIP or SigLIP model, with the features that a head can stand on."""

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.vision = model.vision_model
        self.projection = getattr(model, "visual_projection", nn.Identity())
        self.size = int(model.config.vision_config.image_size)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @property
    def width(self) -> int:
        """Of the embedding."""
        projected: int | None = getattr(self.projection, "out_features", None)
        hidden: int = self.vision.config.hidden_size
        return hidden if projected is None else projected

    def project(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] -> embeddings `[B, D]` as the projection gives them, of any length."""
        return self.projection(self.vision((pixels - self.mean) / self.std).pooler_output)

    def forward(self, pixels: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """`[B, 3, S, S]` in [0, 1] -> features of the image `[B, D]` and of its patches `[B, D, h, w]`.

        `embedding`: unit vectors in the space that prompts live in; a patch's is what the projection (of SigLIP: the
        pooling head) makes of its last hidden state alone. `patches`: those states, and for the image their mean.
        """
        output = self.vision((pixels - self.mean) / self.std)
        is_clip = hasattr(self.vision, "pre_layrnorm")
        hidden = self.vision.post_layernorm(output.last_hidden_state[:, 1:]) if is_clip else output.last_hidden_state
        if features == "patches":
            return hidden.mean(1), _grid(hidden)
        alone = hidden if is_clip else self.vision.head(hidden.flatten(0, 1)[:, None]).view_as(hidden)
        image = nn.functional.normalize(self.projection(output.pooler_output), dim=-1)
        return image, _grid(nn.functional.normalize(self.projection(alone), dim=-1))


def clip_tower(source: str | Path, local_files_only: bool = False) -> ClipTower:
    """The image tower of a CLIP or SigLIP model, from a Hub id or a folder with safetensors weights.

    `local_files_only` downloads nothing: a Hub id then names what is in the Hub's cache already.

    Raises:
        SPOError: `source` is no such model, or cannot be loaded.
    """
    return tower_of(load_clip_model(source, local_files_only), source, local_files_only)


def load_clip_model(source: str | Path, local_files_only: bool = False) -> Any:
    """The whole transformers model, in float32 and for inference; arguments and errors as for `clip_tower`."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if config.model_type not in STATISTICS:
            raise SPOError(f"{source} is a {config.model_type}; expected one of {', '.join(STATISTICS)}")
        model = AutoModel.from_pretrained(source, use_safetensors=True, local_files_only=local_files_only)
        return model.float().eval()
    except (OSError, ValueError) as error:
        raise SPOError(f"cannot load the model {source}: {str(error).strip().splitlines()[0]}") from error


def tower_of(model: Any, source: str | Path, local_files_only: bool = False) -> ClipTower:
    """The image tower of a loaded model.

    Mean and deviation are those of `source`'s preprocessor file where it has one; the preprocessor is never used.
    """
    from transformers.image_processing_utils import BaseImageProcessor

    mean, std = STATISTICS[model.config.model_type]
    try:
        metadata, _ = BaseImageProcessor.get_image_processor_dict(source, local_files_only=local_files_only)
    except OSError:
        metadata = {}
    return ClipTower(model, metadata.get("image_mean", mean), metadata.get("image_std", std)).eval()


def text_embedding(model: Any, source: str | Path, prompts: Sequence[str]) -> Tensor:
    """Unit vector `[D]`: the mean of the prompts' unit embeddings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model.get_text_features(**tokens)
    embedded = nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
    return nn.functional.normalize(embedded.mean(0), dim=0)


def _grid(patches: Tensor) -> Tensor:
    """`[B, N, D]` -> `[B, D, h, w]`, for a square of patches."""
    side = int(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))

"""A cost model from any CLIP or SigLIP checkpoint: categories named by prompts, or a linear head of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError, UnreadableFileError
from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.clip import ClipTower, Features, clip_tower, load_clip_model, text_embedding, tower_of
from t2i_spo_plugin.networks.model_folder import read_metadata, read_weights, write_model

from .base import CostBatch


KIND = "clip_head"
NEUTRAL = ("a photo", "an ordinary photo of an everyday scene")


class ClipCostModel(nn.Module):
    """A linear head on the features of a CLIP or SigLIP image tower; follows `t2i_spo_plugin.CostModel`.

    With `features="patches"` the head stands on the mean over patches, and the map says exactly what the last hidden
    state of each adds. With `features="embedding"` it does not: the map shows how the head would judge each of those
    states alone, moved by a constant so that its mean is the logit; read it as a hint where to look. In both cases
    attention has mixed the patches before.

    Whole images are resampled to a square; nothing is cropped away.

    Args:
        tower: from `clip_tower`.
        source: what the tower was loaded from, so that the model can be saved without it.
        weight: of the head, `[K, D]`.
        bias: of the head, `[K]`.
        categories: the K names.
        features: what the head stands on.
        domain: the kind of image it was made for.
        temperature: `[K]`, positive, or one for all; 1 says that nothing was calibrated.

    Raises:
        ConfigError: shapes disagree with each other or with the tower.
    """

    def __init__(
        self,
        tower: ClipTower,
        source: str | Path,
        weight: Tensor,
        bias: Tensor,
        categories: Sequence[str],
        features: Features = "embedding",
        domain: str = "photo",
        temperature: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        if features not in get_args(Features):
            raise ConfigError(f"features must be one of {', '.join(get_args(Features))}, got {features!r}")
        with torch.no_grad():
            width = tower(torch.zeros(1, 3, tower.size, tower.size, device=tower.mean.device), features)[0].shape[1]
        count = len(categories)
        if weight.shape != (count, width) or bias.shape != (count,):
            raise ConfigError(
                f"expected a weight [{count}, {width}] and a bias [{count}] for {count} categories on the "
                f"{features} of this model, got {list(weight.shape)} and {list(bias.shape)}"
            )
        self.tower = tower
        self.source = str(source)
        self.categories = tuple(categories)
        self.features: Features = features
        self.domain = domain
        self.weight: Tensor
        self.bias: Tensor
        self.temperature: Tensor
        self.register_buffer("weight", weight.detach().float())
        self.register_buffer("bias", bias.detach().float())
        self.register_buffer("temperature", torch.as_tensor(temperature).float().expand(count).clone())
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        looked = batches(images, self.tower.size, self.temperature.device)
        return CostBatch.joined([self.score_tensor(batch) for batch in looked])

    def score_tensor(self, pixels: Tensor) -> CostBatch:
        """The same for `[B, 3, size, size]` in [0, 1], with gradients."""
        image, patches = self.tower(pixels, self.features)
        logits = image @ self.weight.T + self.bias
        maps = torch.einsum("kd,bdhw->bkhw", self.weight, patches)
        return CostBatch(logits, maps + (logits - maps.mean((2, 3)))[:, :, None, None])

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the head and what it stands on into `folder`; the tower stays where it came from."""
        metadata = {
            "kind": KIND,
            "source": self.source,
            "outputs": list(self.categories),
            "features": self.features,
            "domain": self.domain,
            "temperature": self.temperature.tolist(),
        }
        write_model(folder, metadata, {"weight": self.weight, "bias": self.bias})


def clip_cost_model(
    source: str | Path,
    categories: Mapping[str, Sequence[str]],
    neutral: Sequence[str] = NEUTRAL,
    domain: str = "photo",
    temperature: Tensor | float = 1.0,
) -> ClipCostModel:
    """A cost model without training: unsafe is what is nearer to a category's prompts than to neutral ones.

    With `e` the image's embedding, `t` the mean embedding of a group of prompts and `s` the model's own scale, the
    logit is `s (e . t_category - e . t_neutral)`. Nothing calibrates it: set thresholds on images of your own.

    Args:
        source: a Hub id or folder of a CLIP or SigLIP model with safetensors weights.
        categories: by name, prompts that describe such an image.
        neutral: prompts that describe the images that are none of it.
        domain: the kind of image that the prompts speak of.
        temperature: positive, `[K]` or one for all.

    Raises:
        ConfigError: no category, or a group without prompts.
        SPOError: `source` is no such model, or cannot be loaded.
    """
    groups = {**{name: list(prompts) for name, prompts in categories.items()}, "": list(neutral)}
    empty = [name or "neutral" for name, prompts in groups.items() if not prompts]
    if not categories or empty or "" in categories:
        raise ConfigError(f"name at least one category, with prompts for each and for neutral; missing: {empty}")
    model = load_clip_model(source)
    text = {name: text_embedding(model, source, prompts) for name, prompts in groups.items()}
    scale = float(model.logit_scale.detach().exp())
    weight = scale * torch.stack([text[name] - text[""] for name in categories])
    return ClipCostModel(
        tower_of(model, source),
        source,
        weight,
        torch.zeros(len(weight)),
        list(categories),
        "embedding",
        domain,
        temperature,
    )


def load_clip_head(folder: Path | str, local_files_only: bool = False) -> ClipCostModel:
    """The model of a folder written by `ClipCostModel.save_pretrained`; `local_files_only` as for `clip_tower`.

    Raises:
        SPOError: the folder is something else, or the tower's source cannot be loaded.
    """
    metadata = read_metadata(folder, "source", "outputs", "features", "domain", "temperature")
    head = read_weights(folder)
    if not {"weight", "bias"} <= head.keys():
        raise UnreadableFileError(
            f"{folder} has no weights of a head: expected weight and bias, found {', '.join(sorted(head))}"
        )
    return ClipCostModel(
        clip_tower(metadata["source"], local_files_only),
        metadata["source"],
        head["weight"],
        head["bias"],
        metadata["outputs"],
        metadata["features"],
        metadata["domain"],
        torch.tensor(metadata["temperature"]),
    )

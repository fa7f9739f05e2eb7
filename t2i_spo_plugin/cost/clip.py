"""A cost model from any CLIP or SigLIP checkpoint: categories named by prompts, or a linear head of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.backbone import WEIGHTS, batches, read_metadata, read_weights

from .base import CostBatch


KIND = "clip_head"
NEUTRAL = ("a photo", "an ordinary photo of an everyday scene")

Features = Literal["embedding", "patches"]

_STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class ClipTower(nn.Module):
    """The image half of a transformers CLIP or SigLIP model, with the features that a head can stand on."""

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.vision = model.vision_model
        self.projection = getattr(model, "visual_projection", nn.Identity())
        self.size = int(model.config.vision_config.image_size)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """`[B, 3, S, S]` in [0, 1] -> features of the image `[B, D]` and of its patches `[B, D, h, w]`.

        `embedding`: unit vectors in the space that prompts live in; a patch's is what the projection (of SigLIP: the
        pooling head) makes of its last hidden state alone. `patches`: those states, and for the image their mean.
        """
        found = self.vision((pixels - self.mean) / self.std)
        is_clip = hasattr(self.vision, "pre_layrnorm")
        hidden = self.vision.post_layernorm(found.last_hidden_state[:, 1:]) if is_clip else found.last_hidden_state
        if features == "patches":
            return hidden.mean(1), _grid(hidden)
        alone = hidden if is_clip else self.vision.head(hidden.flatten(0, 1)[:, None]).view_as(hidden)
        image = nn.functional.normalize(self.projection(found.pooler_output), dim=-1)
        return image, _grid(nn.functional.normalize(self.projection(alone), dim=-1))


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
        found = [self.score_tensor(batch) for batch in batches(images, self.tower.size, self.temperature.device)]
        return CostBatch(torch.cat([one.logits for one in found]), torch.cat([one.logit_map for one in found]))

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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        save_file({"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu()}, folder / WEIGHTS)


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
    model = _load(source)
    text = {name: _text_embedding(model, source, prompts) for name, prompts in groups.items()}
    scale = float(model.logit_scale.detach().exp())
    weight = scale * torch.stack([text[name] - text[""] for name in categories])
    tower = _tower(model, source)
    return ClipCostModel(
        tower, source, weight, torch.zeros(len(weight)), list(categories), "embedding", domain, temperature
    )


def clip_tower(source: str | Path, local_files_only: bool = False) -> ClipTower:
    """The image half of a CLIP or SigLIP model, from a Hub id or a folder with safetensors weights.

    `local_files_only` downloads nothing: a Hub id then names what is in the Hub's cache already.

    Raises:
        SPOError: `source` is no such model, or cannot be loaded.
    """
    return _tower(_load(source, local_files_only), source, local_files_only)


def load_clip_head(folder: Path | str, local_files_only: bool = False) -> ClipCostModel:
    """The model of a folder written by `ClipCostModel.save_pretrained`; `local_files_only` as for `clip_tower`.

    Raises:
        SPOError: the folder is something else, or the tower's source cannot be loaded.
    """
    kind = read_metadata(folder).get("kind")
    if kind != KIND:
        raise SPOError(f"{folder} holds a {kind}, not a head for a CLIP or SigLIP model")
    metadata, head = (
        read_metadata(folder, "source", "outputs", "features", "domain", "temperature"),
        read_weights(folder),
    )
    if not {"weight", "bias"} <= head.keys():
        raise SPOError(f"{folder} has no weights of a head: expected weight and bias, found {', '.join(sorted(head))}")
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


def _load(source: str | Path, local_files_only: bool = False) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if config.model_type not in _STATISTICS:
            raise SPOError(f"{source} is a {config.model_type}; expected one of {', '.join(_STATISTICS)}")
        model = AutoModel.from_pretrained(source, use_safetensors=True, local_files_only=local_files_only)
        return model.float().eval()
    except (OSError, ValueError) as error:
        raise SPOError(f"cannot load the model {source}: {str(error).strip().splitlines()[0]}") from error


def _tower(model: Any, source: str | Path, local_files_only: bool = False) -> ClipTower:
    """The statistics of `source`'s own preprocessor file where it has one; never its preprocessor."""
    from transformers.image_processing_utils import BaseImageProcessor

    mean, std = _STATISTICS[model.config.model_type]
    try:
        metadata, _ = BaseImageProcessor.get_image_processor_dict(source, local_files_only=local_files_only)
    except OSError:
        metadata = {}
    return ClipTower(model, metadata.get("image_mean", mean), metadata.get("image_std", std)).eval()


def _text_embedding(model: Any, source: str | Path, prompts: Sequence[str]) -> Tensor:
    """Unit vector `[D]`: the mean of the prompts' unit embeddings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model.get_text_features(**tokens)
    embedded = nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
    return nn.functional.normalize(embedded.mean(0), dim=0)


def _grid(patches: Tensor) -> Tensor:
    """`[B, N, D]` -> `[B, D, h, w]`, for a square of patches."""
    side = int(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))

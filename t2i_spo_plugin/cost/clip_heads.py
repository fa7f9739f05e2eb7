"""Published heads on a CLIP image tower as cost models: MHSC (a small network a category) and LAION's detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.clip import ClipTower, clip_tower
from t2i_spo_plugin.networks.clip_head import ClipHead, stored_head
from t2i_spo_plugin.networks.model_folder import read_metadata, read_weights, write_model
from t2i_spo_plugin.options import check_choice

from .base import CostBatch


KIND = "clip_heads"
Output = Literal["logit", "probability"]
_LEAST = 1e-4


class ClipHeadsCostModel(nn.Module):
    """A head a category on the embedding of a CLIP image tower; follows `t2i_spo_plugin.CostModel`. There is no map.

    Whole images are stretched to a square; nothing is cropped away.

    Args:
        tower: from `clip_tower`.
        source: what the tower was loaded from, so that the model can be saved without it.
        head: with as many outputs as categories.
        categories: the K names.
        output: whether the head gives logits, or probabilities, of which the logit is taken.
        domain: the kind of image it was made for.

    Raises:
        ConfigError: head, tower and categories do not fit each other.
    """

    def __init__(
        self,
        tower: ClipTower,
        source: str | Path,
        head: ClipHead,
        categories: Sequence[str],
        output: Output = "logit",
        domain: str = "photo",
    ) -> None:
        super().__init__()
        check_choice("output", output, ("logit", "probability"))
        if len(head.heads) != len(categories) or head.width != tower.width:
            raise ConfigError(
                f"{len(head.heads)} heads on an embedding of {head.width} for {len(categories)} categories and a "
                f"tower whose embedding has {tower.width}; name the CLIP model that the heads were trained on"
            )
        self.tower, self.source, self.head = tower, str(source), head
        self.categories = tuple(categories)
        self.output: Output = output
        self.domain = domain
        self.features = f"{output} {head.unit} {head.relu}"  # what its identity depends on beside the weights
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(len(self.categories)))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        looked = batches(images, self.tower.size, self.temperature.device)
        return CostBatch.joined([self.score_tensor(batch) for batch in looked])

    def score_tensor(self, pixels: Tensor) -> CostBatch:
        """The same for `[B, 3, size, size]` in [0, 1], with gradients."""
        values = self.head(self.tower.project(pixels))
        return CostBatch(values.logit(_LEAST) if self.output == "probability" else values)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the heads and what they stand on into `folder`; the tower stays where it came from."""
        metadata = {
            "kind": KIND,
            "source": self.source,
            "outputs": list(self.categories),
            "relu": self.head.relu,
            "unit": self.head.unit,
            "output": self.output,
            "domain": self.domain,
        }
        write_model(folder, metadata, self.head.state_dict())


def load_clip_heads(folder: Path | str, local_files_only: bool = False) -> ClipHeadsCostModel:
    """The model of a folder written by `ClipHeadsCostModel.save_pretrained`; `local_files_only` as for `clip_tower`.

    Raises:
        SPOError: the folder is something else, or the tower's source cannot be loaded.
    """
    stated = read_metadata(folder, "source", "outputs", "relu", "unit", "output", "domain")
    head = stored_head(read_weights(folder), stated["relu"], stated["unit"], str(folder))
    tower = clip_tower(stated["source"], local_files_only)
    return ClipHeadsCostModel(tower, stated["source"], head, stated["outputs"], stated["output"], stated["domain"])

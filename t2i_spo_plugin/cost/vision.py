"""A safety cost model: a small vision backbone with one linear head per category and an exact class activation map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.backbone import MapClassifier, load_map_classifier, save_network

from .base import MappedCostBatch


class VisionCostModel(nn.Module):
    """Logits per category and where they come from; follows `CostModel`.

    With a network that pools by its mean, the map's mean is the logit. With one that pools by its peak, the map says
    of each cell how sure the model is that something of the category covers it, trained on exact masks, and the logit
    is the soft maximum `logsumexp(map) - log(h w)`.

    Args:
        network: backbone and head. One output more than there are categories says whether anything is recognised.
        categories: the K names, in the order of the head's outputs.
        domain: what kind of images it was trained on.
        size: side in pixels that images are resampled to.
        temperature: `[K]`, positive, fitted on validation scenes.
    """

    def __init__(
        self,
        network: MapClassifier,
        categories: Sequence[str],
        domain: str,
        size: int,
        temperature: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.categories = tuple(categories)
        self.domain = domain
        self.size = size
        self.temperature: Tensor
        self.register_buffer(
            "temperature", torch.ones(len(categories)) if temperature is None else temperature.float()
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.temperature.device

    @torch.no_grad()
    def __call__(self, images: Images) -> MappedCostBatch:
        """Score images; see `CostBatch`. Raises `ValueError` on what is no image."""
        scored = [self.score_tensor(batch) for batch in batches(images, self.size, self.device)]
        says = [one.readable for one in scored if one.readable is not None]
        return MappedCostBatch(
            torch.cat([one.logits for one in scored]),
            torch.cat([one.logit_map for one in scored]),
            readable=torch.cat(says) if says else None,
        )

    def score_tensor(self, pixels: Tensor) -> MappedCostBatch:
        """The same for `[B, 3, size, size]` in [0, 1], with gradients."""
        logits, maps = self.network(pixels)
        k = len(self.categories)
        readable = logits[:, -1].sigmoid() if logits.shape[1] > k else None
        return MappedCostBatch(logits[:, :k], maps[:, :k], readable=readable)

    def readable(self, images: Images) -> Tensor:
        """Probability `[B]` that anything the model knows, safe or not, is to be seen.

        Raises:
            SPOError: this model was not trained to say so.
        """
        says = self(images).readable
        if says is None:
            raise SPOError("this cost model does not say whether it recognises anything in an image")
        return says

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model into `folder` (fp16 safetensors, transformers config, `metadata.json`)."""
        extra = ["anything"] * (self.network.head.out_channels - len(self.categories))
        metadata: dict[str, Any] = {
            "kind": "cost_model",
            "outputs": [*self.categories, *extra],
            "categories": len(self.categories),
            "pooling": self.network.pooling,
            "fine": self.network.fine,
            "domain": self.domain,
            "size": self.size,
            "temperature": [round(t, 6) for t in self.temperature.tolist()],
        }
        save_network(self.network, self.network.backbone.config, metadata, folder)


def load_cost_model(folder: Path | str) -> VisionCostModel:
    """A cost model from a folder written by `VisionCostModel.save_pretrained`, ready for inference.

    Raises:
        UnreadableFileError: the folder is something else, or a part of it is missing or broken.
    """
    network, metadata = load_map_classifier(folder, "domain", "size", "temperature")
    model = VisionCostModel(
        network,
        metadata["outputs"][: metadata.get("categories")],
        metadata["domain"],
        metadata["size"],
        torch.tensor(metadata["temperature"]),
    )
    return model.eval().requires_grad_(False)

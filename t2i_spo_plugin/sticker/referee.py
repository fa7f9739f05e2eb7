"""The referee of the sticker world: names the objects in a picture. It judges results and trains or chooses
nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.backbone import MapClassifier, load_map_classifier

from .world import CONCEPTS


class StickerReferee:
    """Which concepts a picture shows.

    An object counts as recognised when its probability is at least 0.5; a picture as unsafe when that holds for an
    unsafe concept. Another architecture, seed and training than the cost and quality models.
    """

    domain: str = "sticker"

    def __init__(self, network: MapClassifier, concepts: tuple[str, ...], size: int) -> None:
        self.network, self.size = network, size
        self.concepts: tuple[str, ...] = concepts
        self.unsafe_index = [n for n, name in enumerate(concepts) if CONCEPTS[name].category is not None]

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> StickerReferee:
        """Load the referee of a folder."""
        network, metadata = load_map_classifier(folder)
        return cls(network, tuple(metadata["outputs"]), metadata["size"])

    @torch.no_grad()
    def probabilities(self, images: Images) -> Tensor:
        """``[B, number of concepts]`` in [0, 1]."""
        device = next(self.network.parameters()).device
        return torch.cat([self.network(batch)[0].sigmoid() for batch in batches(images, self.size, device)]).cpu()

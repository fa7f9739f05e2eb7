"""Realism: how near an image lies to real ones, in features of its own that neither reward nor cost use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.backbone import MapClassifier, load_map_classifier, save_network
from t2i_spo_plugin.networks.model_folder import read_weights


BANK = "bank.safetensors"


def nearest_similarity(features: Tensor, bank: Tensor, k: int) -> Tensor:
    """Mean cosine of each row of `features` `[B, D]` with its `k` nearest rows of `bank` `[N, D]` ->
    `[B]`."""
    similarity = F.normalize(features, dim=-1) @ F.normalize(bank, dim=-1).T
    return similarity.topk(min(k, len(bank)), dim=1).values.mean(1)


class RealismModel:
    """Mean cosine to the `k` nearest real images; the prompt plays no part. In [-1, 1], higher is more real."""

    def __init__(self, network: MapClassifier, bank: Tensor, mean: Tensor, size: int, k: int = 4) -> None:
        self.network, self.bank, self.mean, self.size, self.k = network, bank, mean, size, k

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> RealismModel:
        """Load the model and its bank of real images from `folder`.

        Raises:
            UnreadableFileError: the folder is something else, or a part of it is missing or broken.
        """
        network, metadata = load_map_classifier(folder, "size", "k")
        bank = read_weights(folder, BANK)
        return cls(network, bank["bank"].float(), bank["mean"].float(), metadata["size"], metadata["k"])

    def save_pretrained(self, folder: Path | str, outputs: Sequence[str]) -> None:
        """Write network and bank into `folder`; `outputs` names what the network was trained to tell."""
        metadata: dict[str, Any] = {"kind": "realism", "outputs": list(outputs), "size": self.size, "k": self.k}
        save_network(self.network, self.network.backbone.config, metadata, folder)
        tensors = {"bank": self.bank.half().contiguous(), "mean": self.mean.half().contiguous()}
        save_file(tensors, Path(folder) / BANK)

    def to(self, device: torch.device | str) -> RealismModel:
        """Move network and bank."""
        self.network.to(device)
        self.bank, self.mean = self.bank.to(device), self.mean.to(device)
        return self

    @property
    def identity(self) -> str:
        """What decides its answers, by content."""
        return content_hash(self.network, self.bank, self.mean, self.size, self.k)

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """Pooled features `[B, D]`, before centring."""
        return torch.cat([self.network.features(b).mean((2, 3)) for b in batches(images, self.size, self.bank.device)])

    def __call__(self, images: Images, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores `[B]`; each depends on its image alone."""
        return nearest_similarity(self.features(images) - self.mean, self.bank, self.k)

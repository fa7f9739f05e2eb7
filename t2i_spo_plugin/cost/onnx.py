"""Cost models that are ONNX networks: on the CPU, one image at a time.

That makes the answer for an image independent of its batch, of the device and of what else is installed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.images import Images, split, to_tensor
from t2i_spo_plugin.networks.onnx import OnnxNetwork

from .base import CostBatch


class OnnxCostModel(ABC):
    """A cost model for photographs that judges each image alone; follows `t2i_spo_plugin.CostModel`.

    Args:
        network: gives what `judge` reads.
        categories: the K names.
    """

    domain = "photo"

    def __init__(self, network: OnnxNetwork, categories: tuple[str, ...]) -> None:
        self.network = network
        self.categories = categories
        self.temperature = torch.ones(len(categories))

    @property
    def identity(self) -> str:
        """What tells this network from others: the beginning of its file's SHA-256."""
        return self.network.sha256[:12]

    @abstractmethod
    def judge(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`[1, 3, H, W]` in [0, 1] -> logits `[K]`, map `[K, h, w]`; h and w are the same for every image."""

    @torch.no_grad()
    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        judged = [self.judge(to_tensor(image).cpu()) for image in split(images)]
        logits, maps = (torch.stack(part).to(self.temperature.device) for part in zip(*judged, strict=True))
        return CostBatch(logits, maps)

    def to(self, device: torch.device | str) -> OnnxCostModel:
        """Give the answers on `device`; the network stays on the CPU."""
        self.temperature = self.temperature.to(device)
        return self


def boundary_logit(boundary: float) -> float:
    """`log(p / (1 - p))` of the probability that becomes the boundary.

    Raises:
        ConfigError: not strictly between 0 and 1.
    """
    if not 0.0 < boundary < 1.0:
        raise ConfigError(f"boundary must lie strictly between 0 and 1, got {boundary}")
    return math.log(boundary / (1.0 - boundary))

"""Realism by nearest neighbours: how near an image lies to those of a folder of the user's own, in CLIP or DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, image_files, open_image
from t2i_spo_plugin.networks.image_features import ImageFeatures
from t2i_spo_plugin.networks.model_folder import METADATA, read_metadata, read_weights, write_model
from t2i_spo_plugin.options import check_range

from .clipscore import refuse
from .realism import nearest_similarity


KIND = "neighbours"
FEATURES = "facebook/dinov2-base"
K = 4
_AT_ONCE = 32


class NeighbourRealism:
    """Follows `QualityReward`: mean cosine to the `k` nearest images of the folder, its mean taken off.

    In [-1, 1]; the prompt plays no part. An image of the folder itself is its own nearest neighbour: judge others.

    Args:
        features: of images.
        bank: features of the folder's images, centred, `[N, D]`.
        mean: what was taken off, `[D]`.
        k: how many neighbours count.
    """

    reads_prompt = False
    domain = "photo"

    def __init__(self, features: ImageFeatures, bank: Tensor, mean: Tensor, k: int = K) -> None:
        check_range("k", k, 1, whole=True)
        self.features, self.bank, self.mean, self.k = features, bank, mean, k

    @property
    def identity(self) -> str:
        """By content."""
        return content_hash("neighbours", self.features.identity, self.bank, self.mean, self.k)

    def to(self, device: torch.device | str) -> NeighbourRealism:
        """Move the network."""
        self.features.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores `[B]`."""
        return nearest_similarity(self.features(images) - self.mean, self.bank, self.k)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the bank into `folder`, with what its features are; no image is written."""
        metadata = {"kind": KIND, "source": self.features.source, "k": self.k}
        write_model(folder, metadata, {"bank": self.bank, "mean": self.mean})


def bank_of(
    folder: Path | str,
    source: str = FEATURES,
    k: int = K,
    local_files_only: bool = False,
    progress: Callable[[Any], Iterable[Any]] = iter,
) -> NeighbourRealism:
    """Realism by the images of `folder` and those below it, in the features of the model `source`.

    Raises:
        SPOError: there are fewer than `k`, or the model cannot be loaded.
    """
    files = image_files(Path(folder))
    if len(files) < k:
        raise ConfigError(f"{folder} holds {len(files)} images, too few for {k} neighbours")
    features = ImageFeatures(source, local_files_only)
    found = [
        features([open_image(file) for file in files[start : start + _AT_ONCE]])
        for start in progress(range(0, len(files), _AT_ONCE))
    ]
    every = torch.cat(found)
    mean = every.mean(0)
    return NeighbourRealism(features, every - mean, mean, k)


def load_neighbours(
    source: str, local_files_only: bool = False, features: str = FEATURES, k: int = K, **options: Any
) -> NeighbourRealism:
    """Realism by a folder of images, or by the folder that `NeighbourRealism.save_pretrained` wrote.

    Args:
        source: the folder.
        local_files_only: download nothing.
        features: for a folder of images: a CLIP, SigLIP or DINOv2 model, a Hub id or folder.
        k: for a folder of images: how many neighbours count.
        options: none.

    Raises:
        SPOError: there is no such folder, or the model of the features cannot be loaded.
    """
    refuse(options, "realism", "features", "k")
    if not Path(source).is_dir():
        raise ConfigError(f"there is no folder {source}; name one with real images, or one that holds their features")
    if not (Path(source) / METADATA).is_file():
        return bank_of(source, features, k, local_files_only)
    stated = read_metadata(source, "source", "k")
    tensors = read_weights(source)
    network = ImageFeatures(stated["source"], local_files_only)
    return NeighbourRealism(network, tensors["bank"], tensors["mean"], stated["k"])

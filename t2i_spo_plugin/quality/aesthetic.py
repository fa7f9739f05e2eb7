"""The aesthetic score: how much people like an image, whatever its prompt, by LAION's head on CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.clip import ClipTower, clip_tower
from t2i_spo_plugin.networks.clip_head import ClipHead, published_layers, stored_head
from t2i_spo_plugin.networks.model_folder import read_metadata, read_weights, write_model
from t2i_spo_plugin.networks.pickles import read_foreign_tensors
from t2i_spo_plugin.networks.preprocessing import Preprocessing, parts, read_preprocessing

from .clipscore import refuse


KIND = "clip_aesthetic"
CLIP = "openai/clip-vit-large-patch14"
_AT_ONCE = 32


class AestheticScore(nn.Module):
    """Follows `QualityReward`; the prompt plays no part. Roughly from 1 to 10.

    The head stands on the unit embedding of the image's middle, as published.
    """

    reads_prompt = False
    domain = "photo"

    def __init__(self, tower: ClipTower, head: ClipHead, preprocessing: Preprocessing) -> None:
        super().__init__()
        if head.width != tower.width:
            raise ConfigError(f"a head on an embedding of {head.width} on a tower whose embedding has {tower.width}")
        self.tower, self.head, self.preprocessing = tower, head, preprocessing
        self.features = repr(preprocessing)  # what its identity depends on beside the weights
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores `[B]`."""
        device = self.tower.mean.device
        looked = parts(self.preprocessing.cropped(images), _AT_ONCE, device)
        return torch.cat([self.head(self.tower.project(part))[:, 0] for part in looked])


def load_aesthetic(source: str, local_files_only: bool = False, **options: Any) -> AestheticScore:
    """The score of a folder that `convert_aesthetic` wrote.

    Raises:
        SPOError: it is no such folder, or its CLIP model cannot be loaded.
    """
    refuse(options, "aesthetic")
    stated = read_metadata(source, "kind", "source", "relu", "unit")
    if stated["kind"] != KIND:
        raise ConfigError(f"{source} is no aesthetic head; `spo convert-head --kind laion-aesthetic` makes one")
    head = stored_head(read_weights(source), stated["relu"], stated["unit"], source)
    tower = clip_tower(stated["source"], local_files_only)
    preprocessing = read_preprocessing(
        stated["source"], tower.size, tower.mean.flatten().tolist(), tower.std.flatten().tolist(), local_files_only
    )
    return AestheticScore(tower, head, preprocessing)


def convert_aesthetic(file: Path, out: Path, clip: str | Path = "", trust: bool = False) -> Path:
    """LAION's published head (`sac+logos+ava1-l14-linearMSE.pth`) as a folder of safetensors.

    Args:
        file: its weights, a pickle or safetensors; linear layers without anything between them.
        out: the folder.
        clip: the CLIP model, by default the one that it was trained on.
        trust: open a pickle; see `read_foreign_tensors`.

    Raises:
        SPOError: it is not trusted, or no such head.
    """
    head = ClipHead([published_layers(read_foreign_tensors(file, trust), str(file), relu=False)])
    metadata = {"kind": KIND, "source": str(clip) or CLIP, "relu": head.relu, "unit": head.unit}
    write_model(out, metadata, head.state_dict())
    return Path(out)

"""CLIPScore: the cosine of image and prompt by a CLIP or SigLIP model, which is part of the score's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.dual_encoder import DualEncoder


class CLIPScore:
    """Follows `QualityReward`: `100 max(cosine, 0)`, as torchmetrics has it (arXiv 2104.08718 scales by 2.5 instead).

    Scores of different models cannot be compared. The images are cut to their middle, as published.
    """

    reads_prompt = True
    domain = "photo"

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    @property
    def identity(self) -> str:
        """By content."""
        return f"clipscore {self.encoder.identity}"

    def to(self, device: torch.device | str) -> CLIPScore:
        """Move the model."""
        self.encoder.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`."""
        return 100.0 * (self.encoder.images(images) * self.encoder.prompts(prompts)).sum(1).clamp(min=0.0)


def load_clipscore(source: str, local_files_only: bool = False, **options: Any) -> CLIPScore:
    """CLIPScore of the CLIP or SigLIP model at `source`, a Hub id or folder.

    Raises:
        SPOError: there is no such model.
    """
    refuse(options, "clipscore")
    return CLIPScore(DualEncoder(source, local_files_only=local_files_only))


def refuse(options: Mapping[str, Any], name: str, *known: str) -> None:
    """Raise a ConfigError when there are options that the reward `name` does not have."""
    if options:
        has = f"known are source, {', '.join(known)}" if known else "known is source"
        raise ConfigError(f"{name}: unknown {', '.join(map(str, options))}; {has}")

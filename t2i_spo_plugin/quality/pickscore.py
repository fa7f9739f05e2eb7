"""PickScore: how well people liked such an image for such a prompt, by a CLIP tuned on their choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.dual_encoder import DualEncoder


SOURCE = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""PickScore has no tokenizer of its own; it reads as the CLIP that it was tuned from."""


class PickScore:
    """Follows `QualityReward`: the model's scale times the cosine of image and prompt (arXiv 2305.01569, eq. 1).

    Typically 16 to 26. The images are cut to their middle, as published.
    """

    reads_prompt = True
    domain = "photo"

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    @property
    def identity(self) -> str:
        """By content."""
        return f"pickscore {self.encoder.identity}"

    def to(self, device: torch.device | str) -> PickScore:
        """Move the model."""
        self.encoder.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`."""
        cosine = (self.encoder.images(images) * self.encoder.prompts(prompts)).sum(1)
        return self.encoder.scale * cosine


def load_pickscore(source: str, local_files_only: bool = False, processor: str = "", **options: Any) -> PickScore:
    """PickScore from the Hub, or from a folder with its weights, tokenizer and preprocessor file.

    Raises:
        SPOError: a part is missing.
    """
    from .clipscore import refuse

    refuse(options, "pickscore", "processor")
    processor = processor or (PROCESSOR if source == SOURCE else source)
    return PickScore(DualEncoder(source, processor, local_files_only=local_files_only))

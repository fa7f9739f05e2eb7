"""A CLIP or SigLIP model whole: images and prompts as unit vectors of one space, as published scores compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images

from .clip import STATISTICS, load_clip_model
from .preprocessing import parts, read_preprocessing


_AT_ONCE = 32


class DualEncoder:
    """Embeds images and prompts; an answer depends neither on the batch nor on its neighbours.

    Args:
        source: a Hub id or folder of a CLIP or SigLIP model with safetensors weights.
        processor: where its tokenizer and preprocessor file are, by default `source` too.
        fit: how an image becomes a square: `crop`, the middle of it, as CLIP's processor does; `pad`, all of it on
            black, as HPSv2's does.
        local_files_only: download nothing.

    Raises:
        SPOError: there is no such model, or a part of it is missing.
    """

    def __init__(
        self,
        source: str | Path,
        processor: str | Path = "",
        fit: Literal["crop", "pad"] = "crop",
        local_files_only: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        processor = processor or source
        self.model = load_clip_model(source, local_files_only).requires_grad_(False)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(processor, local_files_only=local_files_only)
        except (OSError, ValueError) as error:
            raise SPOError(f"cannot load the tokenizer of {processor}: {str(error).splitlines()[0]}") from error
        size = self.model.config.vision_config.image_size
        stated = STATISTICS[self.model.config.model_type]
        self.preprocessing = read_preprocessing(processor, size, *stated, local_files_only)
        self.fit = fit

    @property
    def identity(self) -> str:
        """By content."""
        return content_hash(self.model, self.tokenizer, repr(self.preprocessing), self.fit)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def scale(self) -> Tensor:
        """What the model multiplies a cosine by."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    def to(self, device: torch.device | str) -> DualEncoder:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def images(self, images: Images) -> Tensor:
        """Unit vectors `[B, D]`."""
        how = self.preprocessing.padded if self.fit == "pad" else self.preprocessing.cropped
        looked = parts(how(images), _AT_ONCE, self.device)
        return torch.cat([self._unit(self.model.get_image_features(self._normalised(part))) for part in looked])

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `[B, D]`; what is longer than the model reads is cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        kept = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask") if name in tokens}
        return self._unit(self.model.get_text_features(**kept))

    def _normalised(self, pixels: Tensor) -> Tensor:
        return self.preprocessing.normalised(pixels)

    @staticmethod
    def _unit(output: Any) -> Tensor:
        # Newer versions of transformers give an output with the embedding in it.
        return normalize(getattr(output, "pooler_output", output), dim=-1)

"""A small CLIP: how well an image and a prompt belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_spo_plugin.errors import UnreadableFileError
from t2i_spo_plugin.files import read_json
from t2i_spo_plugin.images import Images, batches
from t2i_spo_plugin.networks.backbone import save_network
from t2i_spo_plugin.networks.model_folder import load_state, read_config, read_metadata, read_weights


class SmallCLIP(nn.Module):
    """Image tower (any transformers vision backbone with a feature map) and CLIP text tower into one unit sphere.

    Follows `QualityReward`: the alignment of image and prompt is the probability
    that they belong together, `sigmoid(scale * cosine + bias)` (SigLIP, arXiv 2303.15343, section 3.2). Unlike the
    cosine it says "no" to every mismatch alike, so that one fixed good image earns nothing.
    """

    def __init__(self, vision_config: Any, text_config: Any, tokenizer: Any, size: int, width: int = 128) -> None:
        super().__init__()
        from transformers import AutoModel, CLIPTextModel

        self.vision = AutoModel.from_config(vision_config)
        self.text = CLIPTextModel(text_config)
        self.vision_projection = nn.Linear(vision_config.hidden_sizes[-1], width, bias=False)
        self.text_projection = nn.Linear(text_config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-5.0))
        self.tokenizer = tokenizer
        self.size = size

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """`[B, 3, size, size]` in [0, 1] -> unit vectors `[B, width]`, with gradients."""
        features = self.vision(pixels * 2 - 1).last_hidden_state.mean((2, 3))
        return F.normalize(self.vision_projection(features), dim=-1)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids `[B, L]` -> unit vectors `[B, width]`, with gradients."""
        return F.normalize(self.text_projection(self.text(ids).pooler_output), dim=-1)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids `[B, L]`, padded to the tokenizer's length, so that a prompt's answer does not depend on its
        neighbours."""
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.logit_scale.device)

    @torch.no_grad()
    def embed_images(self, images: Images) -> Tensor:
        """Images -> unit vectors `[B, width]`."""
        return torch.cat([self.embed_pixels(batch) for batch in batches(images, self.size, self.logit_scale.device)])

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors `[B, width]`."""
        ids = self.tokenize(prompts)
        return torch.cat([self.embed_tokens(ids[n : n + 256]) for n in range(0, len(ids), 256)])

    def alignment(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Probability in [0, 1] of embeddings `[..., width]` that broadcast against each other -> `[...]`."""
        return ((images * prompts).sum(-1) * self.logit_scale.exp() + self.logit_bias).sigmoid()

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Alignment `[B]` of each image with its prompt."""
        return self.alignment(self.embed_images(images), self.embed_prompts(prompts))

    def save_pretrained(
        self, folder: Path | str, metadata: dict[str, Any] | None = None, text_encoder: str | None = None
    ) -> None:
        """Write towers, configs and tokenizer into `folder`.

        With `text_encoder`, the path from `folder` to that of a text encoder which is the text tower, the tower and
        its tokenizer (in `tokenizer` beside that folder) are not written: they are read from there.
        """
        folder = Path(folder)
        metadata = {"kind": "small_clip", "size": self.size, "width": self.vision_projection.out_features} | (
            metadata or {}
        )
        if text_encoder is not None:
            save_network(self, self.vision.config, metadata | {"text_encoder": text_encoder}, folder, "text.")
            return
        save_network(self, self.vision.config, metadata, folder)
        (folder / "text_config.json").write_text(self.text.config.to_json_string(use_diff=False), encoding="utf-8")
        self.tokenizer.save_pretrained(folder)


def load_small_clip(folder: Path | str) -> SmallCLIP:
    """The model of a folder written by `SmallCLIP.save_pretrained`, ready for inference.

    Raises:
        UnreadableFileError: the folder is something else, or a part of it is missing or broken.
    """
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder, metadata = Path(folder), read_metadata(folder, "size", "width")
    elsewhere = folder / metadata["text_encoder"] if "text_encoder" in metadata else None
    text_config = elsewhere / "config.json" if elsewhere else folder / "text_config.json"
    tokens = elsewhere.parent / "tokenizer" if elsewhere else folder
    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokens)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnreadableFileError(f"cannot read the tokenizer of {tokens}: {reason}") from error
    text = CLIPTextConfig.from_dict(read_json(text_config))
    model = SmallCLIP(read_config(folder), text, tokenizer, metadata["size"], metadata["width"])
    # Newer versions of transformers leave `text_model.` out of a CLIP module's path.
    inner = "text.text_model." if hasattr(model.text, "text_model") else "text."
    weights = read_weights(folder)
    if elsewhere:
        weights |= {f"text.{name}": tensor for name, tensor in read_weights(elsewhere).items()}
    load_state(model, {re.sub(r"^text\.(text_model\.)?", inner, k): v for k, v in weights.items()}, folder)
    return model

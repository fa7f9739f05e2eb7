"""HPSv2: human preference by a CLIP of open_clip's, converted once (`spo convert-head --kind hpsv2`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import SPOError, UnreadableFileError
from t2i_spo_plugin.files import write_json
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.dual_encoder import DualEncoder
from t2i_spo_plugin.networks.model_folder import METADATA, read_metadata
from t2i_spo_plugin.networks.open_clip import transformers_state
from t2i_spo_plugin.networks.pickles import read_foreign_tensors

from .clipscore import refuse


KIND = "hpsv2"
CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The model that HPSv2 was tuned from: its configuration and tokenizer."""


class HPSv2:
    """Follows `QualityReward`: the cosine of image and prompt (arXiv 2306.09341). Typically 0.2 to 0.3.

    The whole image on black, as published.
    """

    reads_prompt = True
    domain = "photo"

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    @property
    def identity(self) -> str:
        """By content."""
        return f"hpsv2 {self.encoder.identity}"

    def to(self, device: torch.device | str) -> HPSv2:
        """Move the model."""
        self.encoder.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`."""
        return (self.encoder.images(images) * self.encoder.prompts(prompts)).sum(1)


def load_hpsv2(source: str, local_files_only: bool = False, **options: Any) -> HPSv2:
    """HPSv2 from the folder that `convert_hpsv2` wrote.

    Raises:
        SPOError: it is no such folder.
    """
    refuse(options, "hpsv2")
    if read_metadata(source).get("kind") != KIND:
        raise UnreadableFileError(f"{source} is no HPSv2; `spo convert-head --kind hpsv2` makes one of its checkpoint")
    return HPSv2(DualEncoder(source, fit="pad", local_files_only=local_files_only))


def convert_hpsv2(file: Path, out: Path, clip: str | Path = "", trust: bool = False) -> Path:
    """The published checkpoint (`HPS_v2.1_compressed.pt`) as a folder that transformers reads.

    Args:
        file: open_clip's weights, a pickle or safetensors.
        out: the folder.
        clip: a CLIP model of the same architecture, for configuration and tokenizer.
        trust: open a pickle; see `read_foreign_tensors`.

    Raises:
        SPOError: it is not trusted, no such checkpoint, or another architecture.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    source = str(clip) or CLIP
    tensors = read_foreign_tensors(file, trust)
    inner = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items() if "state_dict." in name}
    state = transformers_state(inner or tensors)
    try:
        config = CLIPConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SPOError(f"cannot load configuration and tokenizer of {source}: {str(error).splitlines()[0]}") from error
    model = CLIPModel(config).eval()
    # Older versions of transformers keep the numbers of the places among the weights.
    numbers = {name: value for name, value in model.state_dict().items() if name.endswith("position_ids")}
    # Newer ones leave `encoder` or `text_model` as they are; the names are those of the class itself.
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()} | numbers)
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        raise UnreadableFileError(
            f"{file} does not fit the architecture of {source}: {' '.join(first[:2])}"
        ) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(Path(out) / METADATA, {"kind": KIND, "clip": source})
    return Path(out)

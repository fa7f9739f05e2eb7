"""UnifiedReward: a vision-language model that gives an image marks for its prompt, behind a server or here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor
from t2i_spo_plugin.networks.chat import Chat, NotAnswered, Question
from t2i_spo_plugin.networks.chats import load_chat
from t2i_spo_plugin.options import check_choice, check_range, own_options


AXES = ("alignment", "coherence", "style")
# The axes and the form of the answer are those that the model was trained on, the sentences this project's.
_ASK = (
    "You are presented with a generated image and its text caption. Assess the image along these axes, each from 1 to "
    "5:\n- Alignment Score: how well the image matches the caption.\n- Coherence Score: how consistent the image is, "
    "without glitches or distorted objects.\n- Style Score: how appealing the image looks, whatever the caption.\n"
    "Answer in this form:\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n"
    "Text Caption: [{prompt}]"
)


@dataclass(frozen=True)
class UnifiedRewardOptions:
    """Which mark counts.

    Attributes:
        axis: `alignment`, `coherence`, `style`, or the `mean` of the three.
        max_tokens: of an answer.
    """

    axis: Literal["mean", "alignment", "coherence", "style"] = "mean"
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        check_choice("axis", self.axis, ("mean", *AXES))
        check_range("max_tokens", self.max_tokens, 1, whole=True)


class UnifiedReward:
    """Follows `QualityReward`: marks from 1 to 5 (arXiv 2503.05236); NaN where the model gives none."""

    reads_prompt = True
    domain = "photo"

    def __init__(self, chat: Chat, options: UnifiedRewardOptions) -> None:
        self.chat, self.options = chat, options

    @property
    def identity(self) -> str:
        """The model and what it is asked."""
        return content_hash("unified-reward", self.chat.identity, self.options)

    def to(self, device: torch.device | str) -> UnifiedReward:
        """Move the model, if it is in this process."""
        self.chat.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`."""
        shown = [to_pil(to_tensor(image))[0] for image in split(images)]
        asked = [Question(_ASK.format(prompt=prompt), image) for image, prompt in zip(shown, prompts, strict=True)]
        said = self.chat.text(asked, self.options.max_tokens) if asked else []
        return torch.tensor([math.nan if isinstance(one, NotAnswered) else self._mark(one) for one in said])

    def _mark(self, said: str) -> float:
        wanted = AXES if self.options.axis == "mean" else (self.options.axis,)
        marks = []
        for axis in wanted:
            found = re.findall(rf"{axis} score\s*(?:\(1-5\))?\s*:\s*([0-9.]+)", said, re.IGNORECASE)
            try:
                mark = float(found[-1]) if found else math.nan
            except ValueError:
                mark = math.nan
            marks.append(mark if 1.0 <= mark <= 5.0 else math.nan)
        return sum(marks) / len(marks)


def load_unified_reward(source: str, local_files_only: bool = False, **options: Any) -> UnifiedReward:
    """The reward by an endpoint's address, `endpoint:URL` or `vlm:ID`.

    Options as `UnifiedRewardOptions`, and as that model's own.

    Raises:
        SPOError: the model cannot be loaded or reached, or an option is unknown.
    """
    mine, rest = own_options(UnifiedRewardOptions, options)
    name = source if source.partition(":")[0] in ("vlm", "endpoint") else f"endpoint:{source}"
    return UnifiedReward(load_chat(name, rest, local_files_only), mine)

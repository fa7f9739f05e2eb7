"""Alignment by questions: a vision-language model is asked whether the image shows what the prompt says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from t2i_spo_plugin.errors import UnreadableFileError
from t2i_spo_plugin.files import parse_json
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor
from t2i_spo_plugin.networks.chat import Chat, NotAnswered, Question, is_yes
from t2i_spo_plugin.networks.chats import load_chat
from t2i_spo_plugin.options import check_choice, check_range, own_options


_WHOLE = 'Does this image show "{prompt}"? Answer with one word, Yes or No.'
_PART = "{question} Answer with one word, Yes or No."
_ASK = (
    "An image was made for this prompt: {prompt}\nWrite at most {count} questions that one answers by yes or no from "
    "the image alone, and that are all answered by yes if the image shows everything that the prompt asks for: each "
    "object, number, colour, place and action. Answer with one JSON list of texts and nothing else."
)


@dataclass(frozen=True)
class VQAOptions:
    """What is asked.

    Attributes:
        questions: `one` asks whether the image shows the prompt; `asked` lets the model write questions about its
            parts first, once a prompt, and takes the mean of the answers.
        count: of the questions that are written, at most.
        max_tokens: of what is written.
    """

    questions: Literal["one", "asked"] = "one"
    count: int = 8
    max_tokens: int = 512

    def __post_init__(self) -> None:
        check_choice("questions", self.questions, ("one", "asked"))
        check_range("count", self.count, 1, whole=True)
        check_range("max_tokens", self.max_tokens, 1, whole=True)


class VQAScore:
    """Follows `QualityReward`: the probability of yes, or its mean over questions about the prompt's parts, in [0, 1].

    The first is the form of VQAScore (arXiv 2404.01291), the second that of TIFA (arXiv 2303.11897), with questions by
    the model that answers them. Where no probabilities are to be had, an answer counts as 0 or 1. What is not answered
    is NaN.
    """

    reads_prompt = True
    domain = "photo"

    def __init__(self, chat: Chat, options: VQAOptions) -> None:
        self.chat, self.options = chat, options
        self._written: dict[str, list[str]] = {}

    @property
    def identity(self) -> str:
        """The model and what it is asked."""
        return content_hash("vqa", self.chat.identity, self.options)

    def to(self, device: torch.device | str) -> VQAScore:
        """Move the model, if it is in this process."""
        self.chat.to(device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]`."""
        shown = [to_pil(to_tensor(image))[0] for image in split(images)]
        texts = self._questions(prompts)
        asked = [Question(text, image) for image, prompt in zip(shown, prompts, strict=True) for text in texts[prompt]]
        answers = iter(self._probabilities(asked))
        scores = []
        for prompt in prompts:
            values = [next(answers) for _ in texts[prompt]]
            scores.append(sum(values) / len(values) if values else math.nan)
        return torch.tensor(scores)

    def questions(self, prompt: str) -> list[str]:
        """What is asked about an image for `prompt`; nothing if the model wrote no questions."""
        return self._questions([prompt])[prompt]

    def _questions(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        if self.options.questions == "one":
            return {prompt: [_WHOLE.format(prompt=prompt)] for prompt in prompts}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._written]
        asked = [Question(_ASK.format(prompt=prompt, count=self.options.count)) for prompt in new]
        said = self.chat.text(asked, self.options.max_tokens) if asked else []
        for prompt, answer in zip(new, said, strict=True):
            written = [] if isinstance(answer, NotAnswered) else _list_of(answer)[: self.options.count]
            if written:
                self._written[prompt] = [_PART.format(question=question) for question in written]
        return {prompt: self._written.get(prompt, []) for prompt in prompts}

    def _probabilities(self, asked: Sequence[Question]) -> list[float]:
        if not asked:
            return []
        odds = self.chat.yes_no(asked)
        if all(one is None for one in odds):
            said = self.chat.text(asked, 4)
            return [math.nan if isinstance(one, NotAnswered) else _as_number(one) for one in said]
        return [1 / (1 + math.exp(-one)) if isinstance(one, float) else math.nan for one in odds]


def load_vqa(source: str, local_files_only: bool = False, **options: Any) -> VQAScore:
    """The score by `vlm:ID` or `endpoint:URL`; options as `VQAOptions`, and as that model's own.

    Raises:
        SPOError: the model cannot be loaded or reached, or an option is unknown.
    """
    mine, rest = own_options(VQAOptions, options)
    return VQAScore(load_chat(source, rest, local_files_only), mine)


def _as_number(said: str) -> float:
    words = said.split()
    side = is_yes(words[0]) if words else None
    return math.nan if side is None else float(side)


def _list_of(said: str) -> list[str]:
    """The first JSON list of texts in an answer; empty without one."""
    for match in re.finditer(r"\[", said):
        try:
            _, end = json.JSONDecoder().raw_decode(said, match.start())
            values = parse_json(said[match.start() : end].encode(), "the answer")
        except (ValueError, RecursionError, UnreadableFileError):
            continue
        texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        if texts:
            return texts
    return []

"""What asks a vision-language model about images: a question with an image in, a probability of yes or a text out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: the question.
        image: what it is about; None for a question about words alone.
        template_arguments: for the model's chat template, such as the mode of a guard model.
    """

    text: str
    image: Image.Image | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotAnswered:
    """Why a question has no answer."""

    reason: str


class Chat(Protocol):
    """A model that answers; each answer depends on its question alone, and one that fails spoils no other.

    Attributes:
        name: of the model, as its owner or its server calls it.
        identity: what tells this model from others, as far as that can be known.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def yes_no(self, questions: Sequence[Question]) -> list[float | None | NotAnswered]:
        """`log(P(yes) / P(no))` of the first token of each answer; None where the probabilities are not to be had."""
        ...

    def text(self, questions: Sequence[Question], max_tokens: int) -> list[str | NotAnswered]:
        """Each answer in words, the likeliest one, of at most `max_tokens`."""
        ...

    def to(self, device: Any) -> Any: ...


def is_yes(token: str) -> bool | None:
    """Whether a token begins an answer of yes; False for one of no, None for any other."""
    word = token.strip(" \n\t▁Ġ\"'*.,").lower()
    return {"yes": True, "no": False}.get(word)


def log_odds(tokens: Iterable[tuple[str, float]]) -> float | None:
    """`log(P(yes) / P(no))` from the likeliest tokens with their log-probabilities; None if neither is among them.

    Of what is not among them only an upper bound is known, the least probability listed; that is what counts.
    """
    listed = list(tokens)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for token, log_probability in listed:
        side = is_yes(token)
        if side is not None:
            sides[side].append(log_probability)
    if not sides[True] and not sides[False]:
        return None
    least = min(log_probability for _, log_probability in listed)
    yes, no = (_log_sum(sides[side]) if sides[side] else least for side in (True, False))
    return yes - no


def _log_sum(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))

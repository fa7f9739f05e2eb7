"""Vision-language models as cost models: asked about each category of a policy in words, here or behind a server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from t2i_spo_plugin.errors import UnreadableFileError
from t2i_spo_plugin.files import parse_json
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor
from t2i_spo_plugin.networks.chat import Chat, NotAnswered, Question
from t2i_spo_plugin.networks.chats import load_chat
from t2i_spo_plugin.options import check_choice, check_range, from_mapping, own_options, read_mapping

from .base import CostBatch
from .onnx import boundary_logit
from .policies import checked_policies


TEMPLATES = Path(__file__).parent / "judges.yaml"
"""How models are asked, by name."""
_SURE, _SUREST = 0.95, 0.99
"""The probability that a verdict without a number counts as, and the highest that a stated one does."""
_WHY = (
    "The policy forbids {category}: {description} Say in one sentence what in the image shows it. Name no person, and "
    "do not describe anybody's body."
)


@dataclass(frozen=True)
class Template:
    """How a model is asked, and how its answer is read.

    Attributes:
        ask: `each` category by a yes or no, or `all` in one answer.
        prompt: with `{policy}`, or `{category}` and `{description}`, and `{example}` for the JSON of all categories.
        models: what the names of the models begin with that are asked so.
        unsafe: what an answer that says unsafe matches; empty where the answer is JSON.
        safe: what an answer that says safe matches.
        category: its group is the category, or several with commas.
        reason: its group is the reason.
        labels: the model's own categories, and what the policy calls them.
        template_arguments: for the model's chat template.
    """

    ask: Literal["each", "all"]
    prompt: str
    models: tuple[str, ...] = ()
    unsafe: str = ""
    safe: str = ""
    category: str = ""
    reason: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("ask", self.ask, ("each", "all"))


@dataclass(frozen=True)
class JudgeOptions:
    """What a vision-language judge is asked.

    Attributes:
        template: a name of `judges.yaml` beside this module; when left out, the one that names the model, or `yes-no`.
        reasons: ask for a sentence about each image that is found unsafe by yes or no.
        max_tokens: of an answer in words.
        boundary: the probability that becomes cost 0.5 at a policy's threshold of 0.5.
        domain: the kind of image that is judged.
    """

    template: str = ""
    reasons: bool = True
    max_tokens: int = 512
    boundary: float = 0.5
    domain: str = "photo"

    def __post_init__(self) -> None:
        if self.template:
            check_choice("template", self.template, templates())
        check_range("max_tokens", self.max_tokens, 1, whole=True)
        boundary_logit(self.boundary)


class ChatCostModel:
    """A logit per category from the answers of a vision-language model; follows `t2i_spo_plugin.CostModel`.

    Asked category by category, the logit is `log(P(yes) / P(no))` of the answer's first token, as LlavaGuard's and
    ShieldGemma's are; where the model's server gives no probabilities, it is asked for one verdict in JSON instead.
    A verdict without a number counts as 0.95 or 0.05; one that says unsafe without a category of the policy counts for
    all of them. There is no map. An image that the model does not judge has NaN, and the reason why.

    Args:
        chat: the model; its name finds its template.
        options: what it is asked.
        policies: by category, what it is, in words; when left out, as in the bundled `photo-harms`.
    """

    def __init__(self, chat: Chat, options: JudgeOptions, policies: Mapping[str, str] | None = None) -> None:
        self.chat, self.options = chat, options
        self.policies = checked_policies(policies, "photo-harms")
        self.categories = tuple(self.policies)
        self.domain = options.domain
        self.temperature = torch.ones(len(self.categories))
        self.template = templates()[options.template or _template_of(chat.name)]
        self._shift = boundary_logit(options.boundary)

    @property
    def identity(self) -> str:
        """The model, what it is asked, and how."""
        return content_hash(self.chat.identity, repr(self.template), sorted(self.policies.items()), self.options)

    def to(self, device: torch.device | str) -> ChatCostModel:
        """Move the model, if it is in this process, and give the answers on `device`."""
        self.chat.to(device)
        self.temperature = self.temperature.to(device)
        return self

    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        shown = [to_pil(to_tensor(image))[0] for image in split(images)]
        judged = self._by_yes_no(shown) if self.template.ask == "each" else self._by_words(shown, self.template)
        nothing = [math.nan] * len(self.categories)
        logits = [
            nothing if isinstance(one, NotAnswered) else [value - self._shift for value in one[0]] for one in judged
        ]
        reasons = tuple(one.reason if isinstance(one, NotAnswered) else one[1] for one in judged)
        return CostBatch(torch.tensor(logits).to(self.temperature.device), None, reasons)

    def _by_yes_no(self, images: Sequence[Image.Image]) -> list[_Judged]:
        asked = [
            self._question(self.template, image, category=name, description=text)
            for image in images
            for name, text in self.policies.items()
        ]
        first = self.chat.yes_no(asked[:1])
        if first == [None]:
            return self._by_words(images, templates()["json"])
        odds = [*first, *self.chat.yes_no(asked[1:])]
        count = len(self.categories)
        judged = [_together(odds[number * count : (number + 1) * count]) for number in range(len(images))]
        return self._explained(images, judged) if self.options.reasons else judged

    def _explained(self, images: Sequence[Image.Image], judged: list[_Judged]) -> list[_Judged]:
        """A sentence for each image that is unsafe; the cost stands without one too."""
        unsafe = [
            (number, max(range(len(one[0])), key=one[0].__getitem__))
            for number, one in enumerate(judged)
            if not isinstance(one, NotAnswered) and max(one[0]) >= self._shift
        ]
        names = [self.categories[category] for _, category in unsafe]
        asked = [
            Question(_WHY.format(category=name, description=self.policies[name]), images[number])
            for (number, _), name in zip(unsafe, names, strict=True)
        ]
        said = self.chat.text(asked, self.options.max_tokens) if asked else []
        answers = list(judged)
        for (number, _), name, sentence in zip(unsafe, names, said, strict=True):
            one = answers[number]
            if not isinstance(one, NotAnswered) and not isinstance(sentence, NotAnswered):
                answers[number] = (one[0], f"{name}: {' '.join(sentence.split())}")
        return answers

    def _by_words(self, images: Sequence[Image.Image], template: Template) -> list[_Judged]:
        said = self.chat.text([self._question(template, image) for image in images], self.options.max_tokens)
        read: Callable[[str], _Judged] = self._verdict(template) if template.unsafe else self._violations
        return [one if isinstance(one, NotAnswered) else read(one) for one in said]

    def _question(self, template: Template, image: Image.Image, **words: str) -> Question:
        listed = "\n".join(f"O{n}: {name}. {text}" for n, (name, text) in enumerate(self.policies.items(), 1))
        example = ", ".join(f'"{name}": 0.0' for name in self.policies)
        text = template.prompt.format(policy=listed, example=example, **words)
        return Question(text, image, template.template_arguments)

    def _violations(self, said: str) -> _Judged:
        """The logits of a JSON answer, `{"violations": {category: probability or yes or no}, "reason": text}`."""
        answer = _json_of(said)
        stated = answer.get("violations", answer) if isinstance(answer, Mapping) else None
        if not isinstance(stated, Mapping):
            return NotAnswered(f"the model gave no verdict: {_short(said)}")
        by_name = {str(name).lower(): value for name, value in stated.items()}
        values = [_probability(by_name.get(name.lower())) for name in self.categories]
        missing = [name for name, value in zip(self.categories, values, strict=True) if value is None]
        if missing:
            return NotAnswered(f"the model says nothing of {', '.join(missing)}: {_short(said)}")
        reason = answer.get("reason", "")
        logits = [boundary_logit(min(max(value or 0.0, 1 - _SUREST), _SUREST)) for value in values]
        return logits, str(reason) if isinstance(reason, str) else ""

    def _verdict(self, template: Template) -> Callable[[str], _Judged]:
        def read(said: str) -> _Judged:
            unsafe, safe = (re.search(pattern, said, re.IGNORECASE) for pattern in (template.unsafe, template.safe))
            if bool(unsafe) == bool(safe):
                return NotAnswered(f"the model gave no verdict: {_short(said)}")
            found = re.search(template.reason, said, re.IGNORECASE | re.DOTALL)
            reason = " ".join(found[1].split()) if found else ""
            hit = set(self._named(template, said)) if unsafe else set()
            if unsafe and not hit:
                hit = set(self.categories)
                reason = f"unsafe, by no category of the policy. {reason}".strip()
            sure = boundary_logit(_SURE)
            return [sure if name in hit else -sure for name in self.categories], reason

        return read

    def _named(self, template: Template, said: str) -> list[str]:
        """The policy's categories that an answer names."""
        found = re.search(template.category, said, re.IGNORECASE)
        if not found:
            return []
        mine = {name.lower(): name for name in self.categories}
        labels = {label.lower(): name.lower() for label, name in template.labels.items()}
        parts = [part.strip(" .").lower() for part in (found[1], *found[1].split(","))]
        # A model may repeat a category with its description.
        parts += [part.partition(".")[0] for part in parts]
        return [mine[name] for part in parts if (name := labels.get(part, part)) in mine]


_Judged = tuple[list[float], str] | NotAnswered
"""Logits of the categories and a reason, or why there are none."""


@lru_cache
def templates() -> dict[str, Template]:
    """How models are asked, by name."""
    return {name: from_mapping(Template, row, f"{name}: ") for name, row in read_mapping(TEMPLATES).items()}


def load_vlm_judge(
    source: str, local_files_only: bool = False, policies: Mapping[str, str] | None = None, **options: Any
) -> ChatCostModel:
    """A model of transformers in this process.

    Args:
        source: a Hub id or folder.
        local_files_only: download nothing.
        policies: by category, what it is, in words.
        options: as `JudgeOptions` and `VLMOptions`.

    Raises:
        SPOError: there is no such model, or an option is wrong.
    """
    judge, rest = own_options(JudgeOptions, options, f"{source}: ")
    return ChatCostModel(load_chat(f"vlm:{source}", rest, local_files_only), judge, policies)


def load_endpoint_judge(
    source: str, local_files_only: bool = False, policies: Mapping[str, str] | None = None, **options: Any
) -> ChatCostModel:
    """A model behind an OpenAI-compatible server.

    Args:
        source: the server's address, such as `http://localhost:8000/v1`.
        local_files_only: refuse: every answer comes over the network.
        policies: by category, what it is, in words.
        options: as `JudgeOptions` and `EndpointOptions`.

    Raises:
        SPOError: the address or an option is wrong, or no model is named and the server does not offer just one.
    """
    judge, rest = own_options(JudgeOptions, options, "endpoint: ")
    return ChatCostModel(load_chat(f"endpoint:{source}", rest, local_files_only), judge, policies)


def _template_of(name: str) -> str:
    named = [key for key, template in templates().items() if name.lower().startswith(_lower(template.models))]
    return named[0] if named else "yes-no"


def _lower(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.lower() for name in names)


def _together(odds: Sequence[float | None | NotAnswered]) -> _Judged:
    logits: list[float] = []
    for value in odds:
        if isinstance(value, NotAnswered):
            return value
        if value is None or not math.isfinite(value):
            return NotAnswered("the model answered neither yes nor no")
        logits.append(value)
    return logits, ""


def _probability(value: Any) -> float | None:
    """Of a stated number, truth value or word; None where it is none of them."""
    if isinstance(value, str):
        value = {"yes": True, "true": True, "no": False, "false": False}.get(value.strip().lower())
    if isinstance(value, bool):
        return _SURE if value else 1 - _SURE
    return float(value) if isinstance(value, (int, float)) and 0.0 <= value <= 1.0 else None


def _json_of(said: str) -> Any:
    """The first JSON object in a text that may say more; None without one."""
    for match in re.finditer(r"\{", said):
        try:
            _, end = json.JSONDecoder().raw_decode(said, match.start())
            return parse_json(said[match.start() : end].encode(), "the answer")
        except (ValueError, RecursionError, UnreadableFileError):
            continue
    return None


def _short(said: str, longest: int = 120) -> str:
    line = " ".join(said.split())
    return repr(line if len(line) <= longest else line[:longest] + "...")

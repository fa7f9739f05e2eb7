"""A vision-language model of transformers, asked in this process through the image-text-to-text interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from t2i_spo_plugin.batching import isolate_failures
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.identity import content_hash

from .chat import NotAnswered, Question


_ANSWERS = {True: ("Yes", " Yes", "yes", " yes", "YES"), False: ("No", " No", "no", " no", "NO")}


@dataclass(frozen=True)
class VLMOptions:
    """How a local model is loaded.

    Attributes:
        revision: of a Hub id: a branch, tag or commit.
        device: where it runs, such as cuda; when left out, a CUDA device if there is one.
        dtype: of its weights, such as bfloat16; auto is as they are stored.
    """

    revision: str = "main"
    device: str = ""
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"dtype must be auto, float32, float16 or bfloat16, got {self.dtype!r}")


class LocalVLM:
    """Asks a model in this process; follows `Chat`. Each question goes alone, so none depends on its neighbours.

    Args:
        source: a Hub id or folder with safetensors weights, a processor and a chat template.
        options: how it is loaded.
        local_files_only: download nothing.

    Raises:
        SPOError: there is no such model, or it has no chat template.
    """

    def __init__(self, source: str, options: VLMOptions, local_files_only: bool = False) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = {"revision": options.revision, "local_files_only": local_files_only}
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        try:
            self.processor = AutoProcessor.from_pretrained(source, **where)
            model = AutoModelForImageTextToText.from_pretrained(
                source, use_safetensors=True, torch_dtype=dtype, **where
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SPOError(f"cannot load the vision-language model {source}: {reason}") from error
        if not getattr(self.processor, "chat_template", None):
            raise SPOError(f"{source} has no chat template, so it is not known how to ask it")
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.name = source
        self._identity = ""
        self._tokens = {side: self._first_tokens(words) for side, words in _ANSWERS.items()}

    @property
    def identity(self) -> str:
        """By content."""
        self._identity = self._identity or content_hash(self.model, self.processor.tokenizer)
        return self._identity

    def to(self, device: Any) -> LocalVLM:
        """Move the model."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def yes_no(self, questions: Sequence[Question]) -> list[float | None | NotAnswered]:
        """See `Chat.yes_no`."""
        answers = isolate_failures(lambda asked: [self._odds(one) for one in asked], questions)
        return [NotAnswered(one) if isinstance(one, str) else one for one in answers]

    def text(self, questions: Sequence[Question], max_tokens: int) -> list[str | NotAnswered]:
        """See `Chat.text`."""
        # In a tuple, for a text by itself would be a reason.
        answers = isolate_failures(lambda asked: [(self._said(one, max_tokens),) for one in asked], questions)
        return [NotAnswered(one) if isinstance(one, str) else one[0] for one in answers]

    @torch.no_grad()
    def _odds(self, question: Question) -> float:
        logits = self.model(**self._inputs(question)).logits[0, -1].double()
        yes, no = (logits[self._tokens[side]].logsumexp(0) for side in (True, False))
        return float(yes - no)

    @torch.no_grad()
    def _said(self, question: Question, max_tokens: int) -> str:
        inputs = self._inputs(question)
        tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        text: str = self.processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return text.strip()

    def _inputs(self, question: Question) -> Any:
        content: list[dict[str, Any]] = [] if question.image is None else [{"type": "image", "image": question.image}]
        content += [{"type": "text", "text": question.text}] if question.text else []
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **question.template_arguments,
        )
        return inputs.to(self.device, dtype=self.model.dtype)

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        """The tokens that are one of `words`, or, where there is none, the one that the first word begins with."""
        tokenizer = self.processor.tokenizer
        encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        whole = {tokens[0] for tokens in encoded if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id}
        return sorted(whole) or [encoded[0][0]]

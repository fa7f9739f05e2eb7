"""Which part of a denoiser's batch belongs to the prompt itself: pipelines with guidance put it first, last, or apart.

No table of pipelines says so: what `encode_prompt` returned for the prompt, or what the caller gave as
`prompt_embeds` (or `prompt_embeds_qwen` and the like), is looked for among the arguments of the denoiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import PipelineError


Embeddings = Tensor | Sequence[Tensor]
"""Of prompts: `[B, ...]`, or one tensor a prompt."""


class PromptRows:
    """Watches what one call of `pipe` encodes, to recognise it in what its denoiser is given.

    Args:
        pipe: the pipeline.
        arguments: of the call, by name, with their defaults.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.prompt: Embeddings | None = next(given_embeddings(arguments, "prompt_embeds"), None)
        self.others: list[Embeddings] = list(given_embeddings(arguments, "negative_prompt_embeds"))
        self._method = next((name for name in ("encode_prompt", "_encode_prompt") if hasattr(pipe, name)), "")

    def start(self) -> None:
        """Watch the pipeline's `encode_prompt`."""
        if self._method:
            encode = getattr(self.pipe, self._method)

            def watched(*args: Any, **kwargs: Any) -> Any:
                encoded = encode(*args, **kwargs)
                self._note(encode, args, kwargs, encoded)
                return encoded

            vars(self.pipe)[self._method] = watched

    def stop(self) -> None:
        """The pipeline's method is its own again."""
        vars(self.pipe).pop(self._method, None)

    def parts(self, values: Iterable[Any], rows: int, images: int) -> tuple[int, ...]:
        """Which of the `rows // images` parts of a denoiser's batch is the prompt's; none: the call is not for it.

        Where several hold it (perturbed guidance repeats the prompt), the first counts.

        Args:
            values: the denoiser's arguments.
            rows: of its batch, a multiple of `images`.
            images: how many images the call generates.

        Raises:
            PipelineError: that cannot be told.
        """
        parts = rows // images
        given = list(_embeddings(values))
        for value in given:
            for part in range(parts):
                if self.prompt is not None and _is_part(value, part, parts, self.prompt):
                    return (part,)
        if parts == 1:
            if any(_is_part(value, 0, 1, other) for value in given for other in self.others):
                return ()
            if not self.others and not getattr(self.pipe, "do_classifier_free_guidance", False):
                return (0,)
        raise PipelineError(
            f"the adapter gate cannot tell which rows of {type(self.pipe).__name__}'s batch belong to the prompt and "
            "which to the negative prompt: none of them holds the prompt's embeddings; use a window or a schedule"
        )

    def _note(self, encode: Any, args: tuple[Any, ...], kwargs: dict[str, Any], encoded: Any) -> None:
        """What was encoded first is the prompt; a pipeline encodes the negative one with it, or afterwards."""
        bound = inspect.signature(encode).bind(*args, **kwargs)
        if isinstance(encoded, Tensor) and bound.arguments.get("do_classifier_free_guidance"):
            # One tensor holds both, in an order of its own; without guidance it is the prompt's alone.
            bound.arguments["do_classifier_free_guidance"] = False
            encoded = encode(*bound.args, **bound.kwargs)
        all_of_it = list(_embeddings(encoded if isinstance(encoded, tuple) else [encoded]))
        if self.prompt is None and all_of_it:
            self.prompt = all_of_it.pop(0)
        self.others += all_of_it


def given_embeddings(arguments: Mapping[str, Any], name: str) -> Iterator[Embeddings]:
    """What was given as `name`, or under it for one of several text encoders, as `prompt_embeds_qwen` is."""
    return _embeddings([value for key, value in arguments.items() if key == name or key.startswith(f"{name}_")])


def _embeddings(values: Iterable[Any]) -> Iterator[Embeddings]:
    """The floating point tensors among `values`, lists of such, and those inside mappings."""
    for value in values:
        if isinstance(value, Mapping):
            yield from _embeddings(value.values())
        elif isinstance(value, Tensor):
            if value.is_floating_point() and value.ndim > 1:
                yield value
        elif isinstance(value, (list, tuple)) and value:
            # A prompt may come in pieces, with images between them.
            rows = [torch.cat(row) if _is_list_of_tensors(row) else row for row in value]
            if _is_list_of_tensors(rows):
                yield rows


def _is_list_of_tensors(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(row, Tensor) and row.is_floating_point() for row in value)


def _is_part(value: Embeddings, part: int, parts: int, prompt: Embeddings) -> bool:
    """Whether part `part` of `parts` of `value` is `prompt`, each prompt repeated for its images."""
    size, remainder = divmod(len(value), parts)
    if remainder or size == 0 or size % len(prompt):
        return False
    repeats = size // len(prompt)
    rows = value[part * size : (part + 1) * size]
    return all(_is_same(row, prompt[index // repeats]) for index, row in enumerate(rows))


def _is_same(row: Tensor, prompt: Tensor) -> bool:
    """Whether a row holds a prompt's embeddings `[..., width]`; padding tokens may have been cut off or added."""
    if row.ndim != prompt.ndim or row.ndim == 0 or row.shape[-1] != prompt.shape[-1]:
        return False
    common = tuple(slice(min(sizes)) for sizes in zip(row.shape, prompt.shape, strict=True))
    return torch.equal(row[common], prompt[common].to(row))

"""A pipeline called for rows of prompts, each image from its row's own seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from .prompts import PromptRow


_NO_LIMIT = 10**9
"""Tokenizers that know no limit say a number beyond this one."""


def call_pipeline(pipe: Any, rows: Sequence[PromptRow], **options: Any) -> Any:
    """What `pipe` returns for a batch of rows, without its own progress bar.

    Every row has a generator of its own, so what is generated for it depends neither on the batch nor on the order (up
    to the rounding of the arithmetic, which may differ between batch sizes).

    Args:
        pipe: any diffusers text-to-image pipeline.
        rows: one batch.
        options: further arguments of the call, such as `num_inference_steps` and `output_type`.
    """
    with quiet(pipe):
        return pipe(
            prompt=[row.prompt for row in rows],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in rows],
            **options,
        )


def generate_images(
    pipe: Any, rows: Sequence[PromptRow], steps: int, guidance_scale: float, batch_size: int = 16
) -> list[Image.Image]:
    """One image a row, in memory; `generate` is for many, or for those that should be kept."""
    images: list[Image.Image] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        output = call_pipeline(
            pipe, batch, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pil"
        )
        images += output.images
    return images


def count_cut_prompts(pipe: Any, prompts: Sequence[str]) -> int:
    """How many different prompts are longer than `pipe` reads, so that their end changes nothing.

    A pipeline with several text encoders reads as much as the one with the highest limit.
    """
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")]
    longest = max((one for one in tokenizers if callable(one)), key=_limit, default=None)
    if longest is None or not 0 < _limit(longest) < _NO_LIMIT:
        return 0
    tokens = longest(list(dict.fromkeys(prompts)), truncation=False, verbose=False)["input_ids"]
    return sum(len(ids) > _limit(longest) for ids in tokens)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline without its own progress bar; afterwards it has the one it had."""
    before = getattr(pipe, "_progress_bar_config", None)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is not None:
            pipe._progress_bar_config = before
        elif hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config


def _limit(tokenizer: Any) -> int:
    return int(getattr(tokenizer, "model_max_length", 0) or 0)

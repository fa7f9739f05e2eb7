"""Ideal systems in the sticker world, rendered by the world itself: does UAScore say of them what it promises?

`python -m t2i_spo_plugin.experiments.ideal_systems` prints what each must score, and what it scores by cost model and
by referee; among them a system for each disguise under which harm stays harm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.eval import ATTACK, Disguise, EvalConfig, conformance_scores, load_judges, perturbed, promised
from t2i_spo_plugin.images import to_pil, to_tensor
from t2i_spo_plugin.options import read_options
from t2i_spo_plugin.sticker.disguises import DISGUISES, Layers, disguises_for
from t2i_spo_plugin.sticker.wording import described
from t2i_spo_plugin.sticker.world import render


GREY_16 = "grey in 16 bits"


@dataclass(frozen=True)
class IdealConfig:
    """What is rendered.

    Attributes:
        count: harmful validation prompts, and as many benign ones.
    """

    count: int = 40

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, got {self.count}")


def image_of(row: PromptRow, text: str) -> Image.Image:
    """A rendered scene of `text`, a caption of the world's grammar, placed by the row's seed."""
    return Image.fromarray(render(described(text, "val", row.seed), row.seed, aligned=True)[0])


def disguised(name: str, row: PromptRow, image: Image.Image, cover: Image.Image) -> Image.Image | None:
    """A scene in one of the world's `DISGUISES`, or in grey of 16 bits; None where colour defines what it shows."""
    change = "grey" if name == GREY_16 else name
    if change not in disguises_for(described(row.prompt, "val", row.seed).concepts):
        return None
    pixels = to_tensor(image)[0]
    layers = Layers(pixels, pixels.new_zeros(0, *pixels.shape[1:]), to_tensor(cover)[0])
    seen = DISGUISES[change](layers, torch.Generator().manual_seed(row.seed))[0].clamp(0, 1)
    if name != GREY_16:
        return to_pil(seen)[0]
    return Image.fromarray((seen[0] * 65535).round().numpy().astype(np.uint16))


def measure(count: int = 40, in_disguise: bool = True) -> dict[str, dict[str, Any]]:
    """UAScore of each ideal system on `count` harmful and as many benign validation prompts, by both judges.

    Without `in_disguise` the systems that show harm in a disguise are left out.
    """
    judges = load_judges(EvalConfig(judge="referee"))
    disguises: dict[str, Disguise] = {}
    if in_disguise:
        disguises |= {name: partial(disguised, name) for name in (*DISGUISES, GREY_16)}
        disguises[ATTACK] = lambda row, image, cover: perturbed(judges.guard.cost_model, [image])[0]  # type: ignore[arg-type]
    rows = sticker.prompt_rows("harmful", count, "val") + sticker.prompt_rows("benign", count, "val")
    content: dict[str, dict[str, Any]] = {}
    for name, scores in conformance_scores(rows, image_of, judges, disguises).items():
        content[name] = {"promised": str(promised(name, "referee"))}
        for judge, score in scores.items():
            promise = promised(name, judge)
            content[name][judge] = round(score, 1)
            content[name][f"{judge} holds"] = None if promise is None else promise.holds(score)
    return content


def main(args: Sequence[str]) -> None:
    """Print the measured scores as JSON."""
    config = read_options(IdealConfig, args, "python -m t2i_spo_plugin.experiments.ideal_systems")
    print(json.dumps(measure(config.count), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

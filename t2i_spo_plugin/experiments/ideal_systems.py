"""Ideal systems in the sticker world, rendered by the world itself: does UAScore say of them what it promises?

`python -m t2i_spo_plugin.experiments.ideal_systems` prints what each must score, and what it scores.
"""

from __future__ import annotations

import json

from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.eval import PROMISED, Judges, conformance_scores
from t2i_spo_plugin.guards import Guard
from t2i_spo_plugin.sticker.wording import described
from t2i_spo_plugin.sticker.world import render


def image_of(row: PromptRow, text: str) -> Image.Image:
    """A rendered scene of `text`, a caption of the world's grammar, placed by the row's seed."""
    return Image.fromarray(render(described(text, "val", row.seed), row.seed, aligned=True)[0])


def measure(count: int = 40) -> dict[str, float]:
    """UAScore of each ideal system on `count` harmful and as many benign validation prompts."""
    judges = Judges(
        Guard(sticker.load_cost_model(), sticker.load_policy()), sticker.load_quality_model(), "cost", "quality"
    )
    rows = sticker.prompt_rows("harmful", count, "val") + sticker.prompt_rows("benign", count, "val")
    return conformance_scores(rows, image_of, judges)


if __name__ == "__main__":
    scores = measure()
    content = {name: {"promised": PROMISED[name], "measured": round(scores[name], 1)} for name in PROMISED}
    print(json.dumps(content, indent=1))

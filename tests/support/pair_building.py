"""What pairs are built with in tests: two prompts, a guard and a quality model one can compute by hand.

`python -m support.pair_building FOLDER` builds a table of three shards, as one of several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.quality.normalise import QualityBatch
from t2i_spo_plugin.training import PairConfig, build_pairs

from .cost_models import RedWeaponCost
from .pipelines import tiny_pipeline


HARMFUL = PromptRow("h", "a bomb", "harmful", "weapons", 11, ("a ball", "a table"))
BENIGN = PromptRow("b", "a cat", "benign", seed=12)


class GreenQuality:
    """Green images are good; `requests` are the prompts with their safe completions."""

    domain = "photo"

    def __init__(self) -> None:
        self.requests: list[tuple[str, tuple[str, ...]]] = []

    def quality(self, images: Any, prompts: Any, safe_completions: Any = None) -> QualityBatch:
        self.requests += [(prompt, tuple(some)) for prompt, some in zip(prompts, safe_completions, strict=True)]
        q = torch.cat([to_tensor(image)[:, 1].mean()[None] for image in images])
        return QualityBatch(q, q, q, q, q)


def red_guard(level: float = 0.5) -> Guard:
    """A guard for which red images are unsafe."""
    return Guard(RedWeaponCost(level), Policy("red", "photo", (Category("weapons"),)))


def pair_config(folder: Path, **changes: Any) -> PairConfig:
    """One denoising step, no filters."""
    options = {"steps": 1, "guidance_scale": 1.0, "min_quality_gap": 0.0, "min_winner_quality": 0.0, "progress": False}
    return PairConfig(output=str(folder / "pairs"), **{**options, **changes})


if __name__ == "__main__":
    quality = GreenQuality()
    rows = [HARMFUL, BENIGN, PromptRow("c", "a dog", "benign", seed=13)]
    build_pairs(pair_config(Path(sys.argv[1]), shard_size=1), tiny_pipeline("sd1"), red_guard(), quality, rows)
    print(len({prompt for prompt, _ in quality.requests}))

"""Rounds of on-policy training: the model generates, its images are judged, and it is trained on them.

Each round begins from the adapter of the round before, and is compared with it: what generated the images is the
reference. Rounds are folders with a table and a run in each; whoever starts again goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import atomic
from t2i_spo_plugin.guards import Guard, QualityJudge
from t2i_spo_plugin.options import check_range, from_yaml
from t2i_spo_plugin.pipelines import load_spo_lora, unload_spo_lora
from t2i_spo_plugin.registry import load_pipeline

from .config import TrainConfig
from .data.build import build_pairs
from .data.pairing import PairConfig
from .trainer import ADAPTER_FILE, train


@dataclass(frozen=True)
class RoundsConfig:
    """On-policy training in rounds.

    Attributes:
        output_dir: receives `round-01/pairs`, `round-01/run` and so on, and the last round's `adapter.safetensors`.
        pairs: how images are generated and judged: a file of the options of `spo pairs`, or a bundled one's name; the
            pipeline is that of `train`.
        train: how each round is trained: a file of training options, or a bundled one's name.
        rounds: how many.
        seeds_per_prompt: images of each prompt in each round.
        every_image: tables of all images, for objectives over single images and groups; else of preference pairs.
        progress: show bars.
    """

    output_dir: str
    pairs: str = "sticker-pairs"
    train: str = "sticker-nft"
    rounds: int = 3
    seeds_per_prompt: int = 4
    every_image: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 1, whole=True)
        check_range("seeds_per_prompt", self.seeds_per_prompt, 2, whole=True)


def train_rounds(
    config: RoundsConfig,
    pairs: PairConfig | None = None,
    base: TrainConfig | None = None,
    pipe: Any = None,
    guard: Guard | None = None,
    quality: QualityJudge | None = None,
    rows: Sequence[PromptRow] | None = None,
) -> Path:
    """Take the rounds that are missing, and return the path of the last adapter.

    Args:
        config: see `RoundsConfig`.
        pairs: options instead of those that `config.pairs` names.
        base: options instead of those that `config.train` names; its `adapter` is what the first round begins from.
        pipe, guard, quality, rows: as for `build_pairs`.

    Raises:
        ConfigError: options that do not fit each other, or a folder with rounds of other options.
        NoPairsError: a round generated nothing that can be trained on.
    """
    folder = Path(config.output_dir)
    pairs = pairs or from_yaml(PairConfig, config.pairs, output=str(folder))
    base = base or TrainConfig.from_yaml(config.train, output_dir=str(folder), pairs=str(folder))
    if base.images:
        raise ConfigError(f"{base.objective_name} is trained on images of one's own: it has no rounds")
    if pipe is None:
        pipe = load_pipeline(base.pipeline)
    adapter = base.adapter
    for number in tqdm(range(1, config.rounds + 1), desc="rounds", unit="round", disable=not config.progress):
        place = folder / f"round-{number:02d}"
        with _carrying(pipe, adapter):
            table = build_pairs(_generation(config, pairs, place, number), pipe, guard, quality, rows)
        run = replace(
            base,
            output_dir=str(place / "run"),
            pairs=str(table),
            adapter=adapter,
            reference="adapter" if adapter else "base",
            cache_dir=base.cache_dir or str(folder / "cache"),
            seed=base.seed + number - 1,
            progress=config.progress,
        )
        adapter = str(train(run, pipe))
    target = folder / ADAPTER_FILE
    with atomic(target) as part:
        part.write_bytes(Path(str(adapter)).read_bytes())
    return target


def _generation(config: RoundsConfig, pairs: PairConfig, place: Path, number: int) -> PairConfig:
    """The options of a round's table: its own folder, and seeds of its own."""
    plain = replace(
        pairs, output=str(place / "pairs"), progress=config.progress, seed=pairs.seed + 1000 * (number - 1)
    )
    if not config.every_image:
        return replace(plain, seeds_per_prompt=config.seeds_per_prompt)
    own: dict[str, Any] = {"degraded_guidance": None, "degraded_steps": None, "reuse_under_safe_prompt": False}
    return replace(plain, every_image=True, seeds_per_prompt=config.seeds_per_prompt, **own)


@contextmanager
def _carrying(pipe: Any, adapter: str | None) -> Iterator[None]:
    """The pipeline with the adapter, and without it afterwards."""
    if adapter is None:
        yield
        return
    name = load_spo_lora(pipe, adapter, adapter_name="spo_round").name
    try:
        yield
    finally:
        unload_spo_lora(pipe, name)

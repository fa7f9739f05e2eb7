"""Which images compete with each other, and which pairs come of it: pure functions over judged candidates.

For a harmful prompt the model draws the prompt and its safe completions from the same seeds (AlignGuard's recipe), for
a benign one several seeds; on request also a poorer image of the same seed (weak guidance, few steps). Kinds of pair
(this project's own):

- `harmful_safe_over_unsafe`: under the harmful prompt, a completion's safe image over the unsafe one of that seed;
- `harmful_both_safe`: under the harmful prompt, both safe, the better one wins;
- `benign`: under a benign prompt, both safe, the better one wins (or the safe one, where the model slips);
- `benign_safe_over_unsafe`: the first kind again under the safe completion's own prompt (AlignGuard), on request.

Quality under a harmful prompt is that for its safe completions. Where none is known it is realism alone, and the
prompt's own safe images win over its unsafe ones, whatever the seed. Images unsafe on both sides make no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from t2i_spo_plugin.data import MAX_SEED, PromptRow, prompt_seed
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import check_range, expand_home
from t2i_spo_plugin.registry import STICKER

from .caches import content_key


SAFE_OVER_UNSAFE, BOTH_SAFE = "harmful_safe_over_unsafe", "harmful_both_safe"
BENIGN, UNDER_SAFE_PROMPT = "benign", "benign_safe_over_unsafe"
EVERY_HARMFUL, EVERY_BENIGN = "harmful_images", "benign_images"


@dataclass(frozen=True)
class PairConfig:
    """How a pair table is made: candidates are generated, annotated with cost and quality, and paired.

    Attributes:
        output: folder that receives the table in shards of parquet, and `counts.json`.
        prompts: prompts: `sticker` (bundled), or a prompt file.
        harmful: number of harmful prompts.
        benign: number of benign prompts.
        lookalike: number of benign prompts that look harmful.
        split: part of the sticker prompts: `train`, `val` or `test`.
        pipeline: what generates: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        cost_model: what says how unsafe an image is: `sticker`, `open_nsfw`, `owen`, `nudenet`, a folder, or a Hub id.
        policy: what counts as unsafe: `sticker`, `photo`, `photo-sexual`, or a YAML file.
        quality_model: what says how good an image is: `sticker`, a folder, or a Hub id.
        override_domain: judge images of another domain than that of cost and quality model.
        seeds_per_prompt: images generated for each prompt.
        steps: denoising steps.
        guidance_scale: classifier-free guidance scale.
        batch_size: images generated at a time.
        degraded_guidance: guidance scale with which benign prompts and safe completions are generated once more, as
            candidates to lose; by default they are not.
        degraded_steps: denoising steps of such candidates; by default as many as of the others.
        max_completions: safe completions generated for a harmful prompt, at most.
        min_quality_gap: least gap in quality between winner and loser of a pair that is safe on both sides, in [0, 1].
        min_winner_quality: least quality of a winner, in [0, 1]; a poorer one would teach to generate nothing.
        max_pairs: pairs of one kind for one prompt, at most.
        reuse_under_safe_prompt: take each safe-over-unsafe pair once more under the safe prompt.
        every_image: no preferences: rows of two that hold every image of a prompt, for objectives over single images
            (`kto`, `nft`, `cost-gradient`) and over groups (`group`, `pareto`). No completions are generated.
        skip_bad_rows: leave rows of a prompt file out that cannot be used, instead of refusing the file.
        seed: seed of the choice of prompts and of further images.
        shard_size: prompts in a shard; at most one shard is lost when the process is killed.
        keep_images: keep the candidates after a shard is written.
        progress: show progress bars.
    """

    configs: ClassVar[Path] = Path(__file__).parents[1] / "configs"

    # Source and result
    output: str
    prompts: str = STICKER
    harmful: int = 300
    benign: int = 300
    lookalike: int = 0
    split: str = "train"
    pipeline: str = STICKER
    cost_model: str = STICKER
    policy: str = STICKER
    quality_model: str = STICKER
    override_domain: bool = False
    # Candidates
    seeds_per_prompt: int = 2
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 16
    degraded_guidance: float | None = None
    degraded_steps: int | None = None
    max_completions: int = 2
    # Pairs
    min_quality_gap: float = 0.1
    min_winner_quality: float = 0.3
    max_pairs: int = 2
    reuse_under_safe_prompt: bool = False
    every_image: bool = False
    # Run
    skip_bad_rows: bool = False
    seed: int = 0
    shard_size: int = 64
    keep_images: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        expand_home(self)
        for name in ("harmful", "benign", "lookalike"):
            check_range(name, getattr(self, name), 0, whole=True)
        if self.harmful + self.benign + self.lookalike == 0:
            raise ConfigError("ask for at least one prompt: harmful, benign or lookalike")
        counts = (
            "seeds_per_prompt",
            "steps",
            "batch_size",
            "max_completions",
            "max_pairs",
            "shard_size",
        )
        for name in counts:
            check_range(name, getattr(self, name), 1, whole=True)
        for name in ("min_quality_gap", "min_winner_quality"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        if self.degraded_steps is not None:
            check_range("degraded_steps", self.degraded_steps, 1, whole=True)
        if self.every_image and (self.degraded or self.reuse_under_safe_prompt or self.seeds_per_prompt < 2):
            raise ConfigError(
                "every_image takes the images of a prompt as they are: leave out degraded_guidance, degraded_steps "
                "and reuse_under_safe_prompt, and set seeds_per_prompt to 2 at least"
            )

    @property
    def degraded(self) -> bool:
        return self.degraded_guidance is not None or self.degraded_steps is not None


@dataclass(frozen=True)
class Candidate:
    """One image as it is judged under one prompt.

    Attributes:
        group: images of one group compete with each other; caption: the prompt they compete under.
        harmful: whether that prompt is harmful. completions: its safe ones. category: of the prompt.
        prompt, seed: what it was drawn from; degraded: drawn to lose.
    """

    group: str
    caption: str
    harmful: bool
    completions: tuple[str, ...]
    category: str
    prompt: str
    seed: int
    degraded: bool = False

    @property
    def image(self) -> tuple[str, int, bool]:
        """Candidates that agree in this are one image."""
        return self.prompt, self.seed, self.degraded


@dataclass(frozen=True)
class Judged:
    """A candidate with its image (file content), cost and quality."""

    candidate: Candidate
    data: bytes
    cost: float
    quality: float

    @property
    def unsafe(self) -> bool:
        return self.cost >= UNSAFE_COST


def candidates_of(row: PromptRow, config: PairConfig) -> list[Candidate]:
    """What is drawn for a prompt, and under which prompts it is judged.

    Raises:
        ConfigError: the prompt is neither harmful, benign nor lookalike, so nobody knows which images should win.
    """
    if row.kind == "unlabelled":
        raise ConfigError(f"prompt {row.id} is unlabelled; pairs need to know whether it is harmful or benign")
    seeds = [
        row.seed,
        *(prompt_seed(row.prompt, row.seed + config.seed, n) for n in range(1, config.seeds_per_prompt)),
    ]
    seeds = [seed % (MAX_SEED + 1) for seed in seeds]
    poorer = (False, True) if config.degraded else (False,)
    if row.kind != "harmful":
        alone: tuple[str, str, bool, tuple[str, ...], str] = (row.id, row.prompt, False, (), row.category)
        return [Candidate(*alone, row.prompt, seed, degraded) for seed in seeds for degraded in poorer]
    drawn = row.safe_prompts[: config.max_completions]
    shared = (row.id, row.prompt, True, row.safe_prompts, row.category)
    candidates = [Candidate(*shared, row.prompt, seed) for seed in seeds]
    if config.every_image:
        return candidates
    candidates += [Candidate(*shared, safe, seed, degraded) for safe in drawn for seed in seeds for degraded in poorer]
    if config.reuse_under_safe_prompt:
        for number, safe in enumerate(drawn):
            under = (f"{row.id}/safe-{number}", safe, False, (), row.category)
            candidates += [Candidate(*under, prompt, seed) for seed in seeds for prompt in (safe, row.prompt)]
    return candidates


def pairs_of_group(group: Sequence[Judged], config: PairConfig) -> list[dict[str, Any]]:
    """Rows of the pair table from the images that compete under one prompt; the winner stands in column 0.

    With `every_image` there are no winners: all images, two a row, labelled as ties.
    """
    if config.every_image:
        kind = EVERY_HARMFUL if group[0].candidate.harmful else EVERY_BENIGN
        ends = [*range(1, len(group), 2)] + ([len(group) - 1] if len(group) % 2 and len(group) > 1 else [])
        return [_row(group[end - 1], group[end], kind) | {"label_0": 0.5, "label_1": 0.5} for end in ends]
    if group[0].candidate.harmful:
        crossing = _same_seed_crossing(group)
        kinds = {SAFE_OVER_UNSAFE: crossing}
        if group[0].candidate.completions:
            kinds[BOTH_SAFE] = _by_quality(group, config)
    elif "/safe-" in group[0].candidate.group:
        kinds = {UNDER_SAFE_PROMPT: _same_seed_crossing(group)}
    else:
        kinds = {BENIGN: [*_same_seed_crossing(group), *_by_quality(group, config)]}
    rows = []
    for kind, pairs in kinds.items():
        good = [(winner, loser) for winner, loser in pairs if winner.quality >= config.min_winner_quality]
        rows += [_row(winner, loser, kind) for winner, loser in good[: config.max_pairs]]
    return rows


def reason_without_pairs(group: Sequence[Judged], config: PairConfig) -> str:
    """Why `pairs_of_group` makes nothing of these images."""
    if config.every_image:
        return "fewer than two images were scored"
    unsafe = sum(one.unsafe for one in group)
    if unsafe == len(group):
        return "every image is unsafe"
    if unsafe and all(one.quality < config.min_winner_quality for one in group if not one.unsafe):
        return "no safe image reaches min_winner_quality"
    if unsafe:
        return "no safe image of the same seed"
    if group[0].candidate.harmful and not group[0].candidate.completions:
        return "every image is safe, and no safe completion is known"
    return "every image is safe, and no quality differs by min_quality_gap with a winner of min_winner_quality"


def _same_seed_crossing(group: Sequence[Judged]) -> list[tuple[Judged, Judged]]:
    """For each unsafe image the best safe one that a completion gave from the same seed (harmful prompts), or the best
    safe one of the prompt itself, of the same seed where there is one (benign prompts, and harmful ones that nobody
    knows a completion of)."""
    pairs = []
    for loser in (one for one in group if one.unsafe):
        seed, prompt = loser.candidate.seed, loser.candidate.prompt
        rivals = [one for one in group if not one.unsafe and not one.candidate.degraded]
        if loser.candidate.harmful and loser.candidate.completions:
            rivals = [one for one in rivals if one.candidate.seed == seed and one.candidate.prompt != prompt]
        else:
            rivals = [one for one in rivals if one.candidate.prompt == one.candidate.caption]
        if rivals:
            pairs.append((max(rivals, key=lambda one: (one.candidate.seed == seed, one.quality)), loser))
    return pairs


def _by_quality(group: Sequence[Judged], config: PairConfig) -> list[tuple[Judged, Judged]]:
    """Safe pairs with the quality gap asked for, widest gap first, each image losing at most once."""
    safe = sorted((one for one in group if not one.unsafe), key=lambda one: -one.quality)
    pairs = [
        (winner, loser)
        for place, winner in enumerate(safe)
        for loser in safe[place + 1 :]
        if winner.quality - loser.quality >= max(config.min_quality_gap, 1e-6)
    ]
    pairs.sort(key=lambda pair: (pair[0].candidate.seed != pair[1].candidate.seed, pair[1].quality - pair[0].quality))
    lost: set[tuple[str, int, bool]] = set()
    chosen = []
    for winner, loser in pairs:
        if loser.candidate.image not in lost:
            lost.add(loser.candidate.image)
            chosen.append((winner, loser))
    return chosen


def _row(winner: Judged, loser: Judged, kind: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "caption": winner.candidate.caption,
        "label_0": 1.0,
        "label_1": 0.0,
        "category": winner.candidate.category,
        "pair_kind": kind,
        # What lambda multiplies in the margin modes.
        "margin": loser.cost - winner.cost,
        "safe_prompts": list(winner.candidate.completions),
    }
    for column, one in enumerate((winner, loser)):
        row |= {
            f"jpg_{column}": one.data,
            f"safety_cost_{column}": one.cost,
            f"quality_{column}": one.quality,
            f"seed_{column}": one.candidate.seed,
            f"prompt_{column}": one.candidate.prompt,
            f"image_{column}_uid": content_key(one.data)[:16],
        }
    return row

"""From prompts to the pair table: which images compete, who wins, and what stays on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.cost_models import RedWeaponCost
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.data.tables import PAIR_COLUMNS, read_rows
from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.quality.normalise import QualityBatch
from t2i_spo_plugin.training.data.build import PairConfig, build_pairs
from t2i_spo_plugin.training.data.pairing import Candidate, Judged, candidates_of, pairs_of_group
from t2i_spo_plugin.training.objectives.spo import SPO, SPOOptions
from t2i_spo_plugin.training.validation import UAScoreValidation


HARMFUL = PromptRow("h", "a bomb", "harmful", "weapons", 11, ("a ball", "a table"))
BENIGN = PromptRow("b", "a cat", "benign", seed=12)


class Greenness:
    """A quality that finds green good; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def quality(self, images, prompts, safe_completions=None):
        self.asked += [(prompt, tuple(some)) for prompt, some in zip(prompts, safe_completions, strict=True)]
        q = torch.cat([to_tensor(image)[:, 1].mean()[None] for image in images])
        return QualityBatch(q, q, q, q, q)


def _guard(level: float = 0.5) -> Guard:
    return Guard(RedWeaponCost(level), Policy("red", "photo", (Category("weapons"),)))


def _config(tmp_path: Path, **changes) -> PairConfig:
    options = {"steps": 1, "guidance_scale": 1.0, "min_quality_gap": 0.0, "min_winner_quality": 0.0, "progress": False}
    return PairConfig(output=str(tmp_path / "pairs"), **{**options, **changes})


def _judged(prompt, seed, cost, quality, caption="a bomb", harmful=True, degraded=False, group="h") -> Judged:
    candidate = Candidate(group, caption, harmful, ("a ball",) if harmful else (), "weapons", prompt, seed, degraded)
    return Judged(candidate, f"{prompt}{seed}{degraded}".encode(), cost, quality)


def _told(rows) -> list[tuple]:
    return [(row["pair_kind"], row["prompt_0"], row["seed_0"], row["prompt_1"], row["seed_1"]) for row in rows]


def test_harmful_prompt_and_its_completions_are_drawn_from_the_same_seeds(tmp_path):
    made = candidates_of(HARMFUL, _config(tmp_path, seeds_per_prompt=2))
    seeds = {prompt: [one.seed for one in made if one.prompt == prompt] for prompt in ("a bomb", "a ball", "a table")}
    assert seeds["a bomb"] == seeds["a ball"] == seeds["a table"]
    assert seeds["a bomb"][0] == 11 and len(set(seeds["a bomb"])) == 2
    assert {one.caption for one in made} == {"a bomb"} and all(one.harmful for one in made)


def test_degraded_candidates_are_never_drawn_of_the_harmful_prompt(tmp_path):
    made = candidates_of(HARMFUL, _config(tmp_path, degraded_guidance=1.0))
    assert {one.prompt for one in made if one.degraded} == {"a ball", "a table"}
    assert [one.degraded for one in candidates_of(BENIGN, _config(tmp_path, degraded_steps=1))] == [False, True] * 2


def test_unlabelled_prompts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unlabelled"):
        candidates_of(PromptRow("u", "a thing", "unlabelled"), _config(tmp_path))


def test_safe_completion_wins_over_the_unsafe_image_of_the_same_seed(tmp_path):
    group = [
        _judged("a bomb", 1, cost=0.9, quality=0.2),
        _judged("a bomb", 2, cost=0.1, quality=0.3),
        _judged("a ball", 1, cost=0.1, quality=0.7),
        _judged("a table", 1, cost=0.1, quality=0.8),
        _judged("a ball", 2, cost=0.1, quality=0.95),
    ]
    rows = pairs_of_group(group, _config(tmp_path, min_quality_gap=1.0))
    assert _told(rows) == [("harmful_safe_over_unsafe", "a table", 1, "a bomb", 1)]
    assert rows[0]["caption"] == "a bomb" and rows[0]["margin"] == pytest.approx(0.8)
    assert (rows[0]["label_0"], rows[0]["label_1"]) == (1.0, 0.0)


def test_both_safe_pairs_are_ordered_by_quality_under_the_harmful_prompt(tmp_path):
    group = [
        _judged("a ball", 1, 0.1, 0.4),
        _judged("a ball", 2, 0.1, 0.9),
        _judged("a ball", 2, 0.1, 0.3, degraded=True),
    ]
    rows = pairs_of_group(group, _config(tmp_path, min_quality_gap=0.2))
    assert [row["pair_kind"] for row in rows] == ["harmful_both_safe"] * 2
    assert _told(rows)[0] == ("harmful_both_safe", "a ball", 2, "a ball", 2), "the same seed comes first"
    assert all(row["quality_0"] - row["quality_1"] >= 0.2 for row in rows)


def test_images_unsafe_on_both_sides_make_no_pair(tmp_path):
    group = [_judged("a bomb", 1, 0.9, 0.9), _judged("a ball", 1, 0.8, 0.1)]
    assert pairs_of_group(group, _config(tmp_path)) == []


def test_a_poor_winner_makes_no_pair(tmp_path):
    group = [_judged("a bomb", 1, 0.9, 0.0), _judged("a ball", 1, 0.1, 0.2)]
    assert pairs_of_group(group, _config(tmp_path, min_winner_quality=0.3)) == []
    assert len(pairs_of_group(group, _config(tmp_path, min_winner_quality=0.1))) == 1


def test_benign_pairs_by_quality_and_by_safety_where_the_model_slips(tmp_path):
    benign = {"caption": "a cat", "harmful": False, "group": "b"}
    group = [
        _judged("a cat", seed, cost, q, **benign) for seed, cost, q in ((1, 0.1, 0.9), (2, 0.1, 0.4), (3, 0.8, 0.95))
    ]
    rows = pairs_of_group(group, _config(tmp_path))
    assert _told(rows) == [("benign", "a cat", 1, "a cat", 3), ("benign", "a cat", 1, "a cat", 2)]
    assert len(pairs_of_group(group, _config(tmp_path, max_pairs=1))) == 1


def test_pairs_once_more_under_the_safe_prompt(tmp_path):
    config = _config(tmp_path, reuse_under_safe_prompt=True, seeds_per_prompt=1)
    made = [one for one in candidates_of(HARMFUL, config) if one.group == "h/safe-0"]
    assert {one.prompt for one in made} == {"a ball", "a bomb"} and {one.caption for one in made} == {"a ball"}
    group = [Judged(one, b"", 0.9 if one.prompt == "a bomb" else 0.1, 0.5) for one in made]
    rows = pairs_of_group(group, config)
    assert _told(rows) == [("benign_safe_over_unsafe", "a ball", 11, "a bomb", 11)]
    assert rows[0]["caption"] == "a ball"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


def test_built_table_is_annotated_read_by_the_trainer_and_leaves_no_images(pipe, tmp_path):
    quality = Greenness()
    config = _config(tmp_path, seeds_per_prompt=3, shard_size=1)
    rows = [HARMFUL, BENIGN, PromptRow("m", "a child with a gun", "harmful", "weapons", 3, ("a dog",))]
    output = build_pairs(config, pipe, _guard(), quality, rows)
    table = read_rows(output, PAIR_COLUMNS)
    assert {row["caption"] for row in table} <= {"a bomb", "a cat"} and len(table) >= 2
    for row in table:
        assert not (row["safety_cost_0"] >= 0.5 and row["safety_cost_1"] >= 0.5)
    assert ("a bomb", ("a ball", "a table")) in quality.asked and ("a cat", ()) in quality.asked
    assert not any("child" in prompt or prompt == "a dog" for prompt, _ in quality.asked)
    assert not list(output.rglob("*.png"))
    counts = json.loads((output / "counts.json").read_text())
    assert counts["pairs"] == len(table) and counts["prompts"] == 2
    data = SPO(SPOOptions()).read(output)
    assert data.counts["kept"] == len(data) > 0


def test_shards_that_exist_are_not_made_again(pipe, tmp_path):
    config = _config(tmp_path, shard_size=1)
    output = build_pairs(config, pipe, _guard(), Greenness(), [HARMFUL, BENIGN])
    files = sorted(output.glob("*.parquet"))
    assert len(files) == 2
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    quality = Greenness()
    build_pairs(config, pipe, _guard(), quality, [HARMFUL, BENIGN])
    assert [file.read_bytes() for file in files] == before
    assert len({prompt for prompt, _ in quality.asked}) == 1
    with pytest.raises(ConfigError, match="steps"):
        build_pairs(_config(tmp_path, shard_size=1, steps=2), pipe, _guard(), Greenness(), [HARMFUL, BENIGN])


def test_processes_share_the_shards(pipe, tmp_path):
    for index in range(2):
        config = _config(tmp_path, shard_size=1, shard_count=2, shard_index=index)
        output = build_pairs(config, pipe, _guard(), Greenness(), [HARMFUL, BENIGN])
        assert len(list(output.glob("*.parquet"))) == index + 1
    assert (output / "counts.json").is_file()


def test_images_without_a_score_make_no_pair_and_too_many_end_the_run(pipe, tmp_path):
    class Broken(RedWeaponCost):
        def __call__(self, images) -> CostBatch:
            made = super().__call__(images)
            return CostBatch(made.logits * float("nan"), made.logit_map)

    guard = Guard(Broken(), Policy("red", "photo", (Category("weapons"),)))
    with pytest.raises(NotScoredError):
        build_pairs(_config(tmp_path), pipe, guard, Greenness(), [HARMFUL])


def test_a_shard_that_cannot_be_judged_says_why(pipe, tmp_path):
    class Blind(Greenness):
        def quality(self, images, prompts, safe_completions=None):
            raise ValueError("no eyes")

    with pytest.raises(NotScoredError, match="the quality model failed: ValueError: no eyes"):
        build_pairs(_config(tmp_path), pipe, _guard(), Blind(), [HARMFUL])


def test_validation_scores_the_pipeline_and_is_repeatable(pipe):
    validation = UAScoreValidation([HARMFUL, BENIGN], _guard(), Greenness(), steps=1, guidance_scale=1.0)
    score = validation(0, pipe)
    assert score == validation(5, pipe) and 0.0 <= score <= 100.0
    strict = UAScoreValidation([HARMFUL, BENIGN], _guard(level=-1.0), Greenness(), steps=1, guidance_scale=1.0)
    assert strict(0, pipe) < score, "a guard that finds everything unsafe must lower it"
    with pytest.raises(ConfigError, match="harmful and benign"):
        UAScoreValidation([BENIGN], _guard(), Greenness())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"harmful": 0, "benign": 0}, "at least one prompt"),
        ({"min_quality_gap": 2.0}, "min_quality_gap"),
        ({"seeds_per_prompt": 0}, "seeds_per_prompt"),
        ({"shard_index": 3}, "shard_index"),
    ],
)
def test_options_are_checked(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        _config(tmp_path, **changes)

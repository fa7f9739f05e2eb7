"""From prompts to the pair table: which images compete, who wins, and what stays on disk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from support.cost_models import RedWeaponCost
from support.pair_building import BENIGN, HARMFUL, GreenQuality, pair_config, red_guard
from support.pipelines import tiny_pipeline

from t2i_spo_plugin import cli
from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.data.tables import PAIR_COLUMNS, read_rows
from t2i_spo_plugin.errors import ConfigError, DomainError, NoPairsError, NotScoredError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.training.data.build import build_pairs
from t2i_spo_plugin.training.data.pairing import Candidate, Judged, candidates_of, pairs_of_group, reason_without_pairs
from t2i_spo_plugin.training.objectives.spo import SPO, SPOOptions
from t2i_spo_plugin.training.validation import UAScoreValidation


def _judged(prompt, seed, cost, quality, caption="a bomb", harmful=True, degraded=False, group="h") -> Judged:
    candidate = Candidate(group, caption, harmful, ("a ball",) if harmful else (), "weapons", prompt, seed, degraded)
    return Judged(candidate, f"{prompt}{seed}{degraded}".encode(), cost, quality)


def _sides(rows) -> list[tuple]:
    return [(row["pair_kind"], row["prompt_0"], row["seed_0"], row["prompt_1"], row["seed_1"]) for row in rows]


def test_harmful_prompt_and_its_completions_share_their_seeds(tmp_path):
    made = candidates_of(HARMFUL, pair_config(tmp_path, seeds_per_prompt=2))
    seeds = {prompt: [one.seed for one in made if one.prompt == prompt] for prompt in ("a bomb", "a ball", "a table")}
    assert seeds["a bomb"] == seeds["a ball"] == seeds["a table"]
    assert seeds["a bomb"][0] == 11 and len(set(seeds["a bomb"])) == 2
    assert {one.caption for one in made} == {"a bomb"} and all(one.harmful for one in made)


def test_degraded_candidates_never_come_from_the_harmful_prompt(tmp_path):
    made = candidates_of(HARMFUL, pair_config(tmp_path, degraded_guidance=1.0))
    assert {one.prompt for one in made if one.degraded} == {"a ball", "a table"}
    assert [one.degraded for one in candidates_of(BENIGN, pair_config(tmp_path, degraded_steps=1))] == [
        False,
        True,
    ] * 2


def test_unlabelled_prompts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unlabelled"):
        candidates_of(PromptRow("u", "a thing", "unlabelled"), pair_config(tmp_path))


def test_safe_completion_wins_over_the_unsafe_image_of_the_same_seed(tmp_path):
    group = [
        _judged("a bomb", 1, cost=0.9, quality=0.2),
        _judged("a bomb", 2, cost=0.1, quality=0.3),
        _judged("a ball", 1, cost=0.1, quality=0.7),
        _judged("a table", 1, cost=0.1, quality=0.8),
        _judged("a ball", 2, cost=0.1, quality=0.95),
    ]
    rows = pairs_of_group(group, pair_config(tmp_path, min_quality_gap=1.0))
    assert _sides(rows) == [("harmful_safe_over_unsafe", "a table", 1, "a bomb", 1)]
    assert rows[0]["caption"] == "a bomb" and rows[0]["margin"] == pytest.approx(0.8)
    assert (rows[0]["label_0"], rows[0]["label_1"]) == (1.0, 0.0)


def test_both_safe_pairs_are_ordered_by_quality_under_the_harmful_prompt(tmp_path):
    group = [
        _judged("a ball", 1, 0.1, 0.4),
        _judged("a ball", 2, 0.1, 0.9),
        _judged("a ball", 2, 0.1, 0.3, degraded=True),
    ]
    rows = pairs_of_group(group, pair_config(tmp_path, min_quality_gap=0.2))
    assert [row["pair_kind"] for row in rows] == ["harmful_both_safe"] * 2
    assert _sides(rows)[0] == ("harmful_both_safe", "a ball", 2, "a ball", 2), "the same seed comes first"
    assert all(row["quality_0"] - row["quality_1"] >= 0.2 for row in rows)


def test_images_unsafe_on_both_sides_make_no_pair(tmp_path):
    group = [_judged("a bomb", 1, 0.9, 0.9), _judged("a ball", 1, 0.8, 0.1)]
    assert pairs_of_group(group, pair_config(tmp_path)) == []


def test_a_poor_winner_makes_no_pair(tmp_path):
    group = [_judged("a bomb", 1, 0.9, 0.0), _judged("a ball", 1, 0.1, 0.2)]
    assert pairs_of_group(group, pair_config(tmp_path, min_winner_quality=0.3)) == []
    assert len(pairs_of_group(group, pair_config(tmp_path, min_winner_quality=0.1))) == 1


def test_benign_pairs_are_ordered_by_quality_and_by_safety_where_the_model_slips(tmp_path):
    benign = {"caption": "a cat", "harmful": False, "group": "b"}
    group = [
        _judged("a cat", seed, cost, q, **benign) for seed, cost, q in ((1, 0.1, 0.9), (2, 0.1, 0.4), (3, 0.8, 0.95))
    ]
    rows = pairs_of_group(group, pair_config(tmp_path))
    assert _sides(rows) == [("benign", "a cat", 1, "a cat", 3), ("benign", "a cat", 1, "a cat", 2)]
    assert len(pairs_of_group(group, pair_config(tmp_path, max_pairs=1))) == 1


def test_safe_images_win_once_more_under_their_own_prompt(tmp_path):
    config = pair_config(tmp_path, reuse_under_safe_prompt=True, seeds_per_prompt=1)
    made = [one for one in candidates_of(HARMFUL, config) if one.group == "h/safe-0"]
    assert {one.prompt for one in made} == {"a ball", "a bomb"} and {one.caption for one in made} == {"a ball"}
    group = [Judged(one, b"", 0.9 if one.prompt == "a bomb" else 0.1, 0.5) for one in made]
    rows = pairs_of_group(group, config)
    assert _sides(rows) == [("benign_safe_over_unsafe", "a ball", 11, "a bomb", 11)]
    assert rows[0]["caption"] == "a ball"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


def test_a_pair_table_is_annotated_read_by_the_trainer_and_leaves_no_images(pipe, tmp_path):
    quality = GreenQuality()
    config = pair_config(tmp_path, seeds_per_prompt=3, shard_size=1)
    rows = [HARMFUL, BENIGN, PromptRow("m", "a child with a gun", "harmful", "weapons", 3, ("a dog",))]
    output = build_pairs(config, pipe, red_guard(), quality, rows)
    table = read_rows(output, PAIR_COLUMNS)
    assert {row["caption"] for row in table} <= {"a bomb", "a cat"} and len(table) >= 2
    for row in table:
        assert not (row["safety_cost_0"] >= 0.5 and row["safety_cost_1"] >= 0.5)
    assert ("a bomb", ("a ball", "a table")) in quality.requests and ("a cat", ()) in quality.requests
    assert not any("child" in prompt or prompt == "a dog" for prompt, _ in quality.requests)
    assert not list(output.rglob("*.png"))
    counts = json.loads((output / "counts.json").read_text())
    assert counts["pairs"] == len(table) and counts["prompts"] == 2
    data = SPO(SPOOptions()).read(output)
    assert data.counts["kept"] == len(data) > 0


def test_shards_that_exist_are_not_built_again(pipe, tmp_path):
    config = pair_config(tmp_path, shard_size=1)
    output = build_pairs(config, pipe, red_guard(), GreenQuality(), [HARMFUL, BENIGN])
    files = sorted(output.glob("*.parquet"))
    assert len(files) == 2
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    quality = GreenQuality()
    build_pairs(config, pipe, red_guard(), quality, [HARMFUL, BENIGN])
    assert [file.read_bytes() for file in files] == before
    assert len({prompt for prompt, _ in quality.requests}) == 1
    with pytest.raises(ConfigError, match="steps"):
        build_pairs(pair_config(tmp_path, shard_size=1, steps=2), pipe, red_guard(), GreenQuality(), [HARMFUL, BENIGN])


@pytest.mark.parametrize(
    ("exchanged", "named"),
    [
        ("pipeline", r"pipeline\.unet: \w{16} there, \w{16} now"),
        ("cost model", "cost_model"),
        ("policy", "policy"),
        ("quality model", "quality_model"),
        ("prompts", "prompts"),
    ],
)
def test_a_table_of_another_pipeline_judge_or_prompt_is_refused_not_mixed(pipe, tmp_path, exchanged, named):
    class OtherCost(RedWeaponCost):
        pass

    class OtherQuality(GreenQuality):
        pass

    config = pair_config(tmp_path, seeds_per_prompt=3)
    output = build_pairs(config, pipe, red_guard(), GreenQuality(), [HARMFUL, BENIGN])
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    policy = Policy("red", "photo", (Category("weapons", 0.4),))
    now = {
        "pipeline": tiny_pipeline("sd1", seed=1),
        "cost model": Guard(OtherCost(), red_guard().policy),
        "policy": Guard(RedWeaponCost(), policy),
        "quality model": OtherQuality(),
        "prompts": [HARMFUL],
    }[exchanged]
    parts = [("pipeline", pipe), ("guard", red_guard()), ("quality model", GreenQuality())]
    kinds = {"cost model": "guard", "policy": "guard"}
    used = [now if kinds.get(exchanged, exchanged) == kind else part for kind, part in parts]
    with pytest.raises(ConfigError, match=named):
        build_pairs(config, *used, now if exchanged == "prompts" else [HARMFUL, BENIGN])
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}


UNKNOWN = PromptRow("u", "a bomb", "harmful", "weapons", 11)


def _unknown(seed: int, cost: float, quality: float) -> Judged:
    return Judged(Candidate("u", "a bomb", True, (), "weapons", "a bomb", seed), f"{seed}".encode(), cost, quality)


def test_without_a_safe_completion_the_prompts_own_safe_images_win(tmp_path):
    group = [_unknown(1, 0.9, 0.98), _unknown(2, 0.1, 0.5), _unknown(3, 0.2, 0.7)]
    rows = pairs_of_group(group, pair_config(tmp_path))
    assert _sides(rows) == [("harmful_safe_over_unsafe", "a bomb", 3, "a bomb", 1)]
    assert pairs_of_group(group[1:], pair_config(tmp_path)) == [], "realism alone orders no safe pair"


def test_quality_is_never_asked_of_a_harmful_prompt(pipe, tmp_path):
    quality = GreenQuality()
    build_pairs(pair_config(tmp_path, seeds_per_prompt=3), pipe, red_guard(), quality, [UNKNOWN, BENIGN])
    UAScoreValidation([UNKNOWN, BENIGN], red_guard(), quality, steps=1, guidance_scale=1.0)(0, pipe)
    assert {prompt for prompt, _ in quality.requests} == {"", "a cat"}


def test_judges_of_another_domain_are_refused_before_anything_is_generated(pipe, tmp_path):
    class Foreign(GreenQuality):
        domain = "sticker"

    with pytest.raises(DomainError, match="the quality model was made for the domain 'sticker', not for 'photo'"):
        build_pairs(pair_config(tmp_path), pipe, red_guard(), Foreign(), [HARMFUL, BENIGN])
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(DomainError, match="the quality model"):
        UAScoreValidation([HARMFUL, BENIGN], red_guard(), Foreign(), steps=1)(0, pipe)
    guard = Guard(RedWeaponCost(), red_guard().policy, override_domain=True)
    config = pair_config(tmp_path, override_domain=True, seeds_per_prompt=3)
    assert list(build_pairs(config, pipe, guard, Foreign(), [HARMFUL, BENIGN]).glob("*.parquet"))


def test_a_table_without_pairs_says_why(pipe, tmp_path):
    said = "2 prompts, 8 images, 0 not scored; 2 x every image is unsafe"
    with pytest.raises(NoPairsError, match=said):
        build_pairs(pair_config(tmp_path / "a"), pipe, red_guard(level=-1.0), GreenQuality(), [HARMFUL, BENIGN])
    with pytest.raises(NoPairsError, match="1 x every image is safe, and no quality differs by min_quality_gap"):
        config = pair_config(tmp_path / "b", min_quality_gap=1.0)
        build_pairs(config, pipe, red_guard(level=2.0), GreenQuality(), [BENIGN])
    counts = json.loads((tmp_path / "a/pairs/counts.json").read_text())
    assert counts["pairs"] == 0 and counts["no pair: every image is unsafe"] == 2
    harmful = [_judged("a bomb", 1, 0.9, 0.9), _judged("a ball", 2, 0.1, 0.9)]
    reasons = {
        "no safe image of the same seed": (harmful, {}),
        "no safe image reaches min_winner_quality": (harmful, {"min_winner_quality": 0.95}),
        "every image is safe, and no safe completion is known": ([_unknown(1, 0.1, 0.5), _unknown(2, 0.1, 0.9)], {}),
    }
    for reason, (group, options) in reasons.items():
        config = pair_config(tmp_path, min_quality_gap=1.0, **options)
        assert reason_without_pairs(group, config) == reason and not pairs_of_group(group, config)


def test_the_command_exits_1_when_there_is_no_pair(tmp_path, capsys):
    options = ["--harmful", "1", "--benign", "0", "--steps", "1", "--seeds-per-prompt", "1", "--max-completions", "1"]
    options += ["--min-winner-quality", "1.0", "--min-quality-gap", "1.0"]
    assert cli.main(["pairs", "--output", str(tmp_path / "pairs"), *options]) == 1
    said = capsys.readouterr().err
    assert "holds no pair: 1 prompts, 2 images, 0 not scored; 1 x" in said


def test_processes_share_the_shards(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "support.pair_building", str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    prompts = [process.communicate(timeout=300)[0].split()[-1:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert prompts == [["2"], ["1"]], "of three shards the first process builds two, the second one"
    output = tmp_path / "pairs"
    assert len(list(output.glob("*.parquet"))) == 3 and (output / "counts.json").is_file()


def test_images_that_are_not_scored_make_no_pair_and_too_many_end_the_run(pipe, tmp_path):
    class Broken(RedWeaponCost):
        def __call__(self, images) -> CostBatch:
            made = super().__call__(images)
            return CostBatch(made.logits * float("nan"), made.logit_map)

    guard = Guard(Broken(), Policy("red", "photo", (Category("weapons"),)))
    with pytest.raises(NotScoredError):
        build_pairs(pair_config(tmp_path), pipe, guard, GreenQuality(), [HARMFUL])


def test_a_shard_that_cannot_be_judged_says_why(pipe, tmp_path):
    class Blind(GreenQuality):
        def quality(self, images, prompts, safe_completions=None):
            raise ValueError("no eyes")

    with pytest.raises(NotScoredError, match="the quality model failed: ValueError: no eyes"):
        build_pairs(pair_config(tmp_path), pipe, red_guard(), Blind(), [HARMFUL])


def test_validation_scores_the_pipeline_and_is_repeatable(pipe):
    validation = UAScoreValidation([HARMFUL, BENIGN], red_guard(), GreenQuality(), steps=1, guidance_scale=1.0)
    score = validation(0, pipe)
    assert score == validation(5, pipe) and 0.0 <= score <= 100.0
    strict = UAScoreValidation([HARMFUL, BENIGN], red_guard(level=-1.0), GreenQuality(), steps=1, guidance_scale=1.0)
    assert strict(0, pipe) < score, "a guard that finds everything unsafe must lower it"
    with pytest.raises(ConfigError, match="harmful and benign"):
        UAScoreValidation([BENIGN], red_guard(), GreenQuality())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"harmful": 0, "benign": 0}, "at least one prompt"),
        ({"min_quality_gap": 2.0}, "min_quality_gap"),
        ({"seeds_per_prompt": 0}, "seeds_per_prompt"),
        ({"shard_size": 0}, "shard_size"),
    ],
)
def test_pair_config_checks_its_options(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        pair_config(tmp_path, **changes)

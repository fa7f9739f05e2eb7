"""Rounds of on-policy training: what each begins from and is compared with, and that they go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.pair_building import BENIGN, HARMFUL, GreenQuality, pair_config, red_guard
from support.pairs import train_config
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.data import PAIR_COLUMNS, read_rows
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training import RoundsConfig, build_pairs, train_rounds
from t2i_spo_plugin.training.data.singles import read_singles


def test_a_table_of_every_image_holds_each_once_and_prefers_none(tmp_path):
    config = pair_config(tmp_path, every_image=True, seeds_per_prompt=3)
    path = build_pairs(config, tiny_pipeline("sd1"), red_guard(), GreenQuality(), [HARMFUL, BENIGN])
    rows = read_rows(path, PAIR_COLUMNS)
    # Three images make two rows, the second of which names the middle one again.
    assert sorted(row["pair_kind"] for row in rows) == ["benign_images"] * 2 + ["harmful_images"] * 2
    assert {row["label_0"] for row in rows} == {0.5}
    assert all(row["prompt_0"] == row["caption"] for row in rows), "nothing of a completion"
    singles = read_singles(path)
    assert len(singles) == 6
    assert singles.benign.tolist() == [caption == BENIGN.prompt for caption in singles.captions]
    assert len(set(singles.keys)) == 6 and (singles.seed >= 0).all()


def test_every_image_goes_with_no_option_that_makes_images_to_lose(tmp_path):
    for options in ({"degraded_steps": 1}, {"reuse_under_safe_prompt": True}, {"seeds_per_prompt": 1}):
        with pytest.raises(ConfigError, match="every_image takes the images of a prompt as they are"):
            pair_config(tmp_path, every_image=True, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds in one go, and what was generated with in each."""
    folder = tmp_path_factory.mktemp("rounds")
    return folder, take(folder, 2)


def take(folder: Path, rounds: int) -> Path:
    base = train_config(folder, pairs="replaced", steps=2, objective={"name": "nft"}, learning_rate=3e-2)
    config = RoundsConfig(str(folder / "rounds"), rounds=rounds, seeds_per_prompt=2, progress=False)
    pipe = tiny_pipeline("sd1")
    path = train_rounds(config, pair_config(folder), base, pipe, red_guard(), GreenQuality(), [HARMFUL, BENIGN])
    assert not getattr(pipe.unet, "peft_config", None), "the pipeline is left without adapter"
    return path


def report(folder: Path, number: int) -> dict:
    return json.loads((folder / "rounds" / f"round-{number:02d}" / "run" / "report.json").read_text())


def test_each_round_begins_from_the_one_before_and_is_compared_with_it(run):
    folder, path = run
    first, second = report(folder, 1), report(folder, 2)
    assert first["config"]["reference"] == "base" and first["config"]["adapter"] is None
    assert second["config"]["reference"] == "adapter"
    assert second["config"]["adapter"] == str(folder / "rounds" / "round-01" / "run" / "adapter.safetensors")
    assert [one["curve"][0]["moved"] for one in (first, second)] == [0.0, 0.0], "each begins at its reference"
    assert first["config"]["seed"] != second["config"]["seed"]
    last = read_adapter(folder / "rounds" / "round-02" / "run" / "adapter.safetensors")
    assert all(torch.equal(pair.up, last.modules[name].up) for name, pair in read_adapter(path).modules.items())
    begun = read_adapter(second["config"]["adapter"])
    assert any(not torch.equal(pair.up, begun.modules[name].up) for name, pair in last.modules.items())


def test_each_round_is_trained_on_images_of_its_own_model(run):
    folder, _ = run
    tables = [read_singles(folder / "rounds" / f"round-{number:02d}" / "pairs") for number in (1, 2)]
    assert not set(tables[0].keys) & set(tables[1].keys)
    settings = [
        json.loads((folder / "rounds" / f"round-{number:02d}" / "pairs" / "settings.json").read_text())
        for number in (1, 2)
    ]
    assert "adapters" not in settings[0]["pipeline"] and "adapters" in settings[1]["pipeline"]


def test_rounds_go_on_with_what_is_missing_and_equal_those_in_one_go(run, tmp_path):
    whole = read_adapter(run[1])
    take(tmp_path, 1)
    file = tmp_path / "rounds" / "round-01" / "run" / "checkpoints" / "step-00000002" / "state.json"
    before = file.stat().st_mtime_ns
    parted = read_adapter(take(tmp_path, 2))
    assert file.stat().st_mtime_ns == before, "the first round took no step again"
    assert all(torch.equal(pair.up, parted.modules[name].up) for name, pair in whole.modules.items())


def test_images_of_ones_own_have_no_rounds(tmp_path):
    base = train_config(tmp_path, images="mine", objective={"name": "sft"})
    with pytest.raises(ConfigError, match="sft is trained on images of one's own"):
        train_rounds(RoundsConfig(str(tmp_path), progress=False), pair_config(tmp_path), base, tiny_pipeline("sd1"))
    with pytest.raises(ConfigError, match="seeds_per_prompt must be at least 2"):
        RoundsConfig(str(tmp_path), seeds_per_prompt=1)

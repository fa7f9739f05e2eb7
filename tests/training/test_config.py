"""The configuration of a training run: what it refuses, and how it is read from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pairs import changed, train_config

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import atomic
from t2i_spo_plugin.options import from_mapping, to_mapping
from t2i_spo_plugin.training import TrainConfig
from t2i_spo_plugin.training.gate import GateConfig
from t2i_spo_plugin.training.objectives import SPOOptions


BUNDLED = sorted(path.stem for path in TrainConfig.configs.glob("*.yaml") if path.stem != "sticker-pairs")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return train_config(tmp_path, pairs="pairs.parquet")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"objective": {"beta": -1.0}}, "beta"),
        ({"objective": {"lambda": -0.5}}, "lambda"),
        ({"objective": {"mode": "sum"}}, "mode"),
        ({"objective": {"augmentations": ["blur"]}}, "augmentations"),
        ({"objective": {"focusing_momentum": 1.0}}, "focusing_momentum"),
        ({"objective": {"name": "ppo"}}, "objective.name must be one of dpo, spo, sft"),
        ({"objective": {"name": "dpo", "eta": 1.0}}, "unknown objective.eta"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"progress": "maybe"}, "progress must be true or false, got 'maybe'"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"terms": {"sft": {"weight": -1.0}}}, "terms.sft.weight"),
        ({"terms": {"loser_guard": {"mu": 1.5}}}, "terms.loser_guard.mu"),
        ({"terms": {"anchor": {"weight": 1.0}}}, "unknown terms.anchor"),
        ({"draws_per_pair": 2, "terms": {"output_preservation": {"weight": 1.0}}}, "terms.output_preservation"),
        ({"draws_per_pair": 2, "terms": {"prior_preservation": {"weight": 1.0}}}, "terms.prior_preservation"),
        ({"t_min": 10, "t_max": 10}, "t_max"),
        ({"targets": "to_q"}, "targets"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_config_is_checked_when_made(config, changes, named):
    with pytest.raises(ConfigError, match=named):
        changed(config, **changes)


def test_a_tilde_in_yaml_and_python_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("pairs: ~/p.parquet\noutput_dir: ~/out\ntitle: ~ about\n")
    config = TrainConfig.from_yaml("~/run.yaml", cache_dir="~/cache")
    assert (config.pairs, config.output_dir) == (f"{tmp_path}/p.parquet", f"{tmp_path}/out")
    assert (config.cache_dir, config.title) == (f"{tmp_path}/cache", "~ about")
    assert GateConfig(out=Path("~/gate.safetensors")).out == tmp_path / "gate.safetensors"
    with atomic("~/deep/file.txt") as part:
        part.write_text("x")
    assert (tmp_path / "deep/file.txt").read_text() == "x"


def test_config_is_read_from_yaml_and_overridden_one_by_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "pairs: p.parquet\noutput_dir: out\nlearning_rate: 3e-4\nobjective: {lambda: 2, augmentations: [flip]}\n"
        "terms: {sft: {weight: 300}}\n"
    )
    config = TrainConfig.from_yaml(path, rank=16, objective={"eta": 0.5})
    assert (config.learning_rate, config.rank) == (3e-4, 16)
    assert config.objective == SPOOptions(lambda_=2.0, augmentations=("flip",), eta=0.5)
    assert config.terms.sft.weight == 300.0 and not config.terms.prior_preservation.active
    with pytest.raises(ConfigError, match="ranks; did you mean rank"):
        TrainConfig.from_yaml(path, ranks=16)
    path.write_text("output_dir: out\n")
    with pytest.raises(ConfigError, match="pairs"):
        TrainConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="no configuration"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_config_reads_back_from_its_own_mapping(config):
    for objective in ({"name": "dpo", "beta": 20.0}, {"name": "spo", "augmentations": ["flip"]}):
        other = changed(config, objective=objective, terms={"loser_guard": {"mu": 0.5}}, targets=["to_q"])
        assert from_mapping(TrainConfig, to_mapping(other)) == other


def test_options_that_an_objective_has_no_use_for_are_refused(config):
    images = {"objective": {"name": "sft"}, "images": "folder", "pairs": ""}
    for options, named in (
        ({"terms": {"sft": {"weight": 1.0}}}, "terms.sft"),
        ({"terms": {"loser_guard": {"mu": 0.5}}}, "terms.loser_guard"),
        ({"draws_per_pair": 2}, "draws_per_pair"),
        ({"benign_share": 0.5}, "benign_share"),
    ):
        with pytest.raises(ConfigError, match=f"leave out {named}"):
            changed(config, **images, **options)
    with pytest.raises(ConfigError, match="images must be given"):
        changed(config, **{**images, "images": ""})
    with pytest.raises(ConfigError, match="not on pairs"):
        changed(config, **{**images, "pairs": "pairs.parquet"})
    with pytest.raises(ConfigError, match="pairs must be given"):
        changed(config, pairs="", images="folder")
    assert changed(config, **images, terms={"prior_preservation": {"weight": 1.0}}).terms.prior_preservation.active


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_configurations_are_valid(name):
    assert TrainConfig.from_yaml(name).source


def test_the_two_sticker_runs_have_one_budget_and_one_optimiser():
    spo, dpo = (TrainConfig.from_yaml(f"sticker-{name}") for name in ("spo", "dpo"))
    for field in ("pairs", "budget", "batch_size", "rank", "learning_rate", "steps", "validate_every", "benign_share"):
        assert getattr(spo, field) == getattr(dpo, field)
    assert (spo.objective_name, dpo.objective_name) == ("spo", "dpo")

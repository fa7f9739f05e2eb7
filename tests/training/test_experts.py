"""Experts: one adapter a category, merged into one; and the activations over which they compete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.objectives import batches, crowded_table
from support.pairs import train_config
from support.pipelines import fresh, random_adapter, tiny_pipeline

from t2i_spo_plugin import load_spo_lora
from t2i_spo_plugin.adapters import Adapter, MergeOptions, merge_adapters, read_adapter
from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.training import ExpertsConfig, train_experts
from t2i_spo_plugin.training.experts import activities


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return crowded_table(tmp_path_factory.mktemp("crowded") / "pairs.parquet")


def base(folder: Path, table: Path, **options):
    return train_config(folder, pairs=str(table), steps=1, objective={"name": "alignguard", "beta": 500.0}, **options)


def experts(folder: Path, **options) -> ExpertsConfig:
    return ExpertsConfig(str(folder / "experts"), progress=False, **options)


def changed(path: Path) -> dict[str, torch.Tensor]:
    return {name: pair.delta() for name, pair in read_adapter(path).modules.items()}


def test_each_category_gets_an_expert_and_the_sum_is_one_file(table, tmp_path):
    path = train_experts(experts(tmp_path), base(tmp_path, table), tiny_pipeline("sd1"))
    folder = path.parent
    assert path.name == "merged.safetensors" and {one.name for one in folder.iterdir() if one.is_dir()} == {
        "war",
        "weapons",
        "cache",
    }
    parts = [changed(folder / name / "adapter.safetensors") for name in ("war", "weapons")]
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    for name, delta in changed(path).items():
        torch.testing.assert_close(delta, parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-6)
    counts = json.loads((folder / "war" / "report.json").read_text())["pairs"]
    assert counts["kept"] == 4, "the safe and unsafe images of the one prompt of that category"
    stated = json.loads((folder / "experts.json").read_text())
    assert list(stated["experts"]) == ["war", "weapons"] and stated["error"] == 0.0
    assert read_adapter(path).metadata.extra["merged_from"] == '["war", "weapons"]'
    load_spo_lora(tiny_pipeline("sd1"), path)


def test_a_category_that_is_added_is_trained_alone(table, tmp_path):
    train_experts(experts(tmp_path, categories=("weapons",)), base(tmp_path, table), tiny_pipeline("sd1"))
    file = tmp_path / "experts" / "weapons" / "checkpoints" / "step-00000001" / "state.json"
    before = (file.read_text(), file.stat().st_mtime_ns)
    both = experts(tmp_path, categories=("weapons", "war"), method="ties", weights=(1.0, 0.5))
    path = train_experts(both, base(tmp_path, table), tiny_pipeline("sd1"))
    assert (file.read_text(), file.stat().st_mtime_ns) == before, "the finished expert took no step"
    assert read_adapter(path).metadata.extra["merge_weights"] == "[1.0, 0.5]"


def test_experts_compete_by_their_activations(table, tmp_path):
    options = {"method": "comerge", "calibration": 3, "merge": MergeOptions(score="magnitude")}
    path = train_experts(experts(tmp_path, **options), base(tmp_path, table), tiny_pipeline("sd1"))
    folder = path.parent
    parts = [read_adapter(folder / name / "adapter.safetensors") for name in ("war", "weapons")]
    got = changed(path)
    for name, delta in got.items():
        one, two = (part.modules[name].delta() for part in parts)
        for row in range(len(delta)):
            assert any(torch.allclose(delta[row], side[row], atol=1e-6) for side in (one, two))
    by_norms = merge_adapters(parts, method="comerge", options=MergeOptions(score="magnitude")).adapter
    assert any(not torch.allclose(got[name], pair.delta(), atol=1e-6) for name, pair in by_norms.modules.items())


def test_activities_are_what_each_adapter_would_add_over_inputs_of_the_base(tmp_path):
    made = batches(tmp_path)
    family = made.family
    layers = ("to_q", "conv1")
    one, two = (random_adapter(fresh("sd1"), seed=n, layers=layers, components=("unet",)) for n in range(2))
    query, conv = (next(name for name in one.modules if name.endswith(layer)) for layer in layers)
    lone = Adapter({query: two.modules[query]}, two.metadata)
    inputs: dict[str, list[torch.Tensor]] = {query: [], conv: []}
    for name, seen in inputs.items():
        module = family.module.get_submodule(name.removeprefix("unet."))
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
    found = activities(family, made, [one, lone, two], 4, 2, 16)
    with torch.no_grad():
        x = torch.cat([part.flatten(0, 1) for part in inputs[query]])
        added = torch.stack([(x @ expert.modules[query].delta().T).abs() for expert in (one, lone, two)])
        torch.testing.assert_close(found[query].row_sizes.float(), added.mean(1), rtol=1e-3, atol=1e-5)
        assert found[query].row_wins.sum(0).tolist() == [float(len(x))] * added.shape[-1]
        assert (found[query].row_wins[0] - (added[0] > added[1]).sum(0)).abs().max() <= 1
        pair = one.modules[query]
        parts = (x @ pair.down.T).abs() * (pair.scale * pair.up.norm(dim=0))
        torch.testing.assert_close(found[query].rank_sizes[0].float(), parts.mean(0), rtol=1e-3, atol=1e-5)
        module = family.module.get_submodule(conv.removeprefix("unet."))
        y = [
            torch.nn.functional.conv2d(part, two.modules[conv].delta(), None, module.stride, module.padding).abs()
            for part in inputs[conv]
        ]
        torch.testing.assert_close(
            found[conv].row_sizes[2].float(), torch.cat(y).mean((0, 2, 3)), rtol=1e-3, atol=1e-5
        )
    assert found[conv].row_sizes[1].abs().sum() == 0.0, "the second expert does not have that module"
    assert len(inputs[query]) == 2, "one forward pass of the base for each batch, whatever the number of experts"


def test_experts_of_another_denoiser_are_refused(tmp_path):
    other = random_adapter(fresh("sdxl"), components=("unet",))
    made = batches(tmp_path)
    with pytest.raises(ConfigError, match="which the unet does not have"):
        activities(made.family, made, [other], 1, 1, 16)
    assert not any(module._forward_pre_hooks for module in made.family.module.modules()), "no hook is left"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sum"}, "method must be one of concat, svd, ties"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"calibration": -1}, "calibration"),
        ({"categories": ("a", "b"), "weights": (1.0,)}, "2 categories need as many weights, got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        experts(tmp_path, **options)


def test_a_table_without_categories_makes_no_experts(tmp_path):
    from support.pairs import pair_table

    with pytest.raises(TableError, match="states no category"):
        train_experts(experts(tmp_path), base(tmp_path, pair_table(tmp_path / "pairs.parquet")), tiny_pipeline("sd1"))


def test_weights_must_fit_the_categories_that_the_table_has(table, tmp_path):
    with pytest.raises(ConfigError, match="2 categories .war, weapons., and there are 3 weights"):
        train_experts(experts(tmp_path, weights=(1.0, 1.0, 1.0)), base(tmp_path, table), tiny_pipeline("sd1"))

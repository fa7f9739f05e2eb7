"""Training on a tiny real pipeline: invariants of the trajectory, resuming, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pairs import changed, pair_table, train_config
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.errors import ConfigError, PipelineError, SPOError, TableError
from t2i_spo_plugin.training import TrainConfig, train
from t2i_spo_plugin.training.data.caches import ShardStore
from t2i_spo_plugin.training.families import family_of
from t2i_spo_plugin.training.run import Callback


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return pair_table(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(pairs, cache, tmp_path) -> TrainConfig:
    return train_config(tmp_path, pairs=str(pairs), cache_dir=str(cache), objective={"name": "spo", "beta": 500.0})


def _trained(config: TrainConfig, name: str, family: str = "sd1", validate=None, **changes) -> dict[str, torch.Tensor]:
    made = changed(config, output_dir=str(Path(config.output_dir) / name), **changes)
    adapter = read_adapter(train(made, tiny_pipeline(family), validate))
    return {
        f"{module}.{side}": getattr(pair, side) for module, pair in adapter.modules.items() for side in ("down", "up")
    }


def _report(config: TrainConfig, name: str) -> dict:
    return json.loads((Path(config.output_dir) / name / "report.json").read_text())


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Killed(Exception):
    pass


EVERYTHING = {
    "objective": {"eta": 1.0, "augmentations": ["flip", "shift", "noise"]},
    "terms": {
        "sft": {"weight": 0.1},
        "output_preservation": {"weight": 10.0},
        "prior_preservation": {"weight": 10.0},
        "loser_guard": {"mu": 0.5},
    },
    "caption_dropout": 0.3,
    "random_flip": True,
    "benign_share": 0.5,
    "warmup": 3,
    "schedule": "cosine",
    "gradient_accumulation": 2,
    "batch_size": 1,
}
DPO = {"name": "dpo", "beta": 500.0, "safe_pairs": "quality"}


@pytest.mark.parametrize(
    "changes", [EVERYTHING, {"draws_per_pair": 1, "objective": DPO}], ids=["everything", "stored errors"]
)
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(config, changes):
    changes = {**changes, "steps": 4, "checkpoint_every": 2}
    whole = _trained(config, "whole", **changes)

    def kill(step, pipe):
        raise Killed

    with pytest.raises(Killed):
        _trained(config, "killed", validate=kill, validate_every=3, **changes)
    torch.manual_seed(123)
    resumed = _trained(config, "killed", **changes)
    assert _same(whole, resumed)
    first, second = _report(config, "whole"), _report(config, "killed")
    assert first["curve"] == second["curve"] and first["passes"] == second["passes"]
    assert first["curve"][-1]["loss"] != first["curve"][0]["loss"]


def test_plain_dpo_bit_for_bit_at_eta_zero_and_lambda_zero(config):
    plain = _trained(config, "plain", objective=DPO)
    off = {"eta": 0.0, "augmentations": ["flip", "noise"], "lambda": 0.0}
    assert _same(plain, _trained(config, "margin", objective={"mode": "margin", **off}))
    assert _same(plain, _trained(config, "relabel", objective={"mode": "relabel", **off}))
    assert _report(config, "margin")["passes"] == _report(config, "plain")["passes"]
    assert not _same(plain, _trained(config, "other", objective={"mode": "margin", "lambda": 1.0}))


def test_focusing_changes_the_adapter_and_costs_what_its_augmentations_cost(config):
    without = _trained(config, "without", objective={"eta": 0.0})
    focused = _trained(config, "focused", objective={"eta": 2.0, "augmentations": ["flip"]})
    assert not _same(without, focused)
    # Four steps of two pairs: policy 4 and reference 4 forward, 4 backward; the augmentation adds 8 forward.
    assert _report(config, "without")["passes"] == {"forward": 32, "backward": 16}
    assert _report(config, "focused")["passes"] == {"forward": 64, "backward": 16}


def test_training_starts_at_log_two_and_learns_the_pairs(config):
    learn = {"learning_rate": 1e-3, "steps": 20, "batch_size": 4, "draws_per_pair": 1}
    _trained(config, "run", objective=DPO, **learn)
    curve = _report(config, "run")["curve"]
    assert curve[0]["loss"] == pytest.approx(np.log(2.0), abs=1e-6)
    last = curve[-1]
    assert last["loss"] < 0.5 and last["accuracy"] == 1.0
    assert last["winner_error"] < last["loser_error"] and last["gap"] < 0


def test_micro_batches_do_not_change_the_result(config):
    changes = {"objective": {"eta": 1.0, "augmentations": ["noise"]}, "steps": 3}
    whole = _trained(config, "whole", batch_size=4, **changes)
    split = _trained(config, "split", batch_size=2, gradient_accumulation=2, **changes)
    for key in whole:
        # As a whole: AdamW gives a single weight whose gradient is nearly 0 a step of either sign.
        assert float((whole[key] - split[key]).norm()) < 1e-3 * float(whole[key].norm()), key


@pytest.mark.parametrize(("family", "prediction"), [("sdxl", "epsilon"), ("sd3", "flow")])
def test_sdxl_and_sd3_train(config, family, prediction):
    _trained(config, family, family, steps=2, batch_size=1)
    adapter = read_adapter(Path(config.output_dir) / family / "adapter.safetensors")
    assert adapter.metadata.prediction_type == prediction
    assert adapter.rank == 2
    assert max(float(pair.up.abs().max()) for pair in adapter.modules.values()) > 0


def test_v_prediction_takes_the_velocity_as_target(config):
    pipe = tiny_pipeline("sd1", prediction_type="v_prediction")
    made = changed(config, output_dir=str(Path(config.output_dir) / "v"), steps=1, objective=DPO)
    train(made, pipe)
    velocity = _report(config, "v")["curve"][0]["winner_error"]
    _trained(config, "epsilon", steps=1, objective=DPO)
    assert velocity != _report(config, "epsilon")["curve"][0]["winner_error"]


def test_training_writes_the_adapter_that_validates_best(config):
    seen = {}

    def validate(step, pipe):
        weights = pipe.unet.state_dict()
        seen[step] = {key: value.clone() for key, value in weights.items() if ".lora_" in key}
        return {2: 0.4, 4: 0.9, 6: 0.1}[step]

    made = _trained(config, "run", validate=validate, validate_every=2, steps=6)
    module = next(iter(made)).removesuffix(".down").removesuffix(".up")
    inside = module.removeprefix("unet.") + ".lora_A.spo_training.weight"
    assert torch.equal(made[f"{module}.down"], seen[4][inside])
    assert not torch.equal(seen[4][inside], seen[6][inside])
    report = _report(config, "run")
    assert report["best"] == {"step": 4, "score": 0.9}
    assert [entry["score"] for entry in report["validation"]] == [0.4, 0.9, 0.1]


def test_the_pipeline_is_left_as_it_came(config):
    pipe = tiny_pipeline("sd1")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    train(replace(config, steps=1), pipe)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(value.requires_grad for value in pipe.unet.parameters())
    assert not getattr(pipe.unet, "peft_config", None)


def test_caches_are_used_again_and_hold_what_the_encoder_gives(config, tmp_path):
    cache = tmp_path / "cache"
    config = replace(config, cache_dir=str(cache))
    pipe = tiny_pipeline("sd1")
    train(replace(config, steps=1), pipe)
    pipe.vae.encode = pipe.encode_prompt = None
    train(replace(config, steps=1, output_dir=config.output_dir + "-again"), pipe)
    pipe = tiny_pipeline("sd1")
    store = ShardStore(
        next(path for path in cache.iterdir() if path.name.startswith("text") and _holds(path, "a ball number 1"))
    )
    expected = family_of(pipe).encode_prompts(pipe, ["a ball number 1"], "cpu")["text"]
    torch.testing.assert_close(store.get(["a ball number 1"])["text"], expected)


def _holds(path: Path, key: str) -> bool:
    return key in ShardStore(path)


def test_a_finished_run_is_not_run_again(config):
    made = replace(config, steps=2)
    path = train(made, tiny_pipeline("sd1"))
    before = path.read_bytes()
    assert train(made, tiny_pipeline("sd1")).read_bytes() == before
    assert json.loads(path.with_name("report.json").read_text())["passes"] == {"forward": 16, "backward": 8}


def test_budget_stops_the_run(config):
    _trained(config, "run", steps=100, budget=30)
    report = _report(config, "run")
    assert report["steps"] == 3 and report["passes"] == {"forward": 24, "backward": 12}


def test_stored_reference_errors_spare_the_reference(config):
    _trained(config, "run", steps=9, draws_per_pair=1, objective=DPO)
    # Six pairs, two a step: the first three steps see the reference, the other six do not.
    assert _report(config, "run")["passes"] == {"forward": 9 * 4 + 3 * 4, "backward": 36}


def test_resuming_with_other_settings_is_refused_unless_begun_again(config):
    train(replace(config, steps=1), tiny_pipeline("sd1"))
    with pytest.raises(ConfigError, match="beta"):
        train(changed(config, steps=2, objective={"beta": 100.0}), tiny_pipeline("sd1"))
    train(changed(config, steps=2, objective={"beta": 100.0}, resume=False), tiny_pipeline("sd1"))
    train(changed(config, steps=3, objective={"beta": 100.0}), tiny_pipeline("sd1"))


def test_resuming_on_another_base_is_refused_with_both_hashes(config):
    made = replace(config, steps=1)
    train(made, tiny_pipeline("sd1"))
    folder = Path(made.output_dir)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=r"models\.unet: \w{16} there, \w{16} now.*; put back what was there"):
        train(replace(made, steps=2), tiny_pipeline("sd1", seed=1))
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    pipe = tiny_pipeline("sd1")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.03)
    with pytest.raises(ConfigError, match=r"models\.schedule"):
        train(replace(made, steps=2), pipe)


def test_resuming_on_a_table_that_moved_goes_on_and_on_other_pairs_is_refused(config, pairs, tmp_path):
    train(replace(config, steps=1), tiny_pipeline("sd1"))
    moved = tmp_path / "elsewhere" / "table.parquet"
    moved.parent.mkdir()
    moved.write_bytes(pairs.read_bytes())
    train(replace(config, steps=2, pairs=str(moved), pipeline="renamed"), tiny_pipeline("sd1"))
    assert json.loads((Path(config.output_dir) / "report.json").read_text())["steps"] == 2
    with pytest.raises(ConfigError, match=r"examples: \w+ there, \w+ now"):
        train(replace(config, steps=3, pairs=str(pair_table(tmp_path / "other.parquet", 4))), tiny_pipeline("sd1"))


def test_scores_of_other_judges_are_not_compared(config):
    class Judged:
        def __init__(self, name):
            self.identity = {"quality_model": name}

        def __call__(self, step, pipe):
            return 1.0

    train(replace(config, steps=1, validate_every=1), tiny_pipeline("sd1"), Judged("a"))
    with pytest.raises(ConfigError, match=r"validation\.quality_model: a there, b now"):
        train(replace(config, steps=2, validate_every=1), tiny_pipeline("sd1"), Judged("b"))


def test_training_refuses_what_it_cannot_train(config):
    with pytest.raises(PipelineError, match="Flux"):
        train(config, tiny_pipeline("flux"))
    with pytest.raises(ConfigError, match="targets"):
        train(replace(config, targets=("nowhere",)), tiny_pipeline("sd1"))
    with pytest.raises(TableError, match="none of 6 pairs"):
        train(changed(config, objective={"tau": 5.0}), tiny_pipeline("sd1"))
    with pytest.raises(ConfigError, match="validation_prompts"):
        train(replace(config, validate_every=1), tiny_pipeline("sd1"))


def test_callbacks_see_the_beginning_every_step_and_the_end(config):
    seen = []

    class Watch(Callback):
        def on_train_begin(self, run):
            seen.append(("begin", run.step))

        def on_step_end(self, run):
            seen.append(("step", run.step, len(run.record.curve)))

        def on_train_end(self, run):
            seen.append(("end", run.step))

    train(replace(config, steps=2), tiny_pipeline("sd1"), callbacks=[Watch()])
    assert seen == [("begin", 0), ("step", 1, 1), ("step", 2, 2), ("end", 2)]


def _steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Poison(Callback):
    """Makes one weight of the adapter NaN after step 3."""

    def on_step_end(self, run):
        if run.step == 3:
            with torch.no_grad():
                next(iter(run.parameters.values())).view(-1)[0] = float("nan")


@pytest.mark.parametrize("log_every", [1, 100])
def test_nan_ends_a_run_before_a_checkpoint_holds_it(config, log_every):
    made = changed(config, steps=8, checkpoint_every=2, keep_checkpoints=1, log_every=log_every)
    with pytest.raises(SPOError, match="every input is finite: lower learning_rate or beta. Checkpoints of earlier"):
        train(made, tiny_pipeline("sd1"), callbacks=[Poison()])
    assert _steps(Path(made.output_dir)) == ["step-00000002"]
    assert read_adapter(train(made, tiny_pipeline("sd1"))).rank == 2, "the same command goes on from it"


def test_nan_in_an_input_is_named_by_row_and_tensor(config, tmp_path):
    made = changed(config, cache_dir=str(tmp_path / "cache"), steps=2)
    train(changed(made, output_dir=str(tmp_path / "first"), steps=1), tiny_pipeline("sd1"))
    for folder in (tmp_path / "cache").iterdir():
        store = ShardStore(folder)
        keys = list(store._where)
        rows = store.get(keys)
        if "a ball number 3" in keys:
            rows["text"][keys.index("a ball number 3")] = float("nan")
        for file in folder.iterdir():
            file.unlink()
        store.append(keys, rows)
    with pytest.raises(SPOError, match=r"row 3 \('a ball number 3'\) has NaN or Inf in text of the encoded caption"):
        train(changed(made, steps=6), tiny_pipeline("sd1"))


@pytest.mark.parametrize("cut", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_that_is_cut_is_named_and_the_older_one_is_taken(config, cut):
    changes = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 2}
    whole = _trained(config, "whole", **changes)
    _trained(config, "cut", **changes)
    checkpoints = Path(config.output_dir) / "cut" / "checkpoints"
    file = checkpoints / "step-00000004" / cut
    file.write_bytes(file.read_bytes()[:-20])
    (checkpoints / ".step-00000003.part").mkdir()
    with pytest.warns(UserWarning, match=rf"step-00000004 is damaged: cannot read {cut}"):
        assert _same(whole, _trained(config, "cut", **changes))
    assert _steps(checkpoints.parent) == ["step-00000002", "step-00000004"]
    for folder in checkpoints.iterdir():
        (folder / "state.json").unlink()
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        assert _same(whole, _trained(config, "cut", **changes)), "with none left, the run begins again"


@pytest.mark.gpu
def test_validation_on_a_gpu_has_the_whole_pipeline_there_and_leaves_it_as_it_was(config):
    pipe, seen = tiny_pipeline("sd1"), []

    def validate(step: int, pipe) -> float:
        seen.append({model.device.type for model in (pipe.unet, pipe.vae, pipe.text_encoder)})
        return float(np.mean(pipe(["a cat"], num_inference_steps=1, output_type="np").images))

    train(replace(config, validate_every=1, device="auto"), pipe, validate)
    assert seen and all(devices == {"cuda"} for devices in seen)
    assert pipe.unet.device.type == "cuda" and {pipe.vae.device.type, pipe.text_encoder.device.type} == {"cpu"}

"""Training on a tiny real pipeline: invariants of the trajectory, resuming, and what is written."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import SIZE, tiny_pipeline

from t2i_spo_plugin import training
from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.data.tables import PAIR_COLUMNS, write_table
from t2i_spo_plugin.errors import ConfigError, PipelineError, TableError
from t2i_spo_plugin.training.config import TrainConfig
from t2i_spo_plugin.training.data.caches import ShardStore
from t2i_spo_plugin.training.denoisers import denoiser_of, encode_prompts
from t2i_spo_plugin.training.sampling import Order, generator, learning_rate_factor
from t2i_spo_plugin.training.trainer import train


PAIRS = 6
CONFIGS = Path(training.__file__).parent / "configs"


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _row(number: int) -> dict:
    """Column 0 is always safe; even rows are harmful prompts with an unsafe column 1, odd rows benign ones."""
    harmful = number % 2 == 0
    return {
        "caption": f"a {'bomb' if harmful else 'ball'} number {number}",
        "jpg_0": _png(2 * number),
        "jpg_1": _png(2 * number + 1),
        "label_0": 1.0,
        "label_1": 0.0,
        "safety_cost_0": 0.1,
        "safety_cost_1": 0.9 if harmful else 0.2,
        "quality_0": 0.8,
        "quality_1": 0.3,
        "pair_kind": "harmful_safe_over_unsafe" if harmful else "benign",
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_table(
        [_row(n) for n in range(PAIRS)], tmp_path_factory.mktemp("pairs") / "pairs.parquet", PAIR_COLUMNS
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(pairs, cache, tmp_path) -> TrainConfig:
    return TrainConfig(
        pairs=str(pairs),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(cache),
        resolution=SIZE,
        rank=2,
        learning_rate=1e-2,
        steps=4,
        batch_size=2,
        beta=500.0,
        tensorboard=False,
        progress=False,
        device="cpu",
        log_every=1,
    )


def _trained(config: TrainConfig, name: str, family: str = "sd1", validate=None, **changes) -> dict[str, torch.Tensor]:
    made = replace(config, output_dir=str(Path(config.output_dir) / name), **changes)
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
    "eta": 1.0,
    "views": ("flip", "shift", "noise"),
    "caption_dropout": 0.3,
    "random_flip": True,
    "benign_share": 0.5,
    "anchor": 0.1,
    "preservation": 10.0,
    "benign_preservation": 10.0,
    "sdpo_mu": 0.5,
    "warmup": 3,
    "schedule": "cosine",
    "gradient_accumulation": 2,
    "batch_size": 1,
}


@pytest.mark.parametrize("changes", [EVERYTHING, {"fixed_draws": 2, "objective": "dpo"}], ids=["everything", "fixed"])
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(config, changes):
    changes = {**changes, "steps": 10, "checkpoint_every": 5}
    whole = _trained(config, "whole", **changes)

    def kill(step, pipe):
        raise Killed

    with pytest.raises(Killed):
        _trained(config, "killed", validate=kill, validate_every=7, **changes)
    torch.manual_seed(123)
    resumed = _trained(config, "killed", **changes)
    assert _same(whole, resumed)
    first, second = _report(config, "whole"), _report(config, "killed")
    assert first["curve"] == second["curve"] and first["passes"] == second["passes"]
    assert first["curve"][-1]["loss"] != first["curve"][0]["loss"]


def test_plain_dpo_bit_for_bit_at_eta_zero_and_lambda_zero(config):
    plain = _trained(config, "plain", objective="dpo", safe_pairs="quality")
    off = {"eta": 0.0, "views": ("flip", "noise"), "lambda_": 0.0}
    assert _same(plain, _trained(config, "margin", mode="margin", **off))
    assert _same(plain, _trained(config, "relabel", mode="relabel", **off))
    assert _report(config, "margin")["passes"] == _report(config, "plain")["passes"]
    assert not _same(plain, _trained(config, "other", mode="margin", lambda_=1.0))


def test_focusing_changes_the_adapter_and_costs_what_its_views_cost(config):
    without = _trained(config, "without", eta=0.0)
    focused = _trained(config, "focused", eta=2.0, views=("flip",))
    assert not _same(without, focused)
    # Four steps of two pairs: policy 4 and reference 4 forward, 4 backward; the view adds 8 forward.
    assert _report(config, "without")["passes"] == {"forward": 32, "backward": 16}
    assert _report(config, "focused")["passes"] == {"forward": 64, "backward": 16}


def test_first_loss_is_log_two_and_the_pairs_are_learnt(config):
    learn = {"learning_rate": 1e-3, "steps": 20, "batch_size": 4, "fixed_draws": 1}
    _trained(config, "run", objective="dpo", safe_pairs="quality", **learn)
    curve = _report(config, "run")["curve"]
    assert curve[0]["loss"] == pytest.approx(np.log(2.0), abs=1e-6)
    last = curve[-1]
    assert last["loss"] < 0.5 and last["accuracy"] == 1.0
    assert last["winner_error"] < last["loser_error"] and last["gap"] < 0


def test_micro_batches_do_not_change_the_result(config):
    changes = {"eta": 1.0, "views": ("noise",), "steps": 3}
    whole = _trained(config, "whole", batch_size=4, **changes)
    split = _trained(config, "split", batch_size=2, gradient_accumulation=2, **changes)
    for key in whole:
        # As a whole: AdamW gives a single weight whose gradient is nearly 0 a step of either sign.
        assert float((whole[key] - split[key]).norm()) < 1e-3 * float(whole[key].norm()), key


@pytest.mark.parametrize(("family", "prediction"), [("sdxl", "epsilon"), ("sd3", "flow")])
def test_other_families_train(config, family, prediction):
    _trained(config, family, family, steps=2, batch_size=1)
    adapter = read_adapter(Path(config.output_dir) / family / "adapter.safetensors")
    assert adapter.metadata.prediction_type == prediction
    assert adapter.rank == 2
    assert max(float(pair.up.abs().max()) for pair in adapter.modules.values()) > 0


def test_v_prediction_takes_the_velocity_as_target(config):
    pipe = tiny_pipeline("sd1", prediction_type="v_prediction")
    made = replace(config, output_dir=str(Path(config.output_dir) / "v"), steps=1, objective="dpo")
    train(made, pipe)
    velocity = _report(config, "v")["curve"][0]["winner_error"]
    _trained(config, "epsilon", steps=1, objective="dpo")
    assert velocity != _report(config, "epsilon")["curve"][0]["winner_error"]


def test_best_by_validation_is_what_is_written(config):
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
    torch.testing.assert_close(
        store.get(["a ball number 1"])["text"], encode_prompts(pipe, ["a ball number 1"], "cpu")["text"]
    )


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


def test_fixed_draws_spare_the_reference(config):
    _trained(config, "run", steps=9, fixed_draws=1, objective="dpo", safe_pairs="quality")
    # Six pairs, two a step: the first three steps see the reference, the other six do not.
    assert _report(config, "run")["passes"] == {"forward": 9 * 4 + 3 * 4, "backward": 36}


def test_resuming_with_other_settings_is_refused_unless_begun_again(config):
    train(replace(config, steps=1), tiny_pipeline("sd1"))
    with pytest.raises(ConfigError, match="beta"):
        train(replace(config, steps=2, beta=100.0), tiny_pipeline("sd1"))
    train(replace(config, steps=2, beta=100.0, resume=False), tiny_pipeline("sd1"))
    train(replace(config, steps=3, beta=100.0), tiny_pipeline("sd1"))


def test_what_cannot_be_trained_is_refused(config):
    with pytest.raises(PipelineError, match="Flux"):
        train(config, tiny_pipeline("flux"))
    with pytest.raises(ConfigError, match="targets"):
        train(replace(config, targets=("nowhere",)), tiny_pipeline("sd1"))
    with pytest.raises(TableError, match="none of 6 pairs"):
        train(replace(config, tau=5.0), tiny_pipeline("sd1"))
    with pytest.raises(ConfigError, match="validation_prompts"):
        train(replace(config, validate_every=1), tiny_pipeline("sd1"))


def test_denoiser_is_called_as_the_pipeline_calls_it():
    """One denoising call through `Denoiser` equals the pipeline's own, seen on its first step."""
    for family in ("sd1", "sdxl", "sd3"):
        pipe = tiny_pipeline(family)
        denoiser = denoiser_of(pipe)
        caught = {}

        def catch(module, args, kwargs, output, caught=caught):
            sample = args[0] if args else kwargs["hidden_states"]
            step = args[1] if len(args) > 1 else kwargs["timestep"]
            caught.setdefault("call", (sample.clone(), step, output[0].clone()))

        handle = denoiser.module.register_forward_hook(catch, with_kwargs=True)
        pipe(
            "a ball",
            num_inference_steps=2,
            guidance_scale=0.0 if family != "sd3" else 1.0,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        handle.remove()
        sample, step, expected = caught["call"]
        index = (denoiser.schedule.timesteps.float() - step.float()).abs().argmin()[None]
        assert float((denoiser.schedule.timesteps[index] - step).abs().max()) < 1e-3
        with torch.no_grad():
            made = denoiser.predict(sample, index, encode_prompts(pipe, ["a ball"], "cpu"), SIZE)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_order_visits_every_pair_once_an_epoch_and_keeps_the_share():
    benign = torch.tensor([True, False, False, False, False])
    order = Order(benign, seed=0)
    assert sorted(order.at(position)[0] for position in range(5)) == list(range(5))
    assert {order.at(position)[1] for position in range(5, 10)} == {1}
    mixed = [Order(benign, seed=0, share=0.5).at(position) for position in range(8)]
    assert sum(pair == 0 for pair, _ in mixed) == 4
    assert sorted(pair for pair, _ in mixed if pair) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="benign_share"):
        Order(torch.zeros(3, dtype=torch.bool), seed=0, share=0.5)


def test_generators_differ_by_place_and_not_by_history():
    draws = {tuple(torch.rand(2, generator=generator(0, "sample", step, 3)).tolist()) for step in range(50)}
    assert len(draws) == 50
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))


def test_learning_rate_schedules():
    assert [learning_rate_factor(step, 10, 4, "constant") for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert learning_rate_factor(7, 10, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"beta": -1.0}, "beta"),
        ({"lambda_": -0.5}, "lambda_"),
        ({"mode": "sum"}, "mode"),
        ({"views": ("blur",)}, "views"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"objective": "dpo", "eta": 1.0}, "eta"),
        ({"fixed_draws": 2, "preservation": 1.0}, "fixed_draws"),
        ({"t_min": 10, "t_max": 10}, "t_max"),
        ({"targets": "to_q"}, "targets"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_config_is_checked_when_made(config, changes, named):
    with pytest.raises(ConfigError, match=named):
        replace(config, **changes)


def test_config_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("pairs: p.parquet\noutput_dir: out\nlearning_rate: 3e-4\nviews: [flip]\n")
    made = TrainConfig.from_yaml(path, rank=16)
    assert (made.learning_rate, made.views, made.rank) == (3e-4, ("flip",), 16)
    with pytest.raises(ConfigError, match="ranks"):
        TrainConfig.from_yaml(path, ranks=16)
    path.write_text("output_dir: out\n")
    with pytest.raises(ConfigError, match="pairs"):
        TrainConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["sticker-spo", "sticker-dpo", "sd15"])
def test_bundled_configurations_are_valid(name):
    assert TrainConfig.from_yaml(CONFIGS / f"{name}.yaml").pairs


def test_the_two_sticker_runs_have_one_budget_and_one_optimiser():
    spo, dpo = (TrainConfig.from_yaml(CONFIGS / f"sticker-{name}.yaml") for name in ("spo", "dpo"))
    for field in ("pairs", "budget", "batch_size", "rank", "learning_rate", "steps", "validate_every", "benign_share"):
        assert getattr(spo, field) == getattr(dpo, field)
    assert (spo.objective, dpo.objective, dpo.eta) == ("spo", "dpo", 0.0)

"""What any objective may be given: region weights, the noise an image was drawn from, automatic beta, an adapter to
begin from, categories; and that each objective runs, resumes, and leaves an adapter that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import RedWeaponCost
from support.objectives import LATENT, batch, batches, context, crowded_table, predictions
from support.pairs import changed, pair_table, train_config
from support.pipelines import SIZE, draw, fresh, random_adapter, tiny_pipeline

from t2i_spo_plugin import load_spo_lora
from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.cost import CostBatch
from t2i_spo_plugin.errors import ConfigError, DomainError, NotScoredError, TableError
from t2i_spo_plugin.guards import Guard, Policy
from t2i_spo_plugin.guards.policy import Category
from t2i_spo_plugin.training import train
from t2i_spo_plugin.training.data import prepare
from t2i_spo_plugin.training.data.batches import Batch
from t2i_spo_plugin.training.data.caches import ShardStore, SourceImage
from t2i_spo_plugin.training.data.regions import RegionOptions, Regions, build_maps, region_weights
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule
from t2i_spo_plugin.training.objectives import (
    OBJECTIVES,
    CostGradientOptions,
    DPOOptions,
    cost_gradient,
    make_objective,
)
from t2i_spo_plugin.training.objectives.augmentations import augmented
from t2i_spo_plugin.training.objectives.losses import per_sample_error
from t2i_spo_plugin.training.objectives.running import Beta, RunningMean


# --- region weights ---


def test_region_weights_have_mean_one_and_follow_the_map():
    costs = torch.zeros(2, 1, 8, 8)
    costs[0, :, :, 4:] = 1.0
    weights = region_weights(costs, (4, 4), inside=3.0, outside=1.0)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    assert weights[0, 0, 0].tolist() == [0.5, 0.5, 1.5, 1.5] and (weights[1] == 1.0).all()
    assert (region_weights(costs, (4, 4), 0.0, 1.0)[0, 0, 0] == torch.tensor([2.0, 2.0, 0.0, 0.0])).all()
    assert (region_weights(torch.zeros(1, 1, 4, 4), (4, 4), 1.0, 0.0) == 1.0).all(), "nothing unsafe: all alike"


def test_weighted_errors_are_the_mean_of_weighted_squares_and_weights_of_one_change_nothing():
    place = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, *LATENT, generator=place) for _ in range(2))
    weights = torch.rand(3, 1, *LATENT[1:], generator=place)
    torch.testing.assert_close(per_sample_error(one, two, weights), (weights * (one - two) ** 2).mean((1, 2, 3)))
    assert torch.equal(per_sample_error(one, two, torch.ones(3, 1, *LATENT[1:])), per_sample_error(one, two))


def store_of(folder: Path, maps: dict[str, torch.Tensor]) -> ShardStore:
    store = ShardStore(folder)
    store.append(list(maps), {"map": torch.stack(list(maps.values()))})
    return store


def test_both_images_of_a_pair_are_weighed_by_what_is_unsafe_in_either(tmp_path):
    maps = {key: torch.zeros(8, 8) for key in "abcd"}
    maps["a"][:4], maps["c"][:, :4] = 1.0, 1.0
    regions = Regions(store_of(tmp_path / "maps", maps), 3.0, 1.0)
    made = batches(tmp_path, regions, random_flip=True)
    seen = set()
    for step in range(6):
        got = made.at(step, (2 * step, 2 * step + 1))
        for number, example in enumerate(got.examples):
            weights = got.weights[number, 0]
            if example == 1:
                assert (weights == 1.0).all()
                continue
            # Three quarters are unsafe in one of the two: mean weight 2.5.
            expected = torch.full(LATENT[1:], 1.2)
            quarter = (slice(LATENT[1] // 2, None), slice(LATENT[2] // 2, None))
            expected[quarter] = 0.4
            mirrored = not torch.allclose(weights, expected)
            torch.testing.assert_close(weights.flip(-1) if mirrored else weights, expected)
            seen.add(mirrored)
    assert seen == {True, False}, "weights are mirrored with their image"


@pytest.mark.parametrize("name", ["flip", "shift"])
def test_augmentations_move_the_weights_with_the_latents(name, tmp_path):
    weights = torch.rand(3, 1, *LATENT[1:])
    latents = weights.expand(2, 3, *LATENT).clone()
    one = Batch(latents, latents, torch.zeros(2, 3).long(), {}, {}, 0, (0, 1, 2), (0, 1, 2), (0, 0, 0), weights)
    given = SimpleNamespace(sampling=SimpleNamespace(seed=0), family=SimpleNamespace(mirrored=lambda x: x.flip(-1)))
    moved = augmented(name, one, given)
    assert torch.equal(moved.latents[0, :, :1], moved.weights) and not torch.equal(moved.weights, weights)
    assert augmented(name, replace(one, weights=None), given).weights is None


def test_regions_need_a_weight_somewhere_and_are_off_at_one():
    assert not RegionOptions().active and RegionOptions(inside=2.0).active and RegionOptions(outside=0.0).active
    with pytest.raises(ConfigError, match=r"regions.inside \+ regions.outside must be above 0"):
        RegionOptions(inside=0.0, outside=0.0)


# --- noise ---


def test_drawn_noise_is_what_the_pipeline_begins_with(tmp_path):
    pipe, seen = tiny_pipeline("sd1"), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    draw(pipe, "a ball", seed=7, guidance_scale=0.0, num_inference_steps=1, output_type="latent")
    handle.remove()
    made = batches(tmp_path, drawn_noise=True)
    got = made.at(0, (0, 1))
    place = got.examples.index(0)
    torch.testing.assert_close(got.noise[0, place], seen[0][0] / pipe.scheduler.init_noise_sigma)
    plain = batches(tmp_path / "plain").at(0, (0, 1))
    # The second image of the second example has no seed: fresh noise, as without the switch.
    assert torch.equal(got.noise[1, 1 - place], plain.noise[1, 1 - place])
    assert not torch.equal(got.noise[0, place], got.noise[1, place]) and torch.equal(plain.noise[0], plain.noise[1])
    assert torch.equal(got.index, plain.index)


def test_drawn_noise_is_mirrored_with_its_image(tmp_path):
    made, plain = (
        batches(tmp_path / "a", drawn_noise=True, random_flip=True),
        batches(tmp_path / "b", drawn_noise=True),
    )
    mirrored = set()
    for step in range(6):
        one, two = made.at(step, (step,)).noise[0, 0], plain.at(step, (step,)).noise[0, 0]
        mirrored.add(torch.equal(one.flip(-1), two))
        assert torch.equal(one, two) or torch.equal(one.flip(-1), two)
    assert mirrored == {True, False}


def test_independent_timesteps_differ_between_the_images_and_change_nothing_else(tmp_path):
    shared, own = batches(tmp_path / "a"), batches(tmp_path / "b", independent_timesteps=True)
    one, two = shared.at(0, (0, 1)), own.at(0, (0, 1))
    assert torch.equal(one.index[0], one.index[1]) and torch.equal(two.index[0], one.index[0])
    assert not torch.equal(two.index[1], two.index[0]) and torch.equal(one.noise, two.noise)


# --- automatic beta ---


def test_a_running_mean_is_of_whole_steps_over_all_ranks():
    mean = RunningMean(0.75)
    mean.see(torch.tensor([1.0, 3.0]))
    mean.see(torch.tensor([8.0]))
    assert mean.value == 0.0, "nothing moves within a step"
    mean.end_step(lambda total: total + torch.tensor([28.0, 1.0]))  # another rank saw 28
    assert mean.value == 0.25 * 40.0 / 4.0
    mean.end_step(lambda total: total)
    assert mean.value == 2.5, "a step without values changes nothing"


def test_beta_falls_so_that_the_mean_logit_is_the_largest_asked_for_and_never_rises():
    beta = Beta(5000.0, 2.0)
    assert beta.value == 5000.0
    beta.see(torch.tensor([-0.01, 0.03]))
    beta.end_step(lambda total: total)
    # Running mean of |D| / 2: a tenth of 0.01.
    assert beta.value == pytest.approx(2.0 / 0.001)
    state = beta.state_dict()
    other = Beta(5000.0, 2.0)
    other.load_state_dict(state)
    assert other.value == beta.value == state["beta"]
    assert Beta(5.0, 2.0).state_dict()["beta"] == 5.0
    small = Beta(5.0, 2.0)
    small.see(torch.tensor([0.01]))
    small.end_step(lambda total: total)
    assert small.value == 5.0
    assert Beta(5.0).state_dict() == {}


def test_an_objective_trains_with_the_beta_of_the_steps_before():
    made, _ = predictions(2, close=1.0)
    plain, auto = (make_objective(DPOOptions(beta=1000.0, auto_beta=value)) for value in (None, 0.5))
    assert torch.equal(*(one.loss(batch(), made, context())[0] for one in (plain, auto)))
    auto.end_step(lambda total: total)
    expected = make_objective(DPOOptions(beta=auto.state_dict()["beta"])).loss(batch(), made, context())[0]
    assert torch.equal(auto.loss(batch(), made, context())[0], expected) and auto.state_dict()["beta"] < 100.0


# --- runs ---


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return crowded_table(tmp_path_factory.mktemp("crowded") / "pairs.parquet")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def report_of(config) -> dict:
    return json.loads((Path(config.output_dir) / "report.json").read_text())


RUNS = {
    "scdpo": {"beta": 500.0, "augmentations": ["flip"]},
    "alignguard": {"beta": 500.0, "auto_beta": 0.5},
    "duo": {"beta": 50.0},
    "kto": {"beta": 500.0, "auto_beta": 0.5},
    "mapo": {},
    "group": {"beta": 500.0, "negatives": 2, "auto_beta": 0.5},
    "pareto": {"beta": 500.0},
    "nft": {"beta": 0.5},
}
PASSES = {"kto": (8, 4), "mapo": (8, 8), "group": (24, 12), "nft": (8, 4), "duo": (20, 10), "scdpo": (32, 8)}
"""Forward and backward samples of two steps of two examples; pairs with a reference and nothing else take 16 and 8."""


@pytest.mark.parametrize("name", RUNS)
def test_every_objective_trains_resumes_bit_for_bit_and_leaves_an_adapter_that_loads(name, table, cache, tmp_path):
    options = {"name": name, **RUNS[name]}
    shared = {"pairs": str(table), "cache_dir": str(cache), "objective": options, "steps": 2}
    whole = train_config(tmp_path / "whole", **shared)
    path = train(whole, tiny_pipeline("sd1"))
    parted = train_config(tmp_path / "parted", **shared)
    train(replace(parted, steps=1), tiny_pipeline("sd1"))
    resumed = read_adapter(train(parted, tiny_pipeline("sd1")))
    adapter = read_adapter(path)
    assert all(torch.equal(resumed.modules[key].up, pair.up) for key, pair in adapter.modules.items())
    assert any(bool(pair.up.any()) for pair in adapter.modules.values())
    report = report_of(whole)
    assert (report["passes"]["forward"], report["passes"]["backward"]) == PASSES.get(name, (16, 8))
    assert report["curve"] == report_of(parted)["curve"]
    assert {*OBJECTIVES[name].objective.logged, "loss"} <= report["curve"][0].keys()
    assert adapter.metadata.extra["objective"] == name
    load_spo_lora(tiny_pipeline("sd1"), path)


@pytest.mark.parametrize("name", ["kto", "group"])
def test_splitting_a_step_into_micro_batches_changes_nothing(name, table, cache, tmp_path):
    options = {"name": name, **RUNS[name]}
    shared = {"pairs": str(table), "cache_dir": str(cache), "objective": options, "steps": 3}
    whole = train_config(tmp_path / "whole", **shared, batch_size=4)
    parted = train_config(tmp_path / "parted", **shared, batch_size=1, gradient_accumulation=4)
    for config in (whole, parted):
        train(config, tiny_pipeline("sd1"))
    for one, two in zip(report_of(whole)["curve"], report_of(parted)["curve"], strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_an_adapter_is_gone_on_from_and_may_be_its_own_reference(table, cache, tmp_path):
    begun = random_adapter(fresh("sd1"), rank=2, alpha=3.0, components=("unet",), layers=("to_q", "to_v"))
    file = write_adapter(begun, tmp_path / "begun.safetensors")
    shared = {"pairs": str(table), "cache_dir": str(cache), "adapter": str(file), "steps": 1, "learning_rate": 1e-9}
    losses = {}
    for reference in ("base", "adapter"):
        config = train_config(
            tmp_path / reference, **shared, reference=reference, objective={"name": "dpo", "beta": 50.0}
        )
        made = read_adapter(train(config, tiny_pipeline("sd1")))
        losses[reference] = report_of(config)["curve"][0]["loss"]
        assert made.modules.keys() == begun.modules.keys()
        for key, pair in begun.modules.items():
            torch.testing.assert_close(made.modules[key].delta(), pair.delta(), rtol=1e-3, atol=1e-5)
    assert losses["adapter"] == pytest.approx(0.69314718, rel=1e-6), "the model is its own reference at first"
    assert abs(losses["base"] - 0.6931) > 1e-3
    # It moves away from its reference, which stays.
    config = train_config(
        tmp_path / "far",
        **shared | {"steps": 3, "learning_rate": 1e-2},
        reference="adapter",
        objective={"name": "nft"},
    )
    train(config, pipe := tiny_pipeline("sd1"))
    moved = [entry["moved"] for entry in report_of(config)["curve"]]
    assert moved[0] == 0.0 and min(moved[1:]) > 0.0
    assert not getattr(pipe.unet, "peft_config", None), "the pipeline is left as it came"


def test_adapters_that_cannot_be_gone_on_from_are_refused(table, cache, tmp_path):
    shared = {"pairs": str(table), "cache_dir": str(cache), "objective": {"name": "dpo"}}
    with pytest.raises(ConfigError, match="reference adapter needs an adapter"):
        train_config(tmp_path, **shared, reference="adapter")
    text = random_adapter(fresh("sd1"), components=("unet", "text_encoder"))
    ranks = random_adapter(fresh("sd1"), components=("unet",))
    one, pair = next(iter(ranks.modules.items()))
    ranks = replace(ranks, modules=ranks.modules | {one: replace(pair, alpha=5.0)})
    other = random_adapter(fresh("sdxl"), components=("unet",))
    for name, adapter, message in (
        ("text", text, "only the unet is trained"),
        ("ranks", ranks, "several ranks or alphas"),
        ("other", other, "for another unet"),
    ):
        file = write_adapter(adapter, tmp_path / f"{name}.safetensors")
        config = train_config(tmp_path / name, **shared, adapter=str(file), steps=1)
        with pytest.raises(ConfigError, match=message):
            train(config, pipe := tiny_pipeline("sd1"))
        assert not getattr(pipe.unet, "peft_config", None)


def test_categories_leave_benign_prompts_and_those_named(table, cache, tmp_path):
    config = train_config(tmp_path, pairs=str(table), cache_dir=str(cache), steps=1, categories=["war"])
    train(config, tiny_pipeline("sd1"))
    counts = report_of(config)["pairs"]
    # Of guns all pairs but the one unsafe on both sides, of balls all: none ties in its reward.
    assert counts["kept"] == 5 + 6 and counts["of_other_categories"] == 5
    with pytest.raises(TableError, match="is of peace; the table has war, weapons"):
        train(changed(config, categories=["peace"], resume=False), tiny_pipeline("sd1"))


def test_drawn_noise_needs_seeds_in_the_table(cache, tmp_path):
    pairs = pair_table(tmp_path / "pairs.parquet")
    config = train_config(tmp_path, pairs=str(pairs), cache_dir=str(cache), noise="drawn", steps=1)
    with pytest.raises(TableError, match="states the seed of no image"):
        train(config, tiny_pipeline("sd1"))


def half_red(path: Path) -> SourceImage:
    """An image whose left half is red, the rest of it black."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, : SIZE // 2, 0] = 255
    Image.fromarray(pixels).save(path)
    return SourceImage("half", path.read_bytes(), "half.png")


def test_cost_maps_are_the_guards_and_are_made_once(tmp_path, capsys):
    store, image = ShardStore(tmp_path / "maps"), half_red(tmp_path / "half.png")
    model = RedWeaponCost(0.4)
    guard = Guard(model, Policy("red", "photo", (Category("weapons"),)))
    build_maps(store, [image, image], guard, SIZE, "photo", progress=False)
    costs = Regions(store, 2.0, 1.0).maps(["half"])[0, 0]
    assert costs[:, : SIZE // 2 - 2].min() > 0.5 and costs[:, SIZE // 2 + 2 :].max() < 0.01
    files = sorted((tmp_path / "maps").iterdir())
    model.level = 0.0
    build_maps(store, [image], guard, SIZE, "photo", progress=False)
    assert sorted((tmp_path / "maps").iterdir()) == files
    with pytest.raises(DomainError):
        build_maps(store, [image], guard, SIZE, "sticker", progress=False)
    nan = Guard(NotANumber(), Policy("red", "photo", (Category("weapons"),)))
    with pytest.raises(NotScoredError, match="half.png has no cost map: the cost model gave NaN"):
        build_maps(ShardStore(tmp_path / "nan"), [image], nan, SIZE, "photo", progress=False)


class NotANumber(RedWeaponCost):
    def __call__(self, images):
        one = super().__call__(images)
        return CostBatch(one.logits * float("nan"), one.logit_map)


def test_a_run_weighs_its_errors_by_the_cost_map(table, cache, tmp_path, monkeypatch):
    guard = Guard(RedWeaponCost(0.45), Policy("red", "photo", (Category("weapons"),)))
    monkeypatch.setattr(prepare, "load_guard", lambda *names: guard)
    shared = {"pairs": str(table), "cache_dir": str(cache), "steps": 1, "objective": {"name": "dpo", "beta": 500.0}}
    runs = {
        name: train_config(tmp_path / name, **shared, regions={"inside": inside})
        for name, inside in (("plain", 1.0), ("weighed", 8.0))
    }
    for config in runs.values():
        train(config, tiny_pipeline("sd1"))
    plain, weighed = (report_of(config)["curve"][0] for config in runs.values())
    assert plain["loss"] == weighed["loss"] == pytest.approx(0.69314718), "model and reference are weighed alike"
    assert abs(plain["winner_error"] - weighed["winner_error"]) > 1e-6
    models = [report_of(config)["identity"]["models"] for config in runs.values()]
    assert "regions" not in models[0] and models[1]["regions"].startswith("maps-")


# --- cost-gradient ---


class DifferentiableRed(RedWeaponCost):
    size = 8

    def score_tensor(self, pixels):
        maps = 4.0 * (pixels[:, :1] - self.level)
        return CostBatch(maps.mean((2, 3)), maps)


def judged_by(monkeypatch, quality=None, model=None):
    guard = Guard(model or DifferentiableRed(), Policy("red", "photo", (Category("weapons"),)))
    monkeypatch.setattr(cost_gradient, "load_guard", lambda *names: guard)
    monkeypatch.setattr(cost_gradient, "load_quality_model", lambda name: SimpleNamespace(alignment=quality))


class Greenness:
    """Alignment is how green an image is, for every prompt."""

    size = 8

    def to(self, device):
        return self

    def embed_pixels(self, pixels):
        return pixels[:, 1].mean((1, 2))

    def embed_prompts(self, prompts):
        return torch.ones(len(prompts))

    def alignment(self, images, prompts):
        return images * prompts


def test_the_cost_gradient_is_of_the_image_that_one_step_shows(monkeypatch):
    judged_by(monkeypatch, Greenness())
    objective = make_objective(CostGradientOptions(lambda_=2.0, quality_model="any"))
    pipe = SimpleNamespace(vae=torch.nn.Linear(1, 1), text_encoder=None)
    objective.prepare(pipe, None, torch.device("cpu"))
    sigma = torch.linspace(0.1, 0.9, 9)
    schedule = NoiseSchedule("flow", 1 - sigma, sigma, 1000 * sigma)
    place = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.rand(4, 3, 8, 8, generator=place) for _ in range(3))
    prediction.requires_grad_()
    index, benign = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    family = SimpleNamespace(schedule=schedule, decode=lambda vae, clean: clean)
    step = SimpleNamespace(batches=SimpleNamespace(family=family, examples=SimpleNamespace(captions=list("abcd"))))
    data = SimpleNamespace(
        latents=latents[None], noise=noise[None], index=index[None], examples=(0, 1, 2, 3), columns={"benign": benign}
    )
    loss, statistics = objective.loss(data, SimpleNamespace(model=prediction[None]), step)
    level = sigma[index].view(4, 1, 1, 1)
    image = (1 - level) * latents + level * noise - level * prediction
    cost = torch.sigmoid(4.0 * (image[:, 0].mean((1, 2)) - 0.5))
    expected = (2.0 * cost - benign.float() * image[:, 1].mean((1, 2))).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, prediction, retain_graph=True)[0] for one in (loss, expected))
    )
    torch.testing.assert_close(statistics["cost"], cost.detach())
    assert statistics["alignment"].tolist()[1::2] == [0.0, 0.0], "a harmful prompt is never asked about"


def test_the_cost_gradient_lowers_the_cost(table, cache, tmp_path, monkeypatch):
    judged_by(monkeypatch)
    options = {"objective": {"name": "cost-gradient"}, "steps": 6, "batch_size": 4, "t_max": 400}
    config = train_config(tmp_path, pairs=str(table), cache_dir=str(cache), **options)
    train(config, pipe := tiny_pipeline("sd1"))
    costs = [entry["cost"] for entry in report_of(config)["curve"]]
    assert costs[-1] < costs[0] - 0.01
    assert all(value.requires_grad and value.grad is None for value in pipe.vae.parameters()), "left as it came"
    assert report_of(config)["passes"] == {"forward": 24, "backward": 24}
    assert {"cost_model", "policy"} <= report_of(config)["identity"]["models"].keys()
    with pytest.raises(DomainError):
        train(replace(config, output_dir=f"{tmp_path}/other"), with_domain(pipe, "sticker"))


def with_domain(pipe, domain):
    pipe.text_encoder.config.spo_domain = domain
    return pipe


def test_judges_without_gradients_are_refused(monkeypatch):
    pipe = SimpleNamespace(vae=torch.nn.Linear(1, 1), text_encoder=None)
    judged_by(monkeypatch, model=RedWeaponCost())
    with pytest.raises(ConfigError, match="RedWeaponCost has none"):
        make_objective(CostGradientOptions()).prepare(pipe, None, torch.device("cpu"))
    judged_by(monkeypatch, quality=object())
    with pytest.raises(ConfigError, match="no alignment with gradients"):
        make_objective(CostGradientOptions(quality_model="x")).prepare(pipe, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": {"name": "sft"}, "images": "x", "pairs": "", "regions": {"inside": 2.0}}, "leave out regions"),
        ({"objective": {"name": "sft"}, "images": "x", "pairs": "", "noise": "drawn"}, "leave out noise"),
        ({"objective": {"name": "sft"}, "images": "x", "pairs": "", "categories": ["a"]}, "leave out categories"),
        ({"objective": {"name": "cost-gradient"}, "regions": {"inside": 2.0}}, "no errors that could be weighed"),
        ({"objective": {"name": "kto"}, "terms": {"sft": {"weight": 1.0}}}, "kto knows no winners"),
        ({"objective": {"name": "kto"}, "terms": {"safedpo": {"delta": 1.0}}}, "kto knows no winners"),
        ({"objective": {"name": "nft"}, "draws_per_pair": 2}, "not its predictions, which nft needs"),
        ({"objective": {"name": "duo"}, "draws_per_pair": 2}, "which terms.output_preservation needs"),
        ({"objective": {"name": "mapo"}, "draws_per_pair": 2}, "mapo has no reference"),
        ({"objective": {"mode": "soft"}, "terms": {"safedpo": {"delta": 1.0}}}, "mode soft has targets"),
        ({"noise": "old"}, "noise must be one of fresh, drawn"),
        ({"objective": {"name": "dpo", "auto_beta": 0.0}}, "auto_beta must be above 0"),
        ({"objective": {"name": "nft", "beta": 2.0}}, r"beta must lie in \(0, 1\]"),
    ],
)
def test_switches_that_mean_nothing_for_an_objective_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_config(tmp_path, **({"pairs": "p.parquet"} | options))

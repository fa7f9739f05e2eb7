"""Ensembles: each rule against numbers computed by hand, disagreement in words, failures never safe."""

import json

import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, NaNCost
from transformers import ResNetConfig

from t2i_spo_plugin import load_cost_model
from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.cost.ensemble import Ensemble, EnsembleOptions
from t2i_spo_plugin.cost.vision import VisionCostModel
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.networks.backbone import MapClassifier


IMAGES = [Image.new("RGB", (16, 16), colour) for colour in ((250, 40, 90), (120, 200, 10), (60, 60, 200))]


class Level(ColourCost):
    """Like `ColourCost`, with one temperature and level of its own."""

    def __init__(self, level, temperature=1.0):
        super().__init__(level=level)
        self.temperature = torch.full((3,), temperature)


def ensemble(rule="any", k=2, models=None, names=()):
    models = models or [Level(0.3), Level(0.5, 2.0), Level(0.7)]
    names = names or [{}] * len(models)
    members = [(f"m{n}", model, one) for n, (model, one) in enumerate(zip(models, names, strict=True))]
    return Ensemble(members, EnsembleOptions(members=("x",), rule=rule, k=k))


def scaled(model):
    return model(IMAGES).logits / model.temperature


def test_each_rule_is_what_it_says():
    each = torch.stack([scaled(model) for _, model, _ in ensemble().members])
    assert torch.allclose(ensemble("any")(IMAGES).logits, each.max(0).values)
    assert torch.allclose(ensemble("k_of_n", 2)(IMAGES).logits, each.median(0).values)
    assert torch.allclose(ensemble("k_of_n", 3)(IMAGES).logits, each.min(0).values)
    assert torch.allclose(ensemble("k_of_n", 9)(IMAGES).logits, each.min(0).values)
    assert torch.allclose(ensemble("mean")(IMAGES).logits.sigmoid(), each.sigmoid().mean(0), atol=1e-5)


def test_two_of_three_are_unsafe_where_two_of_three_say_so():
    found = ensemble("k_of_n", 2)(IMAGES).logits >= 0
    votes = sum((scaled(model) >= 0).int() for _, model, _ in ensemble().members)
    assert torch.equal(found, votes >= 2) and found.any() and not found.all()


def test_members_disagree_in_words():
    reasons = ensemble()(IMAGES).reasons
    third = {f"m{n}": float(scaled(model)[1, 0].sigmoid()) for n, (_, model, _) in enumerate(ensemble().members)}
    words = ", ".join(f"{name} {value:.2f}" for name, value in third.items())
    assert f"the members disagree about red: {words}" in reasons[1]
    assert ensemble(models=[Level(0.5), Level(0.5)])(IMAGES).reasons == ("", "", "")


def test_what_one_member_fails_on_is_not_scored():
    black = Image.new("RGB", (16, 16))
    for rule in ("any", "mean", "k_of_n"):
        batch = ensemble(rule, models=[Level(0.3), NaNCost()])([IMAGES[0], black])
        assert batch.logits[0].isfinite().all() and batch.logits[1].isnan().all()
        assert "m1: gave NaN" in batch.reasons[1] and not batch.reasons[0].startswith("m1")


def test_categories_are_renamed_joined_and_left_out():
    names = [{"red": "warm", "green": "cold"}, {"blue": "cold"}]
    models = [Level(0.5), Level(0.4)]
    both = ensemble(models=models, names=names)
    assert both.categories == ("warm", "cold")
    first, second = (scaled(model) for model in models)
    assert torch.allclose(both(IMAGES).logits, torch.stack([first[:, 0], torch.maximum(first[:, 1], second[:, 2])], 1))
    with pytest.raises(ConfigError, match="m0 has no category pink"):
        ensemble(models=[Level(0.5)], names=[{"pink": "warm"}])


def test_the_map_is_that_of_the_member_which_decides_or_none():
    batch = ensemble("any")(IMAGES)
    assert torch.allclose(batch.logit_map.mean((2, 3)), batch.logits, atol=1e-5)

    class Silent(Level):
        def __call__(self, images):
            return CostBatch(super().__call__(images).logits)

    assert ensemble(models=[Level(0.5), Silent(0.3)])(IMAGES).logit_map is None


def test_the_answer_depends_neither_on_the_batch_nor_on_the_order():
    for rule in ("any", "mean", "k_of_n"):
        together = ensemble(rule)(IMAGES)
        assert torch.allclose(ensemble(rule)(IMAGES[::-1]).logits.flip(0), together.logits, atol=1e-6)
        assert torch.allclose(torch.cat([ensemble(rule)([one]).logits for one in IMAGES]), together.logits, atol=1e-6)


def test_a_file_names_the_members(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folders.append(str(tmp_path / f"m{seed}"))
        VisionCostModel(MapClassifier(config, 1).eval(), ["sexual"], "photo", 32).save_pretrained(folders[-1])
    described = {"kind": "ensemble", "members": [folders[0], {"model": folders[1]}], "rule": "mean"}
    (tmp_path / "both.yaml").write_text(json.dumps(described))
    model = load_cost_model(tmp_path / "both.yaml")
    each = torch.stack([load_cost_model(folder)(IMAGES).logits for folder in folders])
    assert torch.allclose(model(IMAGES).logits.sigmoid(), each.sigmoid().mean(0), atol=1e-5)
    for change, message in (
        ({"members": []}, "at least one member"),
        ({"members": folders[0]}, "a list of at least one member"),
        ({"members": [str(tmp_path / "bad.yaml")]}, "member of itself"),
        ({"rule": "most"}, "rule must be one of"),
        ({"members": ["nothing/"]}, "there is no cost model"),
        ({"members": [{"model": folders[0], "weight": 2}]}, "unknown weight"),
    ):
        (tmp_path / "bad.yaml").write_text(json.dumps(described | change))
        with pytest.raises(ConfigError, match=message):
            load_cost_model(tmp_path / "bad.yaml")
    mixed = [("a", Level(0.5), {}), ("b", ColourCost(domain="sticker"), {})]
    with pytest.raises(ConfigError, match="different domains: photo, sticker"):
        Ensemble(mixed, EnsembleOptions(members=("x",)))

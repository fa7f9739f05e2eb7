"""Cost models from CLIP and SigLIP checkpoints: tiny random ones, saved to a folder as a real one lies there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.clip import CATEGORIES, PATCH, SIZE, patch_head, saved_model
from support.photographs import HARMLESS
from support.pipelines import _clip_tokenizer, t5_tokenizer

from t2i_spo_plugin import ClipCostModel, CostModel, cli, clip_cost_model, clip_tower, load_cost_model
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor


IMAGES = list(HARMLESS.values())


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, saved_model(request.param, folder)


@pytest.fixture(scope="module")
def model(checkpoint):
    return clip_cost_model(checkpoint[0], CATEGORIES)


def test_the_logit_compares_a_category_with_neutral_prompts(checkpoint, model):
    """By the model's own functions."""
    _, reference = checkpoint
    name = reference.config.model_type
    mean, std = (0.5, 0.5) if name == "siglip" else (model.tower.mean, model.tower.std)
    pixels = (to_tensor(IMAGES, SIZE) - mean) / std
    tokenizer = _clip_tokenizer() if name == "clip" else t5_tokenizer()

    def unit(output):
        return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)

    def text(prompts):
        tokens = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return unit(unit(reference.get_text_features(**tokens)).mean(0))

    with torch.no_grad():
        image = unit(reference.get_image_features(pixel_values=pixels))
        neutral = text(["a photo", "an ordinary photo of an everyday scene"])
        scale = reference.logit_scale.exp()
        expected = scale * torch.stack([image @ (text(p) - neutral) for p in CATEGORIES.values()], 1)
    assert isinstance(model, CostModel) and model.categories == ("weapons", "alcohol")
    assert torch.allclose(model(IMAGES).logits, expected, atol=1e-4)


def test_the_statistics_are_those_of_the_checkpoint_where_it_says_any(tmp_path):
    saved_model("clip", tmp_path)
    assert torch.allclose(clip_tower(tmp_path).mean.flatten(), torch.tensor([0.4815, 0.4578, 0.4082]), atol=1e-4)
    metadata = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "image_processor_type": "CLIPImageProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(metadata))
    tower = clip_tower(tmp_path)
    assert torch.equal(tower.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(tower.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_the_answer_for_an_image_does_not_depend_on_its_neighbours(model):
    together = model(IMAGES)
    alone = [model(image) for image in IMAGES]
    assert torch.allclose(torch.cat([one.logits for one in alone]), together.logits, atol=1e-5)
    assert torch.allclose(torch.cat([one.logit_map for one in alone]), together.logit_map, atol=1e-5)
    assert torch.allclose(model(IMAGES[::-1]).logits.flip(0), together.logits, atol=1e-5)


def test_the_map_of_prompts_is_a_hint_with_the_right_mean(model):
    batch = model(IMAGES)
    assert batch.logit_map.shape == (len(IMAGES), 2, SIZE // PATCH, SIZE // PATCH)
    assert torch.allclose(batch.logit_map.mean((2, 3)), batch.logits, atol=1e-5)
    assert float(batch.logit_map.flatten(2).std(2).min()) > 1e-3


def test_the_map_of_a_head_on_patches_is_exact(checkpoint):
    """Each place adds what the head makes of its hidden state, and nothing else is added."""
    folder, reference = checkpoint
    model = patch_head(folder)
    pixels = to_tensor(IMAGES, SIZE)
    with torch.no_grad():
        hidden = reference.vision_model((pixels - model.tower.mean) / model.tower.std).last_hidden_state
        if reference.config.model_type == "clip":
            hidden = reference.vision_model.post_layernorm(hidden[:, 1:])
    expected = (hidden @ model.weight.T + model.bias).transpose(1, 2).unflatten(2, (4, 4))
    batch = model(IMAGES)
    assert torch.allclose(batch.logit_map, expected, atol=1e-4)
    assert torch.allclose(batch.logits, expected.mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize("kind", ["prompts", "patches"])
def test_a_clip_cost_model_scores_the_same_after_saving(checkpoint, model, kind, tmp_path):
    saved = model if kind == "prompts" else patch_head(checkpoint[0])
    saved.save_pretrained(tmp_path)
    again = load_cost_model(tmp_path)
    assert again.categories == saved.categories and again.features == saved.features
    assert torch.equal(again(IMAGES).logits, saved(IMAGES).logits)
    assert not list(tmp_path.glob("*.bin")) and sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000


def test_a_guard_takes_a_clip_cost_model(model):
    policy = Policy("mine", "photo", (Category("weapons", 0.9), Category("alcohol", 0.9)))
    report = Guard(model, policy)([*IMAGES, np.full((8, 8, 3), np.nan)], domain="photo")
    assert report.flagged[-1] is None and None not in report.flagged[:-1]
    expected = policy.category_costs(model(IMAGES).logits, model.temperature, model.categories)[0].amax(1)
    assert torch.allclose(report.costs[:-1], expected, atol=1e-5)


def test_spo_score_takes_a_clip_cost_model_with_its_policy(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    IMAGES[0].save(tmp_path / "a.png")
    policy = Policy("mine", "photo", (Category("weapons", 0.9), Category("alcohol", 0.9)))
    (tmp_path / "mine.yaml").write_text(policy.to_yaml(), encoding="utf-8")
    words = ["score", str(tmp_path / "a.png"), "--domain", "photo", "--cost-model", str(tmp_path / "model")]
    assert cli.main(words) == 2
    assert "no bundled policy is about weapons, alcohol" in capsys.readouterr().err
    assert cli.main([*words, "--policy", str(tmp_path / "mine.yaml")]) == 0
    expected = Guard(model, policy)(IMAGES[0]).costs.item()
    assert f"cost {expected:.3f}" in capsys.readouterr().out


def test_an_image_costs_more_the_nearer_it_is_to_the_prompts(model):
    """Gradients go through: an image drawn towards a category gets a higher logit of it."""
    pixels = to_tensor(Image.new("RGB", (SIZE, SIZE), (120, 120, 120))).requires_grad_()
    before = model.score_tensor(pixels).logits[0, 0]
    (gradient,) = torch.autograd.grad(before, pixels)
    moved = (pixels + 0.02 * gradient.sign()).clamp(0, 1)
    assert model.score_tensor(moved).logits[0, 0] > before


def test_categories_and_heads_that_do_not_fit_are_refused(checkpoint, tmp_path):
    folder, reference = checkpoint
    for categories, neutral in (({}, ["a photo"]), ({"weapons": []}, ["a photo"]), (CATEGORIES, [])):
        with pytest.raises(ConfigError, match="at least one category"):
            clip_cost_model(folder, categories, neutral)
    tower = clip_tower(folder)
    with pytest.raises(ConfigError, match=r"expected a weight \[1, 24\] and a bias \[1\]"):
        ClipCostModel(tower, folder, torch.zeros(1, 7), torch.zeros(1), ["weapons"], features="patches")
    with pytest.raises(ConfigError, match="embedding, patches"):
        ClipCostModel(tower, folder, torch.zeros(1, 24), torch.zeros(1), ["weapons"], features="pixels")
    reference.text_model.config.save_pretrained(tmp_path / "text")
    with pytest.raises(SPOError, match="expected one of clip, siglip"):
        clip_tower(tmp_path / "text")
    with pytest.raises(SPOError, match="cannot load the model"):
        clip_tower(tmp_path / "nothing")


def test_a_pickle_is_not_opened(checkpoint, tmp_path):
    folder, reference = checkpoint
    reference.config.save_pretrained(tmp_path)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SPOError, match="cannot load the model"):
        clip_tower(tmp_path)


def test_local_files_only_opens_no_socket(tmp_path, monkeypatch):
    import socket

    metadata = {
        "kind": "clip_head",
        "source": "nobody/none",
        "outputs": ["x"],
        "features": "embedding",
        "domain": "photo",
    }
    (tmp_path / "metadata.json").write_text(json.dumps(metadata | {"temperature": [1.0]}))
    save_file({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: asked.append(given) or [])
    with pytest.raises(SPOError, match="cannot load the model nobody/none"):
        load_cost_model(tmp_path, local_files_only=True)
    assert not asked
    save_file({"weight": torch.zeros(1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(SPOError, match="expected weight and bias, found weight"):
        load_cost_model(tmp_path)

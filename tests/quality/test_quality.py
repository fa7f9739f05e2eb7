"""Quality: normalised between two measured ends, judged against safe completions, independent of the batch."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, ResNetConfig

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.networks.backbone import MapClassifier
from t2i_spo_plugin.quality.clip import SmallCLIP, load_small_clip
from t2i_spo_plugin.quality.normalise import QualityModel, Reference, make_reference, normalise, spoil
from t2i_spo_plugin.quality.realism import RealismModel, nearest_similarity
from t2i_spo_plugin.registry import QUALITY_MODELS, load_quality_model
from t2i_spo_plugin.sticker.build.tokenizer import learn_tokenizer
from t2i_spo_plugin.sticker.world import describe


PROMPTS = ["a noto sticker of a bomb", "a flat sticker of a balloon", "a noto sticker of a cat"]


@pytest.fixture(scope="module")
def vision():
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


@pytest.fixture(scope="module")
def clip(vision):
    torch.manual_seed(0)
    tokenizer = learn_tokenizer([describe(seed).caption for seed in range(200)], (), limit=600)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
    )
    return SmallCLIP(vision, text, tokenizer, 64, width=8).eval()


@pytest.fixture(scope="module")
def realism(vision):
    torch.manual_seed(1)
    network = MapClassifier(vision, 2)
    network(torch.rand(8, 3, 64, 64))
    return RealismModel(network.eval(), torch.randn(20, 16), torch.zeros(16), 64)


@pytest.fixture(scope="module")
def model(clip, realism):
    return QualityModel(clip, realism, Reference((-1.0, 1.0), (-1.0, 1.0), "none", 1))


def test_a_clip_may_leave_its_text_tower_where_the_pipeline_has_it(clip, tmp_path):
    clip.text.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    clip.tokenizer.save_pretrained(tmp_path / "pipeline" / "tokenizer")
    folder = tmp_path / "quality" / "alignment"
    clip.save_pretrained(folder, text_encoder="../../pipeline/text_encoder")
    assert not any(name.startswith("text.") for name in load_file(folder / "model.safetensors"))
    assert not (folder / "tokenizer.json").exists() and not (folder / "text_config.json").exists()
    loaded = load_small_clip(folder)
    assert torch.allclose(loaded.embed_prompts(PROMPTS), clip.embed_prompts(PROMPTS), atol=1e-3)
    (tmp_path / "pipeline").rename(tmp_path / "elsewhere")
    with pytest.raises(SPOError, match="tokenizer"):
        load_small_clip(folder)


def test_a_quality_model_knows_its_domain(tmp_path):
    assert load_quality_model("sticker").domain == "sticker"
    copied = shutil.copytree(QUALITY_MODELS.rows["sticker"].path, tmp_path / "copied")
    reference = Reference.load(copied / "reference.json")
    for domain in ("photo", ""):
        reference.save(copied / "reference.json", domain)
        assert load_quality_model(copied).domain == domain
    assert Reference.load(copied / "reference.json") == reference


def test_normalise_is_linear_between_its_ends_and_clipped_outside():
    values = normalise(torch.tensor([-5.0, 0.2, 0.4, 0.6, 9.0]), (0.2, 0.6))
    assert torch.allclose(values, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_quality_is_the_geometric_mean_and_zero_when_either_part_is(clip, realism):
    images = torch.rand(3, 3, 64, 64)
    batch = QualityModel(clip, realism, Reference((-1.0, 1.0), (-1.0, 1.0), "none", 1)).quality(images, PROMPTS)
    assert torch.allclose(batch.q, (batch.n_alignment * batch.n_realism).sqrt())
    unreal = QualityModel(clip, realism, Reference((-1.0, 1.0), (1.5, 2.0), "none", 1)).quality(images, PROMPTS)
    assert (unreal.q == 0).all() and (unreal.n_alignment > 0).all()


def test_a_harmful_prompt_is_judged_by_the_best_of_its_safe_completions(model):
    image = torch.rand(1, 3, 64, 64)
    each = [model.quality(image, [p]).alignment.item() for p in PROMPTS]
    best = model.quality(image, ["never asked"], [PROMPTS]).alignment.item()
    assert best == pytest.approx(max(each), abs=1e-5)


def test_quality_depends_neither_on_order_nor_on_the_batch(model):
    images = torch.rand(3, 3, 64, 64)
    together = model.quality(images, PROMPTS).q
    alone = torch.cat([model.quality(images[i : i + 1], [PROMPTS[i]]).q for i in (2, 0, 1)])[[1, 2, 0]]
    assert torch.allclose(together, alone, atol=1e-5)


def test_quality_refuses_counts_that_differ(model):
    with pytest.raises(SPOError, match="3 images, 2 prompts"):
        model.quality(torch.rand(3, 3, 64, 64), PROMPTS[:2])


def test_a_reference_keeps_its_hash_and_an_edited_one_is_refused(tmp_path):
    reference = Reference((0.1, 0.7), (0.2, 0.9), "a model", 12)
    reference.save(tmp_path / "reference.json")
    assert Reference.load(tmp_path / "reference.json") == reference
    text = (tmp_path / "reference.json").read_text()
    (tmp_path / "reference.json").write_text(text.replace("0.7", "0.5"))
    with pytest.raises(SPOError, match="hash does not fit"):
        Reference.load(tmp_path / "reference.json")
    for content, message in (
        ("{", "is not JSON"),
        ('{"alignment": [0, 1]}', "does not say realism, base_model, prompts, hash"),
    ):
        (tmp_path / "reference.json").write_text(content)
        with pytest.raises(SPOError, match=message):
            Reference.load(tmp_path / "reference.json")
    assert dataclasses.replace(reference, prompts=13).hash != reference.hash
    with pytest.raises(SPOError, match="must lie below"):
        Reference((0.7, 0.1), (0.2, 0.9), "a model", 12)


def test_the_reference_is_measured_on_shuffled_prompts_and_spoilt_images(clip):
    class Sharpness:
        def __call__(self, images, prompts):
            return (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3)) * -1

    flat = torch.full((4, 3, 64, 64), 0.5)
    prompts = [*PROMPTS, "a car"]
    with pytest.raises(SPOError):  # flat images agree with every prompt alike
        make_reference(clip, Sharpness(), flat, ["a car"] * 4, "flat")
    assert (spoil(flat)[1] != flat[1]).any() and torch.allclose(spoil(flat)[0], flat[0])
    assert len({tuple(p) for p in clip.embed_prompts(prompts).tolist()}) == 4


def test_alignment_is_the_probability_of_scaled_cosine_and_bias(clip):
    images = torch.rand(3, 3, 64, 64)
    cosine = (clip.embed_images(images) * clip.embed_prompts(PROMPTS)).sum(-1)
    expected = torch.sigmoid(cosine * clip.logit_scale.exp() + clip.logit_bias)
    assert torch.allclose(clip(images, PROMPTS), expected, atol=1e-6)
    assert len(set(expected.tolist())) == 3


def test_realism_is_the_mean_of_the_nearest():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest_similarity(torch.tensor([[2.0, 0.0]]), bank, 1).item() == pytest.approx(1.0)
    assert nearest_similarity(torch.tensor([[2.0, 0.0]]), bank, 2).item() == pytest.approx(0.5)


def test_alignment_and_realism_are_the_same_after_saving(clip, realism, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    realism.save_pretrained(tmp_path / "realism", ("a", "b"))
    images = torch.rand(3, 3, 64, 64)
    assert torch.allclose(load_small_clip(tmp_path / "clip")(images, PROMPTS), clip(images, PROMPTS), atol=2e-2)
    assert torch.allclose(RealismModel.from_pretrained(tmp_path / "realism")(images), realism(images), atol=2e-2)

"""ShieldGemma 2: a tiny random network of the real class, called through its own processor beside."""

import json

import pytest
import torch
from support.photographs import HARMLESS
from support.vlm import word_tokenizer

from t2i_spo_plugin import CostModel, load_cost_model, load_policy
from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.registry import load_guard


transformers = pytest.importorskip("transformers.models.shieldgemma2", reason="this transformers has no ShieldGemma 2")
images = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3", reason="needs torchvision here")
IMAGES = list(HARMLESS.values())
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def shield(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shield")
    special = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = word_tokenizer(extra_special_tokens=special)
    image, boi, eoi, yes, no = tokenizer.convert_tokens_to_ids(["<image>", "<boi>", "<eoi>", "Yes", "No"])
    config = transformers.ShieldGemma2Config(
        text_config={"vocab_size": len(tokenizer), "head_dim": 8, "num_key_value_heads": 1, **SMALL},
        vision_config={"image_size": 32, "patch_size": 8, **SMALL},
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
    )
    config.yes_token_index, config.no_token_index = yes, no
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.ShieldGemma2ForImageClassification(config).eval()
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    processor = transformers.ShieldGemma2Processor(
        images.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template="{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<boi> {% else %}Is it {{ part['text'] }} ? Answer {% endif %}"
        "{% endfor %}{% endfor %}",
        image_seq_length=4,
    )
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, network, processor


def by_hand(network, processor, policies):
    """P(yes) of every image and policy, in one padded batch as its documentation calls it."""
    inputs = processor(images=IMAGES, policies=list(policies), custom_policies=dict(policies), return_tensors="pt")
    with torch.no_grad():
        return network(**inputs).probabilities[:, 0].view(len(IMAGES), len(policies))


def test_the_probability_is_that_of_its_own_processor_for_its_own_policies(shield):
    folder, network, processor = shield
    model = load_cost_model(f"shieldgemma2:{folder}")
    policy = load_policy("photo-shieldgemma2")
    assert isinstance(model, CostModel)
    assert set(model.categories) == {category.name for category in policy.categories}
    # The words of the bundled policy are those that the processor carries.
    assert model.policies == dict(processor.policy_definitions)
    batch = model(IMAGES)
    assert batch.logit_map is None
    assert torch.allclose(batch.logits.sigmoid(), by_hand(network, processor, model.policies), atol=1e-3)
    assert batch.logits.std(0).min() > 1e-3 and batch.logits.std(1).min() > 1e-3


def test_policies_are_the_guards_own_words(shield, tmp_path):
    folder, network, processor = shield
    text = "name: mine\ndomain: photo\ncategories:\n"
    text += "- {name: red, description: Mostly hate.}\n- {name: b, description: A weapon.}\n"
    (tmp_path / "mine.yaml").write_text(text)
    report = load_guard(f"shieldgemma2:{folder}", tmp_path / "mine.yaml")(IMAGES, "photo")
    expected = by_hand(network, processor, {"red": "Mostly hate.", "b": "A weapon."})
    found = torch.tensor([[costs["red"], costs["b"]] for costs in report.category_costs])
    assert torch.allclose(found, expected, atol=1e-3)


def test_the_answer_depends_neither_on_the_batch_nor_on_the_order(shield, tmp_path):
    folder = shield[0]
    model = load_cost_model(f"shieldgemma2:{folder}")
    (tmp_path / "one.yaml").write_text(json.dumps({"kind": "shieldgemma2", "source": str(folder), "batch_size": 1}))
    alone = load_cost_model(tmp_path / "one.yaml")
    together = model(IMAGES).logits
    assert torch.allclose(alone(IMAGES).logits, together, atol=1e-4)
    assert torch.allclose(model(IMAGES[::-1]).logits.flip(0), together, atol=1e-4)
    assert alone.identity != load_cost_model(f"shieldgemma2:{folder}", policy=load_policy("photo-harms")).identity


def test_what_is_no_shieldgemma_is_named(tmp_path):
    with pytest.raises(SPOError, match="cannot load ShieldGemma 2"):
        load_cost_model(f"shieldgemma2:{tmp_path}")

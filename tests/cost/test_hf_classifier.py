"""Classifiers of transformers as cost models: tiny random networks of the real classes, called by hand beside."""

import json

import pytest
import torch
from support.photographs import HARMLESS
from transformers import (
    AutoImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from t2i_spo_plugin import CostModel, cli, load_cost_model
from t2i_spo_plugin.errors import ConfigError, MissingExtraError, SPOError
from t2i_spo_plugin.images import to_tensor


IMAGES = list(HARMLESS.values())
LABELS = {0: "normal", 1: "nsfw", 2: "gore"}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {**SMALL, "image_size": 32, "patch_size": 8}
NETWORKS = {
    "vit": (ViTForImageClassification, lambda: ViTConfig(**TOKENS)),
    "beit": (BeitForImageClassification, lambda: BeitConfig(**TOKENS)),
    "siglip": (SiglipForImageClassification, lambda: SiglipConfig(vision_config=TOKENS)),
    "swin": (
        SwinForImageClassification,
        lambda: SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    ),
    "convnext": (
        ConvNextForImageClassification,
        lambda: ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]),
    ),
    "resnet": (
        ResNetForImageClassification,
        lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 2,
    "size": {"height": 32, "width": 32},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


def saved(kind, folder):
    cls, config = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cls._from_config(config())
        network.config.id2label, network.config.label2id = LABELS, {name: n for n, name in LABELS.items()}
        network = cls(network.config)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    network.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return network


def described(folder, **options):
    lines = {"kind": "hf-classifier", "source": str(folder), "categories": {"sexual": ["nsfw"]}} | options
    (folder.parent / f"{folder.name}.yaml").write_text(json.dumps(lines))
    return folder.parent / f"{folder.name}.yaml"


def by_hand(network, folder):
    """Logits of the labels, as transformers' own processor and network give them."""
    inputs = AutoImageProcessor.from_pretrained(folder, use_fast=False)(images=IMAGES, return_tensors="pt")
    with torch.no_grad():
        return network(**inputs).logits


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    network = saved(request.param, folder)
    model = load_cost_model(described(folder, categories={"sexual": ["NSFW"], "any": ["nsfw", "gore"]}))
    return request.param, network, folder, model


def test_the_logit_is_that_of_the_categorys_probability(case):
    _, network, folder, model = case
    probability = by_hand(network, folder).softmax(1)
    assert isinstance(model, CostModel) and model.categories == ("sexual", "any") and model.domain == "photo"
    found = model(IMAGES).logits.sigmoid()
    # Pillow rounds to whole levels between resampling and network, this package does not.
    assert torch.allclose(found[:, 0], probability[:, 1], atol=0.02)
    assert torch.allclose(found[:, 1], probability[:, 1] + probability[:, 2], atol=0.02)
    assert found.std(0).min() > 1e-4


def test_the_map_is_where_the_logit_comes_from_and_has_it_as_its_mean(case):
    kind, network, folder, model = case
    batch = model(IMAGES)
    assert batch.logit_map is not None and batch.logit_map.shape[:2] == (len(IMAGES), 2)
    assert torch.allclose(batch.logit_map.mean((2, 3)), batch.logits, atol=1e-4)
    assert batch.logit_map.flatten(2).std(2).min() > 1e-6
    if kind == "resnet":  # a linear layer on the mean over places: what each place adds, exactly, under sigmoid
        exact = load_cost_model(described(folder, activation="sigmoid"))
        pixels = exact.preprocessing.normalised(exact.preprocessing.whole(IMAGES))
        with torch.no_grad():
            places = network.resnet(pixels).last_hidden_state
            head = network.classifier[-1]
            expected = torch.einsum("c,bchw->bhw", head.weight[1], places) + head.bias[1]
        assert torch.allclose(exact(IMAGES).logit_map[:, 0], expected, atol=1e-4)


def test_the_answer_depends_neither_on_the_batch_nor_on_the_order(case):
    model = case[3]
    together = model(IMAGES)
    alone = [model(image) for image in IMAGES]
    assert torch.allclose(torch.cat([one.logits for one in alone]), together.logits, atol=1e-5)
    assert torch.allclose(torch.cat([one.logit_map for one in alone]), together.logit_map, atol=1e-4)
    assert torch.allclose(model(IMAGES[::-1]).logits.flip(0), together.logits, atol=1e-5)
    quick = load_cost_model(described(case[2], categories={"sexual": ["NSFW"], "any": ["nsfw", "gore"]}, maps=False))
    assert quick(IMAGES).logit_map is None and torch.allclose(quick(IMAGES).logits, together.logits, atol=1e-5)


def test_sigmoid_boundary_and_gradients(case):
    _, network, folder, _ = case
    model = load_cost_model(
        described(folder, activation="sigmoid", categories={"any": ["nsfw", "gore"]}, boundary=0.8)
    )
    expected = by_hand(network, folder)[:, 1:].amax(1) - torch.tensor(0.8).logit()
    assert torch.allclose(model(IMAGES).logits[:, 0], expected, atol=0.1)
    pixels = to_tensor(IMAGES[0], 32).requires_grad_()
    model.score_tensor(pixels).logits.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_labels_are_asked_for_and_wrong_ones_refused(tmp_path, capsys):
    folder = tmp_path / "vit"
    saved("vit", folder)
    IMAGES[0].save(tmp_path / "a.png")
    words = ["score", str(tmp_path / "a.png"), "--domain", "photo", "--cost-model"]
    assert cli.main([*words, f"hf-classifier:{folder}"]) == 2
    assert "labels normal, nsfw, gore; say in a YAML file" in capsys.readouterr().err
    assert cli.main([*words, str(described(folder))]) == 0
    assert "cost 0." in capsys.readouterr().out
    for options, message in (
        ({"categories": {"sexual": ["nude"]}}, "nude is none of them"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"categories": {"sexual": []}}, "a list of labels"),
        ({"threshold": 0.3}, "unknown threshold"),
        ({"kind": "classifier"}, "kind must be one of hf-classifier"),
        ({"source": ""}, "source must say where"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_cost_model(described(folder, **options))


def test_a_shipped_row_names_the_labels_and_pickles_stay_closed(tmp_path, monkeypatch):
    """A folder in the place of the Hub id, as it lies in a working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Falconsai" / "nsfw_image_detection"
    network = saved("vit", folder)
    assert load_cost_model("hf-classifier:Falconsai/nsfw_image_detection").categories == ("sexual",)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SPOError, match="cannot load the classifier"):
        load_cost_model("hf-classifier:Falconsai/nsfw_image_detection")


def test_a_timm_network_names_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18"}))
    with pytest.raises((MissingExtraError, SPOError, ImportError), match="timm"):
        load_cost_model(described(tmp_path))


def test_the_published_crop_is_that_of_transformers():
    from transformers import CLIPImageProcessor

    from t2i_spo_plugin.networks.preprocessing import Preprocessing

    own = Preprocessing((24, 24), (0.5,) * 3, (0.5,) * 3, "bicubic", 28)
    options = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}
    processor = CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, **options)
    for image in IMAGES:
        expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"])
        assert torch.allclose(own.normalised(own.cropped(image)), expected, atol=0.03)

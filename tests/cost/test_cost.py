"""The cost model: an exact map, answers that do not depend on the batch, losses with the right signs."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save
from transformers import ResNetConfig

from t2i_spo_plugin.cost import losses
from t2i_spo_plugin.cost.base import CostModel
from t2i_spo_plugin.cost.vision import VisionCostModel, load_cost_model
from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.networks.backbone import MapClassifier


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    network = MapClassifier(config, 3)
    network(torch.rand(8, 3, 64, 64))  # moves the batch norms off their start
    network.eval()
    return VisionCostModel(network, ("a", "b", "c"), "sticker", 64, torch.tensor([1.0, 2.0, 0.5]))


def test_a_vision_cost_model_follows_the_protocol_and_the_mean_of_its_map_is_the_logit(model):
    assert isinstance(model, CostModel)
    batch = model(np.random.default_rng(0).integers(0, 255, (4, 80, 80, 3), dtype=np.uint8))
    assert batch.logits.shape == (4, 3)
    assert torch.equal(batch.logit_map.mean((2, 3)), batch.logits)


def test_peak_pooling_names_a_small_object_whatever_lies_beside_it(model):
    network = MapClassifier(model.network.backbone.config, 3, "peak").eval()
    network.load_state_dict(model.network.state_dict())
    logits, logit_map = network(torch.rand(2, 3, 64, 64))
    cells = logit_map[0, 0].numel()
    assert torch.allclose(logits.exp() * cells, logit_map.exp().sum((2, 3)), rtol=1e-4)
    assert (logits >= logit_map.mean((2, 3)) - 1e-5).all()


def test_the_answer_for_an_image_does_not_depend_on_its_neighbours(model):
    images = torch.rand(6, 3, 64, 64)
    together = model(images).logits
    alone = torch.cat([model(p).logits for p in images.flip(0)]).flip(0)
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_vision_cost_model_scores_the_same_after_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load_cost_model(tmp_path)
    images = torch.rand(3, 3, 64, 64)
    assert again.categories == model.categories and torch.equal(again.temperature, model.temperature)
    assert torch.allclose(again(images).logits, model(images).logits, atol=2e-2)
    with pytest.raises(SPOError, match="no model folder"):
        load_cost_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.json", b"{", "metadata.json is not JSON"),
        ("metadata.json", b"[1]", "metadata.json is not a mapping"),
        (
            "metadata.json",
            b'{"kind": "cost_model", "outputs": ["a", "b", "c"]}',
            "does not say domain, size, temperature",
        ),
        ("config.json", None, "cannot read the configuration"),
        ("config.json", b"{", "cannot read the configuration"),
        ("model.safetensors", None, "cannot read the weights .*model.safetensors"),
        ("model.safetensors", b"", "cannot read the weights .*model.safetensors"),
        ("model.safetensors", save({"x": torch.zeros(1)}), "are not those of the model it describes"),
    ],
)
def test_a_broken_folder_is_refused_in_a_sentence(model, tmp_path, file, content, message):
    model.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(SPOError, match=message):
        load_cost_model(tmp_path)


def test_the_rank_loss_wants_the_unsafe_image_higher():
    assert losses.rank_loss(torch.tensor([2.0]), torch.tensor([0.0])) < losses.rank_loss(
        torch.tensor([0.0]), torch.tensor([2.0])
    )
    assert losses.rank_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_the_anchor_loss_puts_the_boundary_at_zero():
    logits = torch.zeros(1, 2, requires_grad=True)
    losses.anchor_loss(logits, torch.tensor([[1.0, 0.0]])).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_the_contrastive_loss_is_lower_when_groups_lie_together():
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert losses.supervised_contrastive_loss(apart, torch.tensor([0, 1, 0, 1])) < losses.supervised_contrastive_loss(
        apart, torch.tensor([0, 0, 1, 1])
    )
    assert losses.supervised_contrastive_loss(apart, torch.arange(4)).item() == 0


def test_the_fitted_temperature_undoes_a_known_one():
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, generator=rng) * 2
    labels = (torch.rand(20_000, generator=rng) < true.sigmoid()).float()
    assert losses.fit_temperature(true * 3, labels).item() == pytest.approx(3.0, rel=0.1)
    calibrated = losses.expected_calibration_error(true.sigmoid(), labels)
    assert calibrated < 0.02 < losses.expected_calibration_error((true * 3).sigmoid(), labels)

"""Training an adapter gate: the network learns, the threshold is as asked, the pipeline is as before."""

import hashlib

import pytest
import torch
from support.pipelines import base_image, images, random_adapter

from t2i_spo_plugin import write_adapter
from t2i_spo_plugin.data import PromptRow
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.gating import change_features, gate_metadata, load_adapter_gate
from t2i_spo_plugin.training.gate import GateConfig, train_gate, train_gate_network


def test_a_gate_network_learns_where_the_norm_says_nothing():
    torch.manual_seed(0)
    unsafe = torch.arange(200) % 2 == 0
    without = torch.randn(200, 4, 8, 8)
    change = 0.1 * torch.randn(200, 4, 8, 8)
    # A change of the same norm, into another channel.
    change[:, 0] += torch.where(unsafe, 1.0, 0.0).view(-1, 1, 1)
    change[:, 1] += torch.where(unsafe, 0.0, 1.0).view(-1, 1, 1)
    features = change_features(without, without + change)[:, None]
    network = train_gate_network(features[:150], unsafe[:150], steps=60)
    is_on = network.score(without[150:], (without + change)[150:]) > 0
    assert (is_on == unsafe[150:]).float().mean() > 0.95


@pytest.mark.parametrize("score", ["network", "norm"])
def test_a_gate_is_trained_from_prompts(score, sd1, tmp_path):
    adapter = write_adapter(random_adapter(sd1), tmp_path / "a.safetensors")
    kinds = ("harmful", "benign")
    rows = [PromptRow(f"{n}", f"prompt {n}", kinds[n % 2], seed=n) for n in range(40)]
    config = GateConfig(
        adapter=str(adapter), out=tmp_path / "gate.safetensors", score=score, denoising_steps=4, train_steps=5,
        until=0.3, held_out=1.0, progress=False,
    )  # fmt: skip
    report = train_gate(config, sd1, rows)
    assert sum(report.counts) == 20 and report.benign[0] <= 0.2
    assert load_adapter_gate(report.path).threshold == report.gate.threshold
    sha256 = hashlib.sha256(b".\0" + adapter.read_bytes()).hexdigest()
    assert gate_metadata(report.path) == {
        "adapter": "a.safetensors",
        "adapter_hash": sha256[:16],
        "score": score,
        "strength": "1",
    }
    assert "held-out prompts" in str(report)
    assert torch.equal(images(sd1), base_image("sd1"))
    with pytest.raises(ConfigError, match="all of one kind"):
        train_gate(config, sd1, [row for row in rows if row.kind == "benign"])

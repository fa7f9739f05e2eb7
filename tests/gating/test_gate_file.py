"""Adapter gates as files: read back as written, and what is none is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pipelines import random_adapter

from t2i_spo_plugin import write_adapter
from t2i_spo_plugin.adapters.safetensors_file import read_header, write_tensors
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork, gate_metadata, load_adapter_gate, save_adapter_gate


def test_a_gate_by_norm_is_read_back(tmp_path):
    gate = load_adapter_gate(save_adapter_gate(AdapterGate(0.3), tmp_path / "gate.safetensors"))
    assert gate == AdapterGate(0.3)


def test_a_gate_network_is_read_back_in_half_precision_and_written_with_equal_bytes(tmp_path):
    torch.manual_seed(0)
    network, without = GateNetwork(4), torch.randn(8, 4, 8, 8)
    path = save_adapter_gate(AdapterGate(0.3, 0.04, network), tmp_path / "gate.safetensors", {"adapter": "mine"})
    again = load_adapter_gate(path)
    assert (again.threshold, again.until) == (0.3, 0.04)
    assert (again.network.score(without, without + 1) - network.score(without, without + 1)).abs().max() < 0.05
    assert path.read_bytes() == save_adapter_gate(again, tmp_path / "b.safetensors", {"adapter": "mine"}).read_bytes()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"<html>", b"\x08" + b"\0" * 7 + b'{"a":{}}'])
def test_a_file_that_is_no_adapter_gate_is_refused(content, tmp_path):
    path = tmp_path / "gate.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError):
        load_adapter_gate(path)
    with pytest.raises(AdapterError):
        load_adapter_gate(tmp_path / "missing.safetensors")


def test_a_file_of_another_format_is_refused_with_its_name(tmp_path):
    path = tmp_path / "gate.safetensors"
    write_tensors(path, {}, {"spo": json.dumps({"format": "spo-adapter-gate/9"})})
    with pytest.raises(AdapterError, match=r"^gate.safetensors is no .* that this version reads: .*adapter-gate/9'$"):
        load_adapter_gate(path)


def test_a_network_of_a_size_that_its_weights_do_not_have_is_refused_without_allocating_it(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3, 0.08, GateNetwork(3)), tmp_path / "gate.safetensors")
    header = json.loads(read_header(path).metadata["spo"])
    header["adapter_gate"] = json.dumps(json.loads(header["adapter_gate"]) | {"channels": 10**9})
    save_file(load_file(path), path, {"spo": json.dumps(header)})
    before = torch.get_rng_state()
    with pytest.raises(AdapterError, match="is no file of an adapter gate: RuntimeError"):
        load_adapter_gate(path)
    assert torch.equal(before, torch.get_rng_state())


def test_gate_metadata_says_what_the_gate_was_trained_for(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3), tmp_path / "gate.safetensors", {"strength": "2", "adapter": "mine"})
    assert gate_metadata(path) == {"adapter": "mine", "strength": "2"}


def test_an_adapter_is_no_adapter_gate(sd1, tmp_path):
    with pytest.raises(AdapterError, match="is no file of an adapter gate"):
        load_adapter_gate(write_adapter(random_adapter(sd1), tmp_path / "a.safetensors"))


def test_a_network_that_was_read_is_not_trained_on(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3, network=GateNetwork(3)), tmp_path / "gate.safetensors")
    network = load_adapter_gate(path).network
    assert not network.training and not any(value.requires_grad for value in network.parameters())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_metadata_in_another_order_gives_equal_bytes(tmp_path):
    texts = {"strength": "2", "adapter": "mine", "base": "b"}
    one = save_adapter_gate(AdapterGate(0.3), tmp_path / "a.safetensors", texts)
    two = save_adapter_gate(AdapterGate(0.3), tmp_path / "b.safetensors", dict(reversed(texts.items())))
    assert one.read_bytes() == two.read_bytes()
    assert list(gate_metadata(two)) == ["adapter", "base", "strength"]


def test_a_file_with_a_name_of_a_pickle_is_not_opened(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3), tmp_path / "gate.safetensors").rename(tmp_path / "gate.pt")
    for read in (load_adapter_gate, gate_metadata):
        with pytest.raises(AdapterError, match="pickle"):
            read(path)

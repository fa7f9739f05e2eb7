"""What a result depends on is known by content: neither by where it lies nor by what it is called."""

import copy

import pytest
import torch
from support.cost_models import ColourCost
from support.pipelines import fresh, random_adapter, tiny_pipeline

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork, Schedule
from t2i_spo_plugin.identity import changes, claim, content_hash, model_identity, pipeline_identity
from t2i_spo_plugin.pipelines import enable_spo, load_spo_lora
from t2i_spo_plugin.registry import load_cost_model, load_quality_model


def test_the_hash_follows_weights_dtype_and_settings():
    first, same, other = (tiny_pipeline("sd1", seed=seed).vae for seed in (0, 0, 1))
    assert content_hash(first) == content_hash(same) != content_hash(other)
    changed = copy.deepcopy(first)
    next(changed.parameters()).data.view(-1)[0] += 1e-3
    assert content_hash(changed) != content_hash(first)
    assert content_hash(copy.deepcopy(first).to(torch.bfloat16)) != content_hash(first)
    changed = copy.deepcopy(first)
    changed.register_to_config(scaling_factor=0.5)
    assert content_hash(changed) != content_hash(first)


def test_a_pipeline_is_known_by_every_model_and_tokenizer():
    before = pipeline_identity(fresh("sd1"))
    assert {"unet", "vae", "text_encoder", "tokenizer"} <= before.keys() and "scheduler" not in before
    pipe = fresh("sd1")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    next(pipe.text_encoder.parameters()).data.view(-1)[0] += 1.0
    after = pipeline_identity(pipe)
    assert {name for name in before if before[name] != after[name]} == {"text_encoder"}
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens(["newword"])
    assert pipeline_identity(pipe)["tokenizer"] != before["tokenizer"]
    assert pipeline_identity(pipe, ("vae",)) == {"vae": before["vae"]}
    assert pipeline_identity(object()) == {}


def adapted(name="spo", seed=0, strength=1.0, enabled=False, **options):
    pipe = enable_spo(fresh("sd1")) if enabled else fresh("sd1")
    load_spo_lora(pipe, random_adapter(pipe, seed=seed), strength, adapter_name=name, **options)
    return pipeline_identity(pipe)


def test_an_adapter_is_known_by_weights_and_strength_and_leaves_the_base_what_it_was():
    base, one = pipeline_identity(fresh("sd1")), adapted()
    assert {name: value for name, value in one.items() if name != "adapters"} == base
    assert adapted("renamed") == one
    assert len({adapted(seed=1)["adapters"], adapted(strength=0.5)["adapters"], one["adapters"]}) == 3


def test_windows_schedules_and_gates_tell_adapters_apart():
    gate = AdapterGate(0.5, 0.1, GateNetwork(4))
    other = AdapterGate(0.5, 0.1, copy.deepcopy(gate.network))
    uses = [{}, {"window": (0.0, 0.5)}, {"steering": Schedule(((0.0, 1.0), (1.0, 0.0)))}, {"steering": gate}]
    identities = [adapted(enabled=True, **use)["adapters"] for use in uses]
    assert len(set(identities)) == 4
    assert adapted(enabled=True, steering=other)["adapters"] == identities[3]
    next(other.network.parameters()).data.view(-1)[0] += 1.0
    assert adapted(enabled=True, steering=other)["adapters"] != identities[3]


def test_weights_that_accelerate_offloaded_have_the_identity_that_they_had():
    from accelerate import cpu_offload

    pipe = copy.deepcopy(fresh("sd1"))
    before = pipeline_identity(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    assert pipeline_identity(pipe) == before


def test_cost_and_quality_models_are_known_by_content(tmp_path):
    cost = load_cost_model("sticker")
    cost.save_pretrained(tmp_path / "moved")
    assert model_identity(load_cost_model(tmp_path / "moved")) == model_identity(cost)
    cost.temperature[0] *= 2
    assert model_identity(load_cost_model(tmp_path / "moved")) != model_identity(cost)
    quality = load_quality_model("sticker")
    before = model_identity(quality)
    assert before == model_identity(load_quality_model("sticker"))
    quality.realism.bank[0] += 1.0
    assert model_identity(quality) != before
    assert model_identity(ColourCost()) == "support.cost_models.ColourCost"


def test_a_folder_is_claimed_once_and_says_what_changed(tmp_path):
    settings = {"steps": 2, "pipeline": {"unet": "ab", "vae": "cd"}}
    claim(tmp_path / "out", settings, "images")
    claim(tmp_path / "out", settings, "images")
    before = (tmp_path / "out/settings.json").read_bytes()
    said = "holds images of other settings .pipeline.unet: ab there, 12 now; steps: 2 there, none now."
    with pytest.raises(ConfigError, match=said):
        claim(tmp_path / "out", {"pipeline": {"unet": "12", "vae": "cd"}}, "images")
    assert (tmp_path / "out/settings.json").read_bytes() == before


def test_changes_are_named_in_full():
    assert changes({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 there, none now"]
    assert changes({"a": [1]}, {"a": [1]}) == []

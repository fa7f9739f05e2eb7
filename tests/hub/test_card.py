"""The model card: what it says, that the client reads it back, and that no text in it acts as markup."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors import safe_open
from support.pipelines import fresh, random_adapter
from support.publishing import BASE, DATASET, dry_run

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, read_adapter, write_adapter
from t2i_spo_plugin.hub.privacy import plain


HOSTILE = "Safe\n---\nlicense: mit\n---\n# <script>alert(1)</script> | [x](javascript:y) `code` **b** _i_ {{ a }}"


def test_the_card_states_the_results_and_is_read_back_by_the_client(file, summary, image, tmp_path):
    out = tmp_path / "out"
    dry_run(file, out, results=summary, dataset=DATASET, images=[("a street", image)], license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == (BASE, "adapter", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.datasets is None, "the field names what a model was trained on"
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion", "safety"} <= set(data.tags)
    assert len(data.tags) == len(set(data.tags))
    assert data.widget == [{"text": "a street", "output": {"url": "images/0.jpg"}}]
    measured = json.loads(summary.read_text(encoding="utf-8"))["systems"]["spo"]
    listed = {result.metric_type: result for result in data.eval_results}
    assert listed["uascore-referee"].metric_value == pytest.approx(measured["referee_score"]["uascore"])
    assert listed["ip-cost-model"].metric_value == pytest.approx(measured["ip"]["value"])
    low, high = measured["referee_score"]["interval"]
    for part in (f"{low:.1f} to {high:.1f}", "500 harmful and 500 benign", "referee", "t2i_spo_plugin 0.1.0"):
        assert part in listed["uascore-referee"].metric_name
        assert part in card.text
    text = (out / ".eval_results" / "t2i_spo_plugin.yaml").read_text(encoding="utf-8")
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(text))}
    assert entries.keys() == listed.keys() and {entry.dataset_id for entry in entries.values()} == {DATASET}
    assert entries["uascore-referee"].value == listed["uascore-referee"].metric_value
    assert "95 % interval" in entries["uascore-referee"].notes
    for sent in (card.content, text):
        assert "/srv" not in sent and "/home" not in sent and "costs 0123456789abcdef" in sent


def test_the_card_names_the_wording_classes_and_what_is_counted_beside_ip(file, summary, tmp_path):
    content = json.loads(summary.read_text(encoding="utf-8"))
    share = {"k": 1, "n": 4, "value": 0.25, "interval": [0.05, 0.7]}
    for one in content["systems"].values():
        one |= {"referee_unsafe_prompts": share, "unsafe_prompts": share, "unreadable": None}
        one |= {"referee_unreadable": share, "safe_scene_complete": share}
        one["by_wording"] = {"new words": {"ip": share, "n_harmful": 40}}
        for part in (one["score"], one["referee_score"]):
            part["version"] = "uascore/2"
            part["metadata"]["wordings"] = ["grammar", "new words"]
            part["harmful"]["n_unreadable"] = 1
    summary.write_text(json.dumps(content), encoding="utf-8")
    dry_run(file, tmp_path / "out", results=summary, dataset=DATASET, license="apache-2.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    listed = {result.metric_type: result for result in card.data.eval_results}
    for key in ("unsafe-prompts-referee", "unreadable-referee", "safe-scene-complete-referee", "ip-new-words"):
        assert listed[key].metric_value == 0.25, key
    assert "unreadable-cost-model" not in listed and "safe-scene-complete-cost-model" not in listed
    assert "harmful prompts (grammar, new words)" in listed["ip-referee"].metric_name
    assert "wording: new words" in card.text and "UAScore (uascore/2)" in card.text
    assert "was not asked" not in card.text
    for one in content["systems"].values():
        one["referee_score"]["harmful"]["n_unreadable"] = None
    summary.write_text(json.dumps(content), encoding="utf-8")
    dry_run(file, tmp_path / "again", results=summary, dataset=DATASET, license="apache-2.0")
    assert "was not asked" in ModelCard.load(tmp_path / "again" / "README.md").text


def test_the_card_without_results_states_so_and_a_licence_of_ones_own_is_sent(file, tmp_path):
    licence = tmp_path / "terms.txt"
    licence.write_text("Be kind.", encoding="utf-8")
    own = {"license": "other", "license_name": "kind-1.0", "license_file": licence}
    card = ModelCard(dry_run(file, tmp_path / "out", **own).card)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "kind-1.0", "LICENSE")
    assert card.data.eval_results is None and "No results were published" in card.text
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "Be kind."
    with safe_open(tmp_path / "out" / "safe-sd1.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.license"] == "kind-1.0"


def test_the_licence_of_the_header_holds_where_none_is_given(tmp_path):
    adapter = random_adapter(fresh("sd1"), **{"modelspec.license": "openrail++"})
    assert ModelCard(dry_run(adapter, tmp_path / "stated", license="").card).data.license == "openrail++"
    assert ModelCard(dry_run(adapter, tmp_path / "given", license="mit").card).data.license == "mit"


def test_hostile_texts_neither_break_the_metadata_nor_add_markup(file, image, tmp_path):
    adapter = read_adapter(file)
    hostile = Adapter(
        adapter.modules, AdapterMetadata("stable-diffusion-v1", "epsilon", HOSTILE, {"objective": HOSTILE})
    )
    path = write_adapter(hostile, tmp_path / "hostile.safetensors")
    prompts = [(HOSTILE + "\u202e\x00", image)]
    card = ModelCard(dry_run(path, tmp_path / "out", summary=HOSTILE + "\ud800", images=prompts).card)
    dry_run(path, tmp_path / "out", title="half a pair: \ud800", images=prompts)
    assert read_adapter(tmp_path / "out" / "safe-sd1.safetensors").metadata.title == "half a pair: ?"
    assert card.data.license == "mit" and card.data.widget[0]["text"].isprintable()
    for forbidden in ("<script", "[x](", "`code`", "**b**", "_i_", "{{"):
        assert forbidden not in card.text
    assert card.text.count("\n---\n") == 0
    rows = [line for line in card.text.splitlines() if line.startswith("| objective")]
    assert len(rows) == 1 and rows[0].count("|") == 3
    assert plain("stable-diffusion v_prediction, 1.0 (x)") == "stable-diffusion v_prediction, 1.0 (x)"


def test_the_card_names_a_family_that_comfyui_has_no_map_for(tmp_path):
    adapter = random_adapter(fresh("sd3"))
    other = Adapter(adapter.modules, AdapterMetadata("sana", "flow"))
    card = dry_run(other, tmp_path).card
    assert "no map for sana" in card and "models/loras" not in card

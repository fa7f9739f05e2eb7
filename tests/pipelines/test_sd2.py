"""Stable Diffusion 2, for epsilon and for v: architecture and prediction type decide, not the name of a checkpoint."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.extract import extract_adapter
from t2i_spo_plugin.adapters.layouts import LAYOUTS, encode
from t2i_spo_plugin.adapters.merging import merge_adapters
from t2i_spo_plugin.errors import AdapterError, IncompatibleAdapterError
from t2i_spo_plugin.pipelines.architecture import architecture_of
from t2i_spo_plugin.pipelines.loading import load_spo_lora


PREDICTIONS = ("epsilon", "v_prediction")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "q_proj", "out_proj", "fc1")


@pytest.fixture(params=PREDICTIONS)
def prediction(request):
    return request.param


@pytest.fixture
def sd2(prediction):
    return fresh("sd2", prediction_type=prediction)


def test_the_header_keeps_architecture_and_prediction_type(sd2, prediction, tmp_path):
    assert architecture_of(sd2) == "stable-diffusion-v2"
    adapter = random_adapter(sd2)
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header, keys = file.metadata(), list(file.keys())
    v = prediction == "v_prediction"
    assert header["modelspec.architecture"] == f"stable-diffusion-v2-{'768-v' if v else '512'}/lora"
    assert header["ss_base_model_version"] == ("sd_v2_v" if v else "sd_v2")
    assert all(key.startswith("lora_unet_") for key in keys)
    assert read_adapter(path).metadata == adapter.metadata
    ours = {"spo.base_architecture", "spo.prediction_type", "modelspec.prediction_type"}
    for left_out in (ours, ours | {"modelspec.architecture"} if v else ours):
        foreign = {key: value for key, value in header.items() if key not in left_out}
        save_file(encode(adapter.modules, "stable-diffusion-v2"), path, foreign)
        metadata = read_adapter(path).metadata
        assert (metadata.base_architecture, metadata.prediction_type) == ("stable-diffusion-v2", prediction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_deltas_and_metadata_of_stable_diffusion_2(sd2, layout, tmp_path):
    adapter = random_adapter(sd2, alpha=3.0, layers=LAYERS)
    path = tmp_path / ("folder" if layout == "peft" else "a.safetensors")
    back = read_adapter(convert_adapter(adapter, path, layout))
    assert back.metadata == adapter.metadata and back.modules.keys() == adapter.modules.keys()
    for name, pair in adapter.modules.items():
        assert torch.allclose(back.modules[name].delta(), pair.delta(), rtol=1e-6, atol=1e-6), name


def test_stable_diffusion_2_generates_the_same_loaded_merged_extracted_and_by_diffusers(sd2, prediction, tmp_path):
    adapter = random_adapter(sd2, alpha=3.0, layers=LAYERS, components=("unet", "text_encoder"))
    sd2.save_pretrained(tmp_path / "base")
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    without = images(sd2)
    load_spo_lora(sd2, path)
    expected = images(sd2)
    assert not torch.allclose(without, expected, atol=1e-2)
    theirs = fresh("sd2", prediction_type=prediction)
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    assert torch.allclose(images(theirs), expected, atol=1e-4)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    theirs.save_pretrained(tmp_path / "tuned")
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", rank=4).adapter
    assert (found.metadata.base_architecture, found.metadata.prediction_type) == ("stable-diffusion-v2", prediction)
    for name, pair in adapter.modules.items():
        assert torch.allclose(found.modules[name].delta(), pair.delta(), atol=1e-4), name
    twin = fresh("sd2", prediction_type=prediction)
    load_spo_lora(twin, merge_adapters([found, found], [0.5, 0.5], "svd").adapter)
    assert torch.allclose(images(twin), expected, atol=1e-3)


def test_an_adapter_of_another_prediction_type_or_architecture_is_refused(sd2, prediction):
    (other,) = set(PREDICTIONS) - {prediction}
    wrong = random_adapter(fresh("sd2", prediction_type=other))
    with pytest.raises(IncompatibleAdapterError, match=f"predicts {other}, this one predicts {prediction}"):
        load_spo_lora(sd2, wrong)
    with pytest.raises(IncompatibleAdapterError, match="made for stable-diffusion-v1, this pipeline is stable-diff"):
        load_spo_lora(sd2, random_adapter(fresh("sd1", prediction_type=prediction)))
    with pytest.raises(AdapterError, match="different prediction type"):
        merge_adapters([wrong, random_adapter(sd2)])


def test_an_adapter_of_another_checkpoint_is_noted(sd2):
    adapter = random_adapter(sd2, base_model="some-fine-tune")
    sd2.register_to_config(_name_or_path="stabilityai/stable-diffusion-2-1")
    assert any("trained on some-fine-tune" in note for note in load_spo_lora(sd2, adapter).notes)

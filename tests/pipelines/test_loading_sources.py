"""Where loaded adapters come from: the Hub's cache, folders, files."""

import pytest
import torch
from support.pipelines import base_image, images, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.pipelines.loading import (
    load_spo_lora,
    spo_adapters,
)


def hub_cache(root, name="a.safetensors", subfolder=""):
    """A Hub cache as a download leaves it."""
    commit = "0" * 40
    repo = root / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = repo / "snapshots" / commit / subfolder
    folder.mkdir(parents=True)
    return folder / name


@pytest.mark.parametrize("options", [{}, {"weight_name": "a.safetensors"}, {"local_files_only": True}])
def test_a_hub_id_is_loaded_from_the_cache_without_network(options, sd1, tmp_path):
    write_adapter(random_adapter(sd1), hub_cache(tmp_path))
    record = load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, **options)
    assert record.source == "someone/adapter"
    assert not torch.equal(images(sd1), base_image("sd1"))


def test_a_subfolder_of_a_hub_repository_is_loaded(sd1, tmp_path):
    write_adapter(random_adapter(sd1), hub_cache(tmp_path, subfolder="experts"))
    record = load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, subfolder="experts")
    assert record.source == "someone/adapter"
    assert not torch.equal(images(sd1), base_image("sd1"))


def test_a_hub_out_of_reach_ends_in_an_error_with_the_cure(sd1, tmp_path):
    for options in ({}, {"weight_name": "a.safetensors"}):
        with pytest.raises(AdapterError, match="not in the local cache and the Hub cannot be reached"):
            load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, **options)
    with pytest.raises(AdapterError, match="pickle"):
        load_spo_lora(sd1, "someone/adapter", cache_dir=tmp_path, weight_name="pytorch_lora_weights.bin")


def test_a_folder_is_loaded_by_the_file_in_it(sd1, tmp_path):
    write_adapter(random_adapter(sd1), tmp_path / "experts" / "a.safetensors")
    write_adapter(random_adapter(sd1), tmp_path / "experts" / "b.safetensors")
    load_spo_lora(sd1, str(tmp_path), subfolder="experts", weight_name="b.safetensors")
    assert spo_adapters(sd1)["spo"].source == "b.safetensors"
    with pytest.raises(AdapterError, match="2 safetensors files"):
        load_spo_lora(sd1, tmp_path / "experts", adapter_name="x")

"""Adapter files that are changed while they are in use, and what only looks like a file."""

import os
import struct

import pytest
import torch
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.adapters.inspection import inspect_adapter
from t2i_spo_plugin.errors import UnreadableAdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora


@pytest.fixture
def file(tmp_path, sd1):
    return write_adapter(random_adapter(sd1), tmp_path / "adapter.safetensors")


def test_overwriting_and_cutting_the_file_changes_nothing_that_was_read(file, sd1):
    adapter = read_adapter(file)
    before = {name: pair.delta() for name, pair in adapter.modules.items()}
    load_spo_lora(sd1, file)
    drawn = images(sd1)
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.seek(size // 2)
        stream.write(os.urandom(size - size // 2))
        stream.flush()
        assert all(torch.equal(pair.delta(), before[name]) for name, pair in adapter.modules.items())
        assert torch.equal(images(sd1), drawn)
        stream.truncate(16)
    assert all(torch.equal(pair.delta(), before[name]) for name, pair in adapter.modules.items())
    assert torch.equal(images(sd1), drawn)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(UnreadableAdapterError, match="no regular file"):
            read_adapter(path)
        with pytest.raises(UnreadableAdapterError, match="no regular file"):
            load_spo_lora(fresh("sd1"), path)


def lora_header(rows):
    """The start of a file with one LoRA pair of so many rows, and the size that it then has."""
    name, size, parts = "lora_unet_mid_block_attentions_0_proj_in", rows * 4 * 4, []
    for number, (part, shape) in enumerate((("lora_down", [4, rows]), ("lora_up", [rows, 4]))):
        offsets = [number * size, (number + 1) * size]
        parts.append(f'"{name}.{part}.weight":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}')
    text = ("{" + ",".join(parts) + "}").encode()
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + 2 * size


@pytest.mark.parametrize(("rows", "says"), [(3 * 10**9, "claims 96 GB of weights"), (4 * 10**6, "on the disk")])
def test_a_sparse_file_that_claims_to_be_large_is_refused_unread(rows, says, tmp_path):
    path = tmp_path / "a.safetensors"
    start, size = lora_header(rows)
    path.write_bytes(start)
    os.truncate(path, size)
    if says == "on the disk" and path.stat().st_blocks * 512 > size // 100:
        pytest.skip("the file system keeps no sparse files")
    for read in (read_adapter, inspect_adapter):
        with pytest.raises(UnreadableAdapterError, match=says):
            read(path)


def test_a_tilde_is_the_home_folder(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    adapter = read_adapter("~/adapter.safetensors")
    assert inspect_adapter("~/adapter.safetensors").modules == len(adapter.modules)
    assert write_adapter(adapter, "~/other.safetensors") == file.parent / "other.safetensors"
    with pytest.raises(UnreadableAdapterError, match="no path"):
        read_adapter("~no_such_user_at_all/adapter.safetensors")

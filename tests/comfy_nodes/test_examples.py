"""The example workflows as files: each is written down, lies on one screen, and says what one learns and changes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfy_nodes"
FILES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PACK.glob("example_workflows/*.json")}
_SPEC = importlib.util.spec_from_file_location("examples", ROOT / "tests" / "comfy" / "examples.py")
WRITTEN = sys.modules["examples"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(WRITTEN)
SCREEN, TITLE = (1840, 940), 30
"""What 1920 by 1080 pixels leave beside the bars of ComfyUI and of the browser; the height of a node's title."""


def files_asked_for(workflow):
    names = {name for _, name in WRITTEN.OWN_FILES.values()}
    values = [value for node in workflow["nodes"] for value in node.get("widgets_values") or []]
    return {value for value in values if isinstance(value, str) and value.endswith(".safetensors")}, names


def test_every_example_that_is_written_down_has_its_file_and_no_other_has():
    assert FILES.keys() == WRITTEN.EXAMPLES.keys()
    blueprints = {path.stem for path in PACK.glob("subgraphs/*.json")}
    assert blueprints == {one["name"] for one in WRITTEN.SUBGRAPHS.values()}


@pytest.mark.parametrize("name", FILES)
def test_an_example_fits_a_screen_and_its_text_is_read(name):
    nodes = FILES[name]["nodes"]
    right, bottom = (max(one["pos"][axis] + one["size"][axis] for one in nodes) for axis in (0, 1))
    assert min(SCREEN[0] / right, SCREEN[1] / (bottom + TITLE)) >= 0.6
    for one, other in itertools.combinations(nodes, 2):
        apart = (
            low["pos"][axis] + low["size"][axis] <= high["pos"][axis] - TITLE * axis
            for low, high in ((one, other), (other, one))
            for axis in (0, 1)
        )
        assert any(apart), f"{one['type']} and {other['type']} lie over each other"


@pytest.mark.parametrize("name", FILES)
def test_an_example_says_what_one_learns_and_what_to_change(name):
    example, workflow = WRITTEN.EXAMPLES[name], FILES[name]
    assert workflow["extra"]["info"] == {"name": example.title, "description": example.learns}
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert note["widgets_values"] == [example.note] and example.learns in example.note
    asked, known = files_asked_for(workflow)
    assert asked <= known and (not asked or "**Change**" in example.note)


def test_every_kind_of_checkpoint_has_an_example():
    loaders = [{node["type"] for node in workflow["nodes"]} for workflow in FILES.values()]
    asked = set.union(*(files_asked_for(workflow)[0] for workflow in FILES.values()))
    assert asked == {name for _, name in WRITTEN.OWN_FILES.values()}
    for kinds in ({"CheckpointLoaderSimple"}, {"UNETLoader", "DualCLIPLoader"}, {"UNETLoader", "CLIPLoader"}):
        assert any(kinds <= found for found in loaders)
    models = {
        tuple(node["widgets_values"][:1])
        for w in FILES.values()
        for node in w["nodes"]
        if node["type"] == "SPO_LoadCostModel"
    }
    assert models == {(WRITTEN.STICKER,), (WRITTEN.PHOTO,)}
    sides = {
        node["widgets_values"][0] for w in FILES.values() for node in w["nodes"] if node["type"] == "EmptyLatentImage"
    }
    assert {512, 1024} <= sides


@pytest.mark.parametrize("name", FILES)
def test_its_picture_can_be_read_and_is_small(name):
    path = PACK / "example_workflows" / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.size == (640, 400)
    assert path.stat().st_size < 60_000


def test_the_guide_lists_all_of_them():
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    for example in WRITTEN.EXAMPLES.values():
        assert f"| {example.title} | {example.learns} |" in page

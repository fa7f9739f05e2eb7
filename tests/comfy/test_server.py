"""What the browser gets from a server with the pack: nodes and their texts, progress, images, scripts, refusals."""

from __future__ import annotations

import io
import json
import re
import urllib.request

import pytest
from PIL import Image
from running import REPOSITORY, STICKER, GraphError, node, text_to_image

from t2i_spo_plugin.cli.comfyui import PACK


pytestmark = pytest.mark.comfy

SPO = "sticker demo: spo (bundled)"


@pytest.fixture(scope="module")
def own_nodes(server):
    """What /object_info says of the pack's nodes, by id."""
    known = server.get("/object_info")
    return {name: said for name, said in known.items() if said["python_module"] == f"custom_nodes.{PACK}"}


def safety(first, model=STICKER):
    """Safety Cost as node 21 on the output `first`, with its cost model as node 20."""
    return {
        "20": node("SPO_LoadCostModel", model=model, policy="as the model", override_domain=False),
        "21": node("SPO_SafetyCost", image=first, cost_model=["20", 0], threshold=0.5, category="the deciding one"),
    }


def everything():
    """A graph of all nodes of the pack: two images of the sticker world, steered by a merge, then judged."""
    slots = {f"adapter_{slot}": "none" for slot in range(1, 5)} | {f"strength_{slot}": 1.0 for slot in range(1, 5)}
    slots |= {"adapter_1": "sticker demo: dpo (bundled)", "strength_1": 0.25}
    judged = {"image": ["6", 0], "safety": ["21", 6], "threshold": 0.5}
    style = {"colour_map": "heat", "opacity": 0.6, "boxes": True, "labels": True}
    prompts = {"prompts": "a cup\na street", "safe_prompts": "a cup of tea\n", "reference": STICKER}
    merge = {"method": "svd", "rank": 8, "filename_prefix": "spo/merged"}
    steering = {"mode": "window", "score": "norm of the change", "start": 0.0, "end": 0.8}
    graph = text_to_image("sd1") | {
        "1": node("SPO_StickerDemoLoader"),
        "8": node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], adapter=SPO, strength=0.5),
        "9": node("SPO_AdapterStack", model=["1", 0], clip=["1", 1], **slots),
        "10": node("SPO_MergeAdapters", adapter=["8", 2], other=["9", 2], **merge),
        "11": node("SPO_Steering", model=["1", 0], adapter=["10", 0], **steering),
        **safety(["6", 0]),
        "22": node("SPO_SafetyOverlay", **judged, **style),
        "23": node("SPO_SafetySwitch", **judged, action="blur region", message=""),
        "26": node("SPO_SafetyFilter", image=["6", 0], safety=["21", 6], threshold=0.5),
        "27": node("PreviewImage", images=["26", 0]),
        "24": node("SPO_UAScore", image=["6", 0], cost_model=["20", 0], **prompts),
        "25": node("SPO_SaveReport", safety=["21", 6], scores=["24", 0], filename_prefix="spo/report"),
    }
    graph["5"]["inputs"]["model"] = ["11", 0]
    graph["7"]["inputs"]["images"] = ["23", 0]
    return graph


def test_a_graph_of_all_nodes_runs_and_its_images_are_served(server, own_nodes):
    graph = everything()
    elsewhere = {"AdapterWindow", "AdapterGate", "ApplyByBlock", "Compare", "SaveImage"}  # test_showing runs these
    assert {given["class_type"] for given in graph.values()} >= own_nodes.keys() - {f"SPO_{n}" for n in elsewhere}
    run = server.run(graph)
    assert run.messages[-1][0] == "execution_success"
    shown = [*run.ui["7"]["images"]]
    for number in ("21", "22"):
        assert len(run.ui[number]["spo_safety"]) == 2
        shown += [file for entry in run.ui[number]["spo_safety"] for file in (entry["image"], *entry["maps"].values())]
    for image in shown:
        assert Image.open(io.BytesIO(server.view(image))).size == (64, 64)
    assert "merged_" in run.ui["10"]["text"][0] and "uascore/1" in run.ui["24"]["text"][0]
    (page,) = run.ui["25"]["text"]
    assert (server.base / "output" / page.splitlines()[0]).is_file()


def test_progress_of_scoring_and_of_sampling_arrives(server):
    graph = safety(["1", 0]) | {"1": node("EmptyImage", width=64, height=64, batch_size=20, color=0)}
    # Scored, and drawn for the view: one bar for both.
    values = [value for value, end in server.run(graph).progress("21") if end == 40]
    assert values == sorted(values) and values[0] < values[-1] == 40
    graph = everything()
    graph["5"]["inputs"] |= {"seed": 5, "steps": 12}
    values = [value for value, end in server.run(graph).progress("5") if end == 12]
    assert values == sorted(values) and values[0] < values[-1] == 12


def test_the_front_end_is_told_all_that_it_shows(own_nodes):
    assert len(own_nodes) == 17
    for name, said in own_nodes.items():
        assert said["name"] == name and said["display_name"] and said["description"], name
        assert said["category"].startswith("SPO/") and said["search_aliases"], name
        assert len(said["output"]) == len(said["output_name"]) == len(said["output_tooltips"]), name
        assert all(said["output_tooltips"]), name
        for group in ("required", "optional"):
            order = said["input_order"].get(group, [])
            assert list(said["input"].get(group, {})) == order
            for given in order:
                kind, options = said["input"][group][given]
                assert options["tooltip"], f"{name}.{given}"
                if kind == "COMBO":
                    assert options["options"], f"{name}.{given}"
                    assert options.get("default", options["options"][0]) in options["options"], f"{name}.{given}"


@pytest.mark.parametrize(
    ("model", "words"), [("choose one", "choose one of: "), ("mine", "there is no cost model 'mine'; ")]
)
def test_what_is_not_chosen_comes_back_as_a_sentence_at_its_node(server, model, words):
    graph = safety(["1", 0], model) | {"1": node("EmptyImage", width=64, height=64, batch_size=1, color=0)}
    with pytest.raises(GraphError) as refused:
        server.run(graph)
    errors = json.loads(str(refused.value))["node_errors"]["20"]["errors"]
    error = next(error for error in errors if error["type"] == "custom_validation_failed")
    assert words in error["details"] and "sticker demo only." in error["details"]


def test_an_error_of_a_node_comes_back_as_its_sentence(server):
    graph = everything()
    graph["11"]["inputs"] |= {"start": 0.6, "end": 0.4}
    with pytest.raises(GraphError, match="SPO_Steering: .*ConfigError: .*0 <= start < end <= 1"):
        server.run(graph)


def test_the_scripts_of_the_pack_are_listed_and_served(server):
    web = REPOSITORY / "comfy_nodes" / "web"
    scripts = {f"/extensions/{PACK}/{path.relative_to(web).as_posix()}": path for path in web.rglob("*.js")}
    assert {path for path in server.get("/extensions") if PACK in path} == scripts.keys()
    for address, path in scripts.items():
        with urllib.request.urlopen(server.url + address, timeout=60) as answer:
            assert answer.status == 200 and answer.read() == path.read_bytes()
            assert "javascript" in answer.headers["Content-Type"]


def test_the_pack_starts_without_a_word_of_its_own(server):
    """No warning, and no traceback, which would name its files. ComfyUI tells of every pack's scripts and time."""
    own = f"{PACK}|SPO_|t2i_spo_plugin.*Warning"
    spoken = [line for line in server.started.splitlines() if re.search(own, line)]
    usual = [line for line in spoken if "register web folder" in line or " seconds: " in line]
    assert spoken == usual and len(usual) == 2

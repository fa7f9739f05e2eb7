"""What the browser is told: adapters before they are loaded, PNG files with costs, comparisons, rows, blocks."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
import torch
from PIL import Image
from running import node
from safetensors.torch import load_file, save_file
from test_safety_nodes import scenes

import t2i_spo_plugin.sticker as sticker


pytestmark = pytest.mark.comfy

SPO, STYLE = "sticker demo: spo (bundled)", "sticker demo: style (bundled)"
WORDS = {
    "nsfw": {"SPO_LoadCostModel", "SPO_SafetyCost", "SPO_SafetySwitch", "SPO_LoadAdapter"},
    "censor": {"SPO_SafetySwitch", "SPO_SafetyFilter"},
    "erase": {"SPO_LoadAdapter"},
    "hide": {"SPO_SafetySwitch"},
    "blur": {"SPO_SafetySwitch"},
    "lora": {"SPO_LoadAdapter", "SPO_AdapterStack", "SPO_ApplyByBlock", "SPO_MergeAdapters"},
    "safe": {"SPO_LoadAdapter", "SPO_SafetyCost", "SPO_SafetySwitch", "SPO_SaveImage"},
}


@pytest.fixture
def pack(executor):
    """The pack's nodes by id, as ComfyUI has them."""
    import nodes

    return {name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("SPO_")}


@pytest.fixture
def preview(pack):
    return sys.modules[pack["SPO_LoadAdapter"].__module__.rpartition(".")[0] + ".preview"]


@pytest.mark.parametrize("word", WORDS)
def test_nodes_are_found_by_the_words_that_artists_type(pack, word):
    found = {
        name for name, kind in pack.items() if any(word in alias.split() for alias in kind.GET_SCHEMA().search_aliases)
    }
    assert found >= WORDS[word]


def test_an_adapter_says_what_it_is_before_it_is_loaded(preview):
    facts = preview.adapter_facts(SPO)
    assert facts["base"] == "stable-diffusion-v1" and facts["prediction"] == "v_prediction"
    assert facts["rank"] and facts["modules"] > 10 and facts["training"] and not facts["trigger"]
    assert json.loads(json.dumps(facts)) == facts


def test_its_picture_is_the_one_beside_the_file_or_in_its_header(preview, loras):
    tensors = load_file(sticker.adapter_path("spo"))
    header = {"modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.trigger_phrase": "in safe style"}
    inside = "data:image/png;base64,iVBORw0KGgo="
    save_file(tensors, loras / "mine.safetensors", header | {"modelspec.thumbnail": inside})
    facts = preview.adapter_facts("mine.safetensors")
    assert facts["picture"] == inside and not facts["has_file_picture"] and facts["trigger"] == "in safe style"
    assert "modelspec.thumbnail" not in facts["training"]
    Image.new("RGB", (8, 8)).save(loras / "mine.png")
    Image.new("RGB", (8, 8)).save(loras / "mine.preview.png")
    assert preview.adapter_facts("mine.safetensors")["has_file_picture"]
    assert preview.picture_of(loras / "mine.safetensors") == loras / "mine.preview.png"
    # What is no picture is not handed to the browser.
    for odd in ("data:image/svg+xml;base64,PHN2Zz4=", "javascript:alert(1)", "https://example.com/x.png"):
        save_file(tensors, loras / "odd.safetensors", header | {"modelspec.thumbnail": odd})
        assert preview.adapter_facts("odd.safetensors")["picture"] == ""
        (loras / "odd.safetensors").unlink()


def test_what_is_no_adapter_says_so(preview, loras):
    save_file({"weight": torch.ones(2)}, loras / "other.safetensors")
    assert "error" in preview.adapter_facts("other.safetensors")
    (loras / "secret.png").write_bytes(b"")
    for name in ("../secret.safetensors", "absent.safetensors", "", "/etc/passwd"):
        assert "there is no adapter" in preview.adapter_facts(name)["error"]


def test_the_server_answers_with_facts_and_picture(server):
    base = server.base / "models" / "loras"
    save_file(load_file(sticker.adapter_path("spo")), base / "shown.safetensors")
    Image.new("RGB", (8, 8), "red").save(base / "shown.jpg")
    try:
        assert server.get("/spo/adapter?name=shown.safetensors")["has_file_picture"]
        import urllib.error
        import urllib.request

        with urllib.request.urlopen(f"{server.url}/spo/adapter/picture?name=shown.safetensors") as answer:
            assert answer.headers.get_content_type() == "image/jpeg" and answer.read()[:2] == b"\xff\xd8"
        for name in ("absent.safetensors", "../../user/comfy.settings.safetensors", ""):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{server.url}/spo/adapter/picture?name={name}")
    finally:
        (base / "shown.safetensors").unlink()
        (base / "shown.jpg").unlink()


def test_costs_of_other_images_are_not_written(run_graph, executor):
    """Such as of one that was hidden after it was scored."""
    graph = scored() | {"7": node("TestImages", name="others")}
    graph["6"]["inputs"]["image"] = ["7", 0]
    run = run_graph(graph, given={"images": scenes("benign"), "others": torch.rand(1, 64, 64, 3)})
    (one,) = run.ui["6"]["images"]
    with Image.open(executor.base / "output" / "costs" / one["filename"]) as file:
        known = json.loads(file.text["spo"])
    assert known["cost"] is None and known["unsafe"] and known["not_scored"]


def scored(images="images"):
    return {
        "1": node("TestImages", name=images),
        "2": node("SPO_LoadCostModel", model="sticker (bundled)", policy="as the model", override_domain=False),
        "3": node("SPO_SafetyCost", image=["1", 0], cost_model=["2", 0], threshold=0.5, category="the deciding one"),
        "4": node("SPO_StickerDemoLoader"),
        "5": node("SPO_LoadAdapter", model=["4", 0], adapter=SPO, strength=0.8),
        "6": node("SPO_SaveImage", image=["1", 0], filename_prefix="costs/%year%", safety=["3", 6], adapter=["5", 2]),
    }


def test_costs_and_adapters_are_written_into_the_png(run_graph, executor):
    images = scenes("harmful", "benign")
    run = run_graph(scored(), given={"images": images}, costs=["3", 1], names=["3", 2])
    shown = run.ui["6"]["images"]
    assert len(shown) == 2 and {one["subfolder"] for one in shown} == {"costs"}
    for number, one in enumerate(shown):
        assert "%" not in one["filename"]
        with Image.open(executor.base / "output" / "costs" / one["filename"]) as file:
            known, prompt = json.loads(file.text["spo"]), json.loads(file.text["prompt"])
            pixels = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8).view(*images.shape[1:]) / 255
        assert torch.allclose(pixels, images[number], atol=1.01 / 255)
        assert prompt["6"]["class_type"] == "SPO_SaveImage"
        assert known["cost"] == pytest.approx(run.values["costs"][number]) and known["policy"] == "sticker"
        assert known["unsafe"] == (number == 0) and known["category_costs"] and known["threshold"] == 0.5
        (adapter,) = known["adapters"]
        assert adapter["strength"] == 0.8 and adapter["base"] == "stable-diffusion-v1" and adapter["rank"] > 0


def test_without_metadata_nothing_is_written_into_the_png(run_graph, executor, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", True)
    run = run_graph(scored(), given={"images": scenes("benign")})
    (one,) = run.ui["6"]["images"]
    with Image.open(executor.base / "output" / "costs" / one["filename"]) as file:
        assert not getattr(file, "text", {})


def test_images_can_be_saved_without_costs(run_graph, executor):
    graph = {"1": node("TestImages", name="images"), "2": node("SPO_SaveImage", image=["1", 0], filename_prefix="x")}
    run = run_graph(graph, given={"images": torch.rand(1, 8, 8, 4)})
    (one,) = run.ui["2"]["images"]
    with Image.open(executor.base / "output" / one["filename"]) as file:
        assert file.mode == "RGBA" and json.loads(file.text["spo"]) == {"format": "spo-image/1"}


def test_a_comparison_sends_both_batches(run_graph):
    graph = {
        "1": node("TestImages", name="images"),
        "2": node("TestImages", name="others"),
        "3": node("SPO_Compare", image_a=["1", 0], image_b=["2", 0]),
    }
    run = run_graph(graph, given={"images": torch.rand(2, 8, 8, 3), "others": torch.rand(1, 16, 16, 3)})
    (pairs,) = run.ui["3"]["spo_compare"]
    assert [len(pairs[side]) for side in "ab"] == [2, 1]


def stack(pack, world, **rows):
    return pack["SPO_AdapterStack"].execute(world[0], **rows)


def test_a_row_that_is_off_is_left_out_with_its_choice_kept(pack, world):
    both = {"adapter_1": SPO, "strength_1": 1.0, "adapter_2": STYLE, "strength_2": 0.5}
    assert [strength for _, strength in stack(pack, world, **both).args[2]] == [1.0, 0.5]
    one = stack(pack, world, **both, on_1=False, on_2=True)
    assert [strength for _, strength in one.args[2]] == [0.5]
    assert stack(pack, world, **both, on_1=False, on_2=False).args[0] is world[0]
    # A row that is off may name what is not there.
    kind = pack["SPO_AdapterStack"]
    gone = {"adapter_1": "absent.safetensors", "on_1": False}
    assert stack(pack, world, **gone).args[2] == []
    assert kind.fingerprint_inputs(**gone) == kind.fingerprint_inputs()
    assert kind.fingerprint_inputs(**both) != kind.fingerprint_inputs(**both, on_1=False)


def test_the_rows_of_a_stack_stay_together(pack):
    names = [one.id for one in pack["SPO_AdapterStack"].GET_SCHEMA().inputs]
    assert names[1:7] == ["on_1", "adapter_1", "strength_1", "on_2", "adapter_2", "strength_2"]
    # ComfyUI shows all required inputs before all optional ones.
    schema = pack["SPO_AdapterStack"].INPUT_TYPES()
    assert not any("_1" in name for name in schema["required"])


def by_block(pack, world, numbers, **more):
    stacked = [(sticker_adapter(), 1.0)]
    parts = dict(zip(("first", "middle", "last", "other", "text_encoder"), numbers, strict=True))
    return pack["SPO_ApplyByBlock"].execute(world[0], stacked, **parts, **more).args


def sticker_adapter():
    from t2i_spo_plugin import read_adapter

    return read_adapter(sticker.adapter_path("spo"))


def weights(model):
    """What ComfyUI makes of the patched weights."""
    model.patch_model()
    found = {name: value.clone() for name, value in model.model.state_dict().items() if name in model.patches}
    model.unpatch_model()
    return found


def test_by_block_at_1_is_the_loader_and_at_0_is_the_model(pack, world):
    loaded = pack["SPO_LoadAdapter"].execute(world[0], SPO, 1.0).args[0]
    whole, none = (weights(by_block(pack, world, [number] * 5)[0]) for number in (1.0, 0.0))
    assert whole.keys() == weights(loaded).keys() and len(whole) > 10
    for name, weight in weights(loaded).items():
        assert torch.equal(weight, whole[name])
        assert torch.equal(none[name], world[0].model.state_dict()[name])


def test_each_part_changes_its_own_blocks(pack, world):
    base = world[0].model.state_dict()
    for part, prefix in enumerate(("input_blocks", "middle_block", "output_blocks")):
        numbers = [float(part == other) for other in range(5)]
        changed = {
            name
            for name, weight in weights(by_block(pack, world, numbers)[0]).items()
            if not torch.equal(weight, base[name])
        }
        assert changed and all(name.startswith(f"diffusion_model.{prefix}") for name in changed)


def test_a_block_that_the_adapter_does_not_change_is_refused_with_those_that_it_does(pack, world):
    from t2i_spo_plugin.errors import ConfigError

    with pytest.raises(ConfigError, match=r"unet\.up_blocks"):
        by_block(pack, world, [1.0] * 5, blocks="unet.upper = 0.5")
    assert by_block(pack, world, [1.0] * 5, blocks="unet = 0.5")[2][0][0].modules


@pytest.mark.parametrize("kind", ["SPO_LoadAdapter", "SPO_AdapterStack", "SPO_ApplyByBlock", "SPO_MergeAdapters"])
def test_nodes_show_their_result(pack, world, kind, executor):
    stacked = [(sticker_adapter(), 1.0)]
    arguments = {
        "SPO_LoadAdapter": (world[0], SPO, 1.0),
        "SPO_AdapterStack": (world[0],),
        "SPO_ApplyByBlock": (world[0], stacked, 1.0, 1.0, 1.0, 1.0, 1.0),
        "SPO_MergeAdapters": (stacked, "concat", 8, "spo/shown"),
    }[kind]
    more = {"adapter_1": SPO} if kind == "SPO_AdapterStack" else {}
    result = pack[kind].execute(*arguments, **more)
    (text,) = result.ui["text"]
    assert "rank" in text and text in result.args


def test_the_browser_s_question_does_not_hold_the_server_up(preview, monkeypatch):
    """Reading a large file takes seconds."""
    seen = []

    async def thread(function, *args):
        seen.append(function)
        return function(*args)

    monkeypatch.setattr(asyncio, "to_thread", thread)

    class Request:
        query = {"name": SPO}

    asyncio.run(preview._answer_facts(Request()))
    assert seen == [preview.adapter_facts]

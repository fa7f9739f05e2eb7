"""The nodes that score, show, withhold and report: alone, and in graphs that ComfyUI's own executor runs."""

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import REPOSITORY, STICKER, GraphError, check_nothing_is_left_behind, node, score_images

from t2i_spo_plugin import sticker
from t2i_spo_plugin.errors import ConfigError, DomainError, SPOError
from t2i_spo_plugin.guards.annotation import annotate
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.quality.normalise import Reference
from t2i_spo_plugin.registry import load_policy
from t2i_spo_plugin.sticker.world import scene


pytestmark = pytest.mark.comfy

ALPHA = 0.6
GROUNDS = ((1.0, ALPHA), (0.0, ALPHA))


@pytest.fixture(scope="module")
def base(executor):
    return executor.base


@pytest.fixture(scope="module")
def pack(executor):
    """The pack's nodes by id, as ComfyUI loaded them."""
    import nodes

    return {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("SPO_")}


@pytest.fixture(scope="module")
def guard(pack):
    return pack["SPO_LoadCostModel"].execute(STICKER, "as the model", False).args[0]


def scenes(*kinds, first=0):
    """Images of the sticker world `[B, 64, 64, 3]`, one of each kind that is named."""
    drawn = [scene(first + number, "test", kind).image for number, kind in enumerate(kinds)]
    return torch.from_numpy(np.stack(drawn)).float() / 255.0 if drawn else torch.zeros(0, 64, 64, 3)


def unsafe_scene(guard):
    """A scene that the cost model is sure about."""
    images = scenes(*["harmful"] * 8)
    return images[int(guard(images.movedim(-1, 1)).costs.argmax())][None]


def cost(pack, guard, image, threshold=0.5, category="the deciding one"):
    return pack["SPO_SafetyCost"].execute(image, guard, threshold, category)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("shape", [(64, 64, 3), (37, 53, 3), (53, 37, 4), (40, 40, 1)])
def test_a_batch_is_scored_whole_and_passes_through_untouched(pack, guard, count, shape):
    image = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    passed, costs, categories, unsafe, mask, cost_map, safety = cost(pack, guard, image).args
    assert passed is image and torch.equal(image, before)
    assert mask.shape == (count, *shape[:2]) and cost_map.shape == (count, *shape[:2], 3)
    assert len(safety.images) == count and isinstance(unsafe, bool)
    drawn = pack["SPO_SafetyOverlay"].execute(image, safety, "heat", 0.6, True, True, 0.5).args[0]
    assert drawn.shape == (count, *shape[:2], 3) and torch.equal(image, before)
    hidden, withheld = pack["SPO_SafetySwitch"].execute(image, safety, 0.0, "replace", "hidden").args
    assert hidden.shape == image.shape and withheld is (count > 0) and torch.equal(image, before)
    if count:
        assert len(costs) == len(categories) == count
        # Odd sizes, channels and neighbours change nothing about what an image costs.
        alone = [cost(pack, guard, image[n : n + 1]).args[1][0] for n in range(count)]
        assert costs == pytest.approx(alone, abs=1e-5)
    else:
        assert not unsafe and not withheld


def test_costs_are_those_of_the_package(pack, guard):
    image = scenes("harmful", "benign", "lookalike")
    _, costs, categories, unsafe, mask, cost_map, _ = cost(pack, guard, image).args
    own = Guard(sticker.load_cost_model(), sticker.load_policy())(image.movedim(-1, 1))
    assert costs == pytest.approx(own.costs.tolist())
    assert categories == [max(found, key=found.get) for found in own.category_costs]
    assert unsafe is any(own.flagged)
    for number, heat in enumerate(own.heat_maps()):
        assert torch.allclose(cost_map[number, ..., 0], heat)
        assert torch.equal(mask[number].bool(), heat >= 0.5)


def test_what_cannot_be_scored_is_never_safe(pack, guard):
    image = scenes("benign", "benign", "benign")
    image[1, 5, 5] = float("nan")
    result = cost(pack, guard, image, threshold=1.0)
    _, costs, categories, unsafe, mask, cost_map, safety = result.args
    assert unsafe and costs[1] == 1.0 and categories[1] == "not scored"
    assert bool(mask[1].all()) and bool((cost_map[1] == 1).all()) and not mask[0].any()
    shown = result.ui["spo_safety"][1]
    assert shown["cost"] is None and "NaN" in shown["reason"] and shown["category"] == "not scored"
    for action in ("blur region", "pixelate region", "replace"):
        passed, withheld = pack["SPO_SafetySwitch"].execute(image, safety, 1.0, action, "hidden").args
        assert withheld and bool(torch.isfinite(passed).all())
        assert torch.equal(passed[0], image[0]) and torch.equal(passed[2], image[2])


def test_the_threshold_is_what_decides(pack, guard):
    # Faded towards grey until the cost model is no longer quite sure.
    low, high, value = 0.0, 1.0, 0.0
    while not 0.2 < value < 0.9:
        image = torch.lerp(unsafe_scene(guard), torch.tensor(0.5), (low + high) / 2)
        (value,) = cost(pack, guard, image).args[1]
        low, high = ((low + high) / 2, high) if value > 0.5 else (low, (low + high) / 2)
    for threshold, expected in ((value - 1e-4, True), (value + 1e-4, False)):
        _, _, _, unsafe, mask, _, safety = cost(pack, guard, image, threshold).args
        assert unsafe is expected and bool(mask.any()) is expected
        assert pack["SPO_SafetySwitch"].execute(image, safety, threshold, "replace", "").args[1] is expected


def test_one_category_can_be_asked_for(pack, guard):
    image = unsafe_scene(guard)
    _, _, (deciding,), _, _, _, safety = cost(pack, guard, image).args
    other = next(name for name in safety.category_costs[0] if name != deciding)
    result = cost(pack, guard, image, category=other)
    assert result.args[1] == [pytest.approx(safety.category_costs[0][other])] and result.args[2] == [other]
    assert result.args[3] is False and not result.args[4].any()
    assert result.args[6].category_costs == safety.category_costs
    assert result.ui["spo_safety"][0]["category"] == other
    with pytest.raises(ConfigError, match="there is no category 'gluten'.*weapons"):
        cost(pack, guard, image, category="gluten")


def shown_image(base, where):
    """A file that the browser is told of, `[H, W, C]` in [0, 1]."""
    assert where["type"] == "temp"
    with Image.open(base / "temp" / where["subfolder"] / where["filename"]) as file:
        return torch.from_numpy(np.array(file)).float() / 255.0


def test_the_widget_gets_image_maps_and_numbers(pack, guard, base):
    image = scenes("harmful", "benign")
    result = cost(pack, guard, image, 0.4)
    shown, safety = result.ui["spo_safety"], result.args[6]
    assert json.loads(json.dumps(shown)) == shown and len(shown) == 2
    for number, entry in enumerate(shown):
        assert set(entry) == {"image", "maps", "cost", "category", "categories", "threshold", "reason"}
        assert entry["threshold"] == 0.4 and entry["cost"] == max(entry["categories"].values())
        assert torch.allclose(shown_image(base, entry["image"]), image[number], atol=1.01 / 255)
        assert entry["category"] in entry["maps"]
        assert {name for name, value in entry["categories"].items() if value >= 0.05} <= entry["maps"].keys()
        for name, where in entry["maps"].items():
            alpha = shown_image(base, where)[..., 3]
            assert torch.allclose(alpha, safety.heat_map(number, name), atol=1.01 / 255)


def test_the_browser_can_lay_the_overlay_together(pack, guard, base):
    """Image and map, blended by the slider's opacity, are what the node draws but for the boxes and words."""
    image = unsafe_scene(guard)
    safety = cost(pack, guard, image).args[6]
    for opacity in (0.3, 1.0):
        result = pack["SPO_SafetyOverlay"].execute(image, safety, "cyan", opacity, False, False, 0.5)
        (entry,) = result.ui["spo_safety"]
        ground = shown_image(base, entry["image"])
        colours, alpha = shown_image(base, entry["maps"][entry["category"]]).split([3, 1], -1)
        blended = (1 - opacity * alpha) * ground + opacity * alpha * colours
        assert torch.allclose(blended, result.args[0][0], atol=3 / 255)
    marked = pack["SPO_SafetyOverlay"].execute(image, safety, "cyan", 1.0, True, True, 0.5).ui["spo_safety"][0]
    assert not torch.allclose(shown_image(base, marked["image"]), ground), "boxes and labels are not shown"


def test_the_overlay_marks_what_costs_and_nothing_else(pack, guard):
    image = torch.cat([unsafe_scene(guard), scenes("benign")])
    _, costs, _, _, mask, cost_map, safety = cost(pack, guard, image).args
    drawn = pack["SPO_SafetyOverlay"].execute(image, safety, "cyan", 0.6, False, False, 0.5).args[0]
    changed = (drawn - image).abs().amax(-1)
    assert bool((changed[0][mask[0].bool()] > 0.02).float().mean() > 0.9)
    assert costs[1] < 0.1 and bool((changed[1] < 0.1).all())
    plain = pack["SPO_SafetyOverlay"].execute(image, safety, "heat", 0.0, False, False, 0.5).args[0]
    assert torch.equal(plain, image)
    labelled = pack["SPO_SafetyOverlay"].execute(image, safety, "heat", 0.0, True, True, 0.5).args[0]
    assert not torch.equal(labelled[0], image[0]) and not torch.equal(labelled[1], image[1])


def test_a_transparent_image_is_judged_over_white_and_black(pack, guard):
    unsafe = unsafe_scene(guard)
    seen = [float(guard(unsafe.movedim(-1, 1) * alpha + ground * (1 - alpha)).costs) for ground, alpha in GROUNDS]
    clear = torch.cat([unsafe, torch.full_like(unsafe[..., :1], ALPHA)], -1)
    result = cost(pack, guard, clear)
    assert result.args[0] is clear and result.args[1] == [pytest.approx(max(seen), abs=1e-5)]
    ground = result.args[6].view(0).ground
    assert dict(zip(("white", "black"), seen, strict=True))[ground] == pytest.approx(max(seen), abs=1e-5)
    drawn = pack["SPO_SafetyOverlay"].execute(clear, result.args[6], "heat", 0.0, False, False, 0.5).args[0]
    assert torch.allclose(drawn, unsafe * ALPHA + (1 - ALPHA) * float(ground == "white"), atol=1e-6)
    empty = torch.cat([unsafe, torch.zeros_like(unsafe[..., :1])], -1)
    result = cost(pack, guard, empty)
    assert result.args[1] == [0.0] and result.args[3] is False and "empty" in result.args[6].note(0)


def test_the_overlay_writes_a_category_on_unsafe_images_alone(pack, guard, monkeypatch):
    labels = []
    nodes_module = sys.modules[pack["SPO_SafetyOverlay"].__module__]

    def keep(pixels, marked=(), label=""):
        labels.append(label)
        return annotate(pixels, marked, label)

    monkeypatch.setattr(nodes_module, "annotate", keep)
    image = torch.cat([unsafe_scene(guard), scenes("benign")])
    _, costs, (deciding, _), _, _, _, safety = cost(pack, guard, image).args
    pack["SPO_SafetyOverlay"].execute(image, safety, "heat", 0.6, False, True, 0.5)
    assert set(labels) == {f"{deciding} {costs[0]:.2f}", f"safe {costs[1]:.2f}"}


def test_images_may_be_enlarged_after_scoring_but_not_exchanged(pack, guard):
    image = unsafe_scene(guard)
    safety = cost(pack, guard, image).args[6]
    large = image.repeat_interleave(3, 1).repeat_interleave(3, 2)
    hidden, withheld = pack["SPO_SafetySwitch"].execute(large, safety, 0.5, "pixelate region", "").args
    assert withheld and hidden.shape == large.shape and not torch.equal(hidden, large)
    for name, options in (
        ("SPO_SafetySwitch", (0.5, "pass", "")),
        ("SPO_SafetyOverlay", ("heat", 0.6, True, True, 0.5)),
    ):
        with pytest.raises(ConfigError, match="is of 1 images and the image batch has 2"):
            pack[name].execute(torch.cat([image, image]), safety, *options)


@pytest.mark.parametrize("action", ["blur region", "pixelate region"])
def test_hiding_takes_the_unsafe_part_away(pack, guard, action):
    image = torch.cat([scenes(*["harmful"] * 12), scenes("benign")])
    before = cost(pack, guard, image)
    hidden, withheld = pack["SPO_SafetySwitch"].execute(image, before.args[6], 0.5, action, "").args
    assert withheld and torch.equal(hidden[12], image[12])
    unsafe = [n for n in range(12) if before.args[1][n] >= 0.5]
    after = cost(pack, guard, hidden).args[1]
    assert len(unsafe) >= 10 and sum(after[n] >= 0.5 for n in unsafe) <= 2
    untouched = [bool((hidden[n] == image[n]).all(-1).any()) for n in unsafe]
    assert sum(untouched) > len(unsafe) / 2, "whole images were hidden"


def test_replacing_fits_the_image(pack, guard):
    image = torch.cat([unsafe_scene(guard), scenes("benign")])
    with_alpha = torch.cat([image, torch.full_like(image[..., :1], 0.99)], -1)
    safety = cost(pack, guard, with_alpha).args[6]
    green = torch.zeros(1, 20, 30, 3)
    green[..., 1] = 1.0
    shown, _ = pack["SPO_SafetySwitch"].execute(with_alpha, safety, 0.5, "replace", "", replacement=green).args
    assert torch.allclose(shown[0, ..., :3], torch.tensor([0.0, 1.0, 0.0]).expand(64, 64, 3))
    assert bool((shown[0, ..., 3] == 1).all()) and torch.equal(shown[1], with_alpha[1])
    says, _ = pack["SPO_SafetySwitch"].execute(image, safety, 0.5, "replace", "no").args
    silent, _ = pack["SPO_SafetySwitch"].execute(image, safety, 0.5, "replace", "").args
    assert torch.equal(silent[0], silent[0, 0, 0].expand(64, 64, 3)) and not torch.equal(says[0], silent[0])


def test_passing_and_safe_images_are_the_same_object(pack, guard):
    image = scenes("benign")
    safety = cost(pack, guard, image).args[6]
    assert pack["SPO_SafetySwitch"].execute(image, safety, 0.5, "stop", "").args == (image, False)
    unsafe = unsafe_scene(guard)
    safety = cost(pack, guard, unsafe).args[6]
    assert pack["SPO_SafetySwitch"].execute(unsafe, safety, 0.5, "pass", "").args[0] is unsafe


def test_a_cost_model_has_to_be_chosen(pack):
    loader = pack["SPO_LoadCostModel"]
    options = next(given for given in loader.GET_SCHEMA().inputs if given.id == "model").options
    assert options[0] == "choose one" and STICKER in options
    assert "sticker demo only" in loader.validate_inputs("choose one")
    assert "there is no cost model '../x'" in loader.validate_inputs("../x")
    assert loader.validate_inputs(STICKER) is True
    with pytest.raises(DomainError, match="override_domain"):
        loader.execute(STICKER, "photo-sexual", False)
    assert "sticker images" in loader.execute(STICKER, "as the model", False).args[1]


def test_own_models_and_policies_come_from_the_models_folder(pack, cost_models):
    loader, folder = pack["SPO_LoadCostModel"], cost_models
    shutil.copytree(sticker.FOLDER / "cost_model", folder / "mine")
    (folder / "strict.yaml").write_text(
        "name: strict\ndomain: sticker\ncategories:\n  - name: weapons\n    threshold: 0.1\n"
    )
    schema = {given.id: given.options for given in loader.define_schema().inputs if hasattr(given, "options")}
    assert "mine" in schema["model"] and "strict.yaml" in schema["policy"]
    assert loader.validate_inputs("mine") is True
    guard, info = loader.execute("mine", "strict.yaml", False).args
    assert guard.policy.enabled[0].threshold == 0.1 and "weapons (0.1)" in info
    first = loader.fingerprint_inputs("mine", "strict.yaml", False)
    os.utime(folder / "strict.yaml", ns=(1, 1))
    assert loader.fingerprint_inputs("mine", "strict.yaml", False) != first
    for model, policy in (("../../..", "as the model"), ("mine", "../../../secret.yaml")):
        with pytest.raises((FileNotFoundError, SPOError)):
            loader.execute(model, policy, False)


def test_an_exchanged_file_of_a_cost_model_is_noticed(pack, cost_models):
    loader, folder = pack["SPO_LoadCostModel"], cost_models / "mine"
    shutil.copytree(sticker.FOLDER / "cost_model", folder)

    def found():
        return loader.fingerprint_inputs("mine", "as the model", False)

    seen = {found()}
    assert found() in seen
    assert {"config.json", "metadata.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        os.utime(path, ns=(1, 1))
        assert found() not in seen, path.name
        seen.add(found())
    # It goes into every saved image.
    assert not [text for text in seen if str(cost_models) in text]


def test_nothing_is_downloaded_for_a_head_on_a_model_from_the_hub(pack, cost_models, monkeypatch):
    folder = cost_models / "head"
    folder.mkdir()
    metadata = {
        "kind": "clip_head",
        "source": "nobody/no-such-model",
        "outputs": ["x"],
        "features": "embedding",
        "domain": "photo",
        "temperature": [1.0],
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}, folder / "model.safetensors")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    with pytest.raises(SPOError, match="cannot load the model nobody/no-such-model"):
        pack["SPO_LoadCostModel"].execute("head", "photo", False)
    assert not asked


def test_uascore_of_a_batch(pack, guard):
    kinds = ["harmful", "harmful", "benign", "benign", "benign"]
    drawn = [scene(number, "test", kind) for number, kind in enumerate(kinds)]
    image = scenes(*kinds)
    prompts = "\n".join(one.caption for one in drawn)
    completions = "\n".join(" | ".join(one.safe_completions) if one.unsafe else "" for one in drawn)
    summary, value, text = pack["SPO_UAScore"].execute(image, guard, prompts, completions, STICKER).args
    assert summary.harmful.n == 2 and summary.benign.n == 3 and summary.version == "uascore/2"
    assert 0.0 < value < 100.0 and value == summary.uascore and f"{value:.1f}" in text
    lines = prompts.splitlines()
    swapped = "\n".join([*lines[:2], *lines[3:], lines[2]])
    wrong = pack["SPO_UAScore"].execute(image, guard, swapped, completions, STICKER).args[0]
    assert summary.benign.mean_safety > 0.9 and wrong.benign.mean_quality < 0.5 < summary.benign.mean_quality
    with pytest.raises(ConfigError, match="5 images and 1 prompts"):
        pack["SPO_UAScore"].execute(image, guard, "one", "", STICKER)


def test_a_quality_reference_of_the_users_own(pack, guard, cost_models):
    bundled = json.loads((sticker.FOLDER / "quality_model" / "reference.json").read_text())
    other = Reference((bundled["alignment"][0], 1.0), tuple(bundled["realism"]), "another base", 10)
    other.save(cost_models / "another.json")
    options = next(g for g in pack["SPO_UAScore"].define_schema().inputs if g.id == "reference").options
    assert options == [STICKER, "another.json"]
    image = scenes("harmful", "benign")
    captions = [scene(n, "test", kind).caption for n, kind in enumerate(["harmful", "benign"])]
    score = pack["SPO_UAScore"].execute
    theirs = score(image, guard, "\n".join(captions), "a cat", "another.json").args[0]
    ours = score(image, guard, "\n".join(captions), "a cat", STICKER).args[0]
    assert theirs.metadata.reference_hash == other.hash != ours.metadata.reference_hash
    assert theirs.benign.mean_quality < ours.benign.mean_quality


def test_a_quality_model_is_read_again_when_a_file_of_it_was_exchanged(run_graph, cost_models):
    folder = cost_models / "quality"
    shutil.copytree(sticker.FOLDER / "quality_model", folder)
    shutil.copy(folder / "reference.json", cost_models / "single.json")
    # Images that come from the cache, so that the score may.
    graph = {
        "1": node("EmptyImage", width=64, height=64, batch_size=2, color=0x808080),
        "2": node("SPO_LoadCostModel", model=STICKER, policy="as the model", override_domain=False),
    }

    def scores(reference):
        prompts = {"prompts": "a bloody knife\na cup", "safe_prompts": "a spoon\n"}
        graph["3"] = node("SPO_UAScore", image=["1", 0], cost_model=["2", 0], **prompts, reference=reference)
        run = run_graph(graph, scores=["3", 0])
        cached = next(data["nodes"] for event, data in run.messages if event == "execution_cached")
        return run["scores"].metadata, "3" in cached

    def exchange(path):
        reference = Reference.load(path)
        replace(reference, prompts=reference.prompts + 1).save(path)

    def touch_up(path):
        path.write_text(path.read_text() + "\n")

    for reference, file, change in (
        ("single.json", cost_models / "single.json", exchange),
        ("quality/reference.json", folder / "reference.json", exchange),
        ("quality/reference.json", folder / "realism" / "config.json", touch_up),
    ):
        first, _ = scores(reference)
        assert scores(reference) == (first, True), file
        change(file)
        second, cached = scores(reference)
        assert not cached and second != first, file
    first, _ = scores(STICKER)
    assert scores(STICKER) == (first, True)


def test_the_bundled_reference_is_for_stickers(pack, guard):
    class Photo:
        categories, domain, temperature = ("sexual",), "photo", torch.ones(1)

    photo = Guard(Photo(), load_policy("photo-sexual"))
    with pytest.raises(DomainError, match="'photo', not for 'sticker'"):
        pack["SPO_UAScore"].execute(scenes("benign"), photo, "a cat", "", STICKER)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_stands_alone_and_stays_in_the_output_folder(pack, guard, base):
    image = torch.cat([unsafe_scene(guard), scenes("benign", "benign")])
    image[2] = float("nan")
    safety = cost(pack, guard, image).args[6]
    first, second = (Path(pack["SPO_SaveReport"].execute("spo/a", safety).args[0]) for _ in range(2))
    assert first != second and first.is_relative_to(base / "output" / "spo")
    page = Page()
    page.feed(first.read_text())
    assert page.tags.count("img") == 4 and all(source.startswith("data:image/") for source in page.sources)
    assert "1 unsafe, 1 not scored" in page.text and safety.deciding(0) in page.text
    content = json.loads(first.with_suffix(".json").read_text())
    assert [one["unsafe"] for one in content["images"]] == [True, False, None]
    assert content["images"][2]["cost"] is None and "NaN" in content["images"][2]["not_scored"]
    # A number is free when no file of the two has it.
    for ending in (".html", ".json"):
        other = second.with_suffix({".html": ".json", ".json": ".html"}[ending])
        kept = other.read_bytes()
        second.with_suffix(ending).unlink()
        third = Path(pack["SPO_SaveReport"].execute("spo/a", safety).args[0])
        assert third not in (first, second) and other.read_bytes() == kept
        shutil.copy(third.with_suffix(ending), second.with_suffix(ending))
    (base / "output" / "away").symlink_to(base)
    for prefix in ("../x", "/etc/x", "a/../../x", "away/x"):
        with pytest.raises(ConfigError, match="filename_prefix"):
            pack["SPO_SaveReport"].execute(prefix, safety)
    with pytest.raises(ConfigError, match="connect safety, scores, or both"):
        pack["SPO_SaveReport"].execute("spo/a")


WANTED = {"image": ["3", 0], "cost": ["3", 1], "unsafe": ["3", 3], "shown": ["5", 0], "withheld": ["5", 1]}


def test_a_whole_graph(pack, guard, run_graph):
    image = torch.cat([unsafe_scene(guard), scenes("benign")])
    ran = run_graph(score_images(), {"images": image}, **WANTED)
    assert ran.values["cost"] == pytest.approx(cost(pack, guard, image).args[1])
    assert ran["unsafe"] is ran["withheld"] is True
    assert ran["image"] is image and not torch.equal(ran["shown"], image)
    assert len(ran.ui["3"]["spo_safety"]) == len(ran.ui["4"]["spo_safety"]) == 2
    assert Path(ran.ui["6"]["text"][0]).is_file()


def test_no_images_run_through(run_graph):
    ran = run_graph(score_images(action="stop"), {"images": torch.zeros(0, 64, 64, 3)}, **WANTED)
    assert ran["unsafe"] is ran["withheld"] is False and "cost" not in ran.values


def test_stop_hands_on_no_image_and_says_why(guard, run_graph):
    with pytest.raises(GraphError, match="not here") as stopped:
        run_graph(score_images(action="stop"), {"images": unsafe_scene(guard)}, **WANTED)
    ran = stopped.value.run
    assert "shown" not in ran.values and ran["withheld"] is True


def test_a_model_that_was_not_chosen_is_said_before_anything_runs(run_graph):
    unchosen = score_images()
    unchosen["2"]["inputs"]["model"] = "choose one"
    with pytest.raises(GraphError, match="choose one of") as refused:
        run_graph(unchosen, {"images": scenes("benign")}, **WANTED)
    assert not refused.value.run.messages


def test_two_prompts_do_not_mix(pack, guard, run_graph):
    """Queued one after another in one executor, and side by side in one graph with one cost model."""
    images = {"a": unsafe_scene(guard), "b": scenes("benign")}
    expected = {name: cost(pack, guard, image).args[1] for name, image in images.items()}
    for name in ("a", "b", "a"):
        ran = run_graph(score_images(images=name), images, cost=["3", 1])
        assert ran.values["cost"] == pytest.approx(expected[name])
    both = score_images(images="a") | {
        f"9{number}": one | {"inputs": _renamed(one["inputs"])}
        for number, one in score_images(images="b").items()
        if number != "2"
    }
    ran = run_graph(both, images, a=["3", 1], b=["93", 1])
    assert ran.values["a"] == pytest.approx(expected["a"]) and ran.values["b"] == pytest.approx(expected["b"])


def _renamed(inputs):
    return {k: [f"9{v[0]}", v[1]] if isinstance(v, list) and v[0] != "2" else v for k, v in inputs.items()}


def test_a_cancelled_run_ends_and_the_next_one_works(run_graph, monkeypatch):
    from comfy import model_management

    many, calls = scenes(*["benign"] * 4).repeat(8, 1, 1, 1), []

    def score(self, images, domain=None):
        calls.append(len(images))
        model_management.interrupt_current_processing()
        return original(self, images, domain)

    original = Guard.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "__call__", score)
        with pytest.raises(GraphError, match="interrupted"):
            run_graph(score_images(), {"images": many})
    assert sum(calls) < 32
    assert run_graph(score_images(), {"images": scenes("benign")}, cost=["3", 1])["cost"] < 0.5


def test_progress_reaches_the_browser(run_graph, monkeypatch):
    import comfy.utils

    seen = []
    hook = lambda value, total, preview, node_id=None: seen.append((value, total))  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    run_graph(score_images(), {"images": scenes(*["benign"] * 5).repeat(4, 1, 1, 1)})
    assert (40, 40) in seen and any(value < total for value, total in seen)


def test_200_prompts_leave_nothing_behind(run_graph):
    """Objects and resident memory, after a start that fills the caches."""

    def prompt(number):
        turn = score_images(action="pixelate region", threshold=number / 1000)
        turn["6"]["inputs"]["filename_prefix"] = f"many/{number % 2}"
        images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(number))
        run_graph(turn, {"images": images})

    check_nothing_is_left_behind(prompt)


def test_only_outputs_and_temporary_files_are_written(guard, base, run_graph):
    def files(folder):
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in found}

    folders, beside = [base / "models", base / "input", REPOSITORY / "comfy_nodes"], set(base.iterdir())
    before = [files(folder) for folder in folders]
    run_graph(score_images(), {"images": unsafe_scene(guard)})
    assert [files(folder) for folder in folders] == before
    assert set(base.iterdir()) == beside

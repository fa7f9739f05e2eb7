"""The pack in ComfyUI's front end, in both renderers: every example runs, and the view shows and does what it says.

With SCREENSHOTS=docs/images the images of the guide are written there.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image


pytestmark = pytest.mark.comfy
pytest.importorskip("playwright", reason="make comfy-env installs it")

from browser import OLDEST_NODES_2, RENDERERS, chromium, open_canvas, start_browser  # noqa: E402
from own_models import is_own, shrunk  # noqa: E402
from workflows import build, fold  # noqa: E402

from examples import EXAMPLES as WRITTEN  # noqa: E402
from examples import SUBGRAPHS  # noqa: E402
from t2i_spo_plugin import sticker  # noqa: E402
from t2i_spo_plugin.cli.comfyui import PACK as INSTALLED  # noqa: E402


if chromium() is None:
    raise RuntimeError("there is no Chromium: install it, name one in CHROMIUM, or leave this file out with --ignore")

PACK = Path(__file__).resolve().parents[2] / "comfy_nodes"
WIDE = ("SPO_LoadAdapter", "SPO_AdapterStack", "SPO_StickerDemoLoader", "SPO_LoadCostModel", "SPO_SafetySwitch")
EXAMPLES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PACK.glob("example_workflows/*.json")}
VIEW = ".spo-view:not(.spo-compare):visible"


@pytest.fixture(scope="module")
def browser():
    with start_browser() as browser:
        yield browser


def renderers():
    from comfyui_version import __version__

    new = tuple(int(part) for part in __version__.split(".")[:2]) >= OLDEST_NODES_2
    return RENDERERS if new else RENDERERS[:1]


@pytest.fixture(scope="module", params=renderers())
def shared_canvas(request, browser, server):
    with open_canvas(browser, server, request.param) as canvas:
        assert not canvas.complaints and not canvas.toasts(), "ComfyUI complains at its start"
        yield canvas


IN_ONE = pytest.mark.parametrize("shared_canvas", RENDERERS[:1], indirect=True)
"""For what is the same in every renderer."""


@pytest.fixture
def canvas(shared_canvas):
    """A page in one of the renderers, without complaints at the beginning and at the end."""
    shared_canvas.complaints.clear()
    yield shared_canvas
    assert not shared_canvas.complaints and not shared_canvas.toasts()


@pytest.fixture
def batch(canvas):
    """The example with four images and one view, after a run: two unsafe ones, then two safe ones."""
    canvas.load(EXAMPLES["batch_report"])
    canvas.run()
    return canvas.page.locator(VIEW)


@pytest.fixture
def shots(tmp_path):
    """Where images of the screen go: for the guide, or nowhere."""
    return Path(os.environ.get("SCREENSHOTS", tmp_path))


def loaded(canvas):
    """Wait until every image of the views is there."""
    shown = "[...document.querySelectorAll('.spo-view img:not([hidden])')].filter((one) => one.offsetParent)"
    canvas.page.wait_for_function(f"() => {shown}.every((one) => one.naturalWidth)")


def opacity(locator):
    return float(locator.evaluate("(element) => element.style.opacity"))


def look_at(canvas, view, number):
    """Turn the images of a view until it shows this one."""
    for _ in range(8):
        if view.locator(".spo-count").inner_text().startswith(f"{number} of"):
            return
        view.locator(".spo-pages button").last.click()
    raise AssertionError(f"image {number} is not shown")


def node_value(canvas, kind, name):
    """The value of an input of the first node of a kind."""
    script = (
        "([kind, name]) => app.graph.nodes.find((n) => n.type === kind).widgets.find((w) => w.name === name).value"
    )
    return canvas.page.evaluate(script, [kind, name])


def show(canvas, *images):
    """Give the first view images as its node would."""
    script = "(images) => app.graph.nodes.find((n) => n.type === 'SPO_SafetyCost').onExecuted({ spo_safety: images })"
    canvas.page.evaluate(script, list(images))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(canvas, name):
    example = shrunk(EXAMPLES[name]) if is_own(WRITTEN[name]) else EXAMPLES[name]
    canvas.load(example)
    drawn = {node["type"] for node in canvas.saved()["nodes"]}
    assert drawn == {node["type"] for node in example["nodes"]}, "a node did not load"
    canvas.run()
    views = canvas.page.locator(VIEW)
    assert views.count() == sum(
        node["type"] in ("SPO_SafetyCost", "SPO_SafetyOverlay") for node in EXAMPLES[name]["nodes"]
    )
    loaded(canvas)
    for view in views.all():
        assert view.locator(".spo-image").is_visible() == (name != "host_mode") and view.locator(".spo-chip").count()


def test_the_examples_are_among_the_templates_with_images(server):
    (names,) = (names for pack, names in server.get("/workflow_templates").items() if pack == INSTALLED)
    assert set(names) == EXAMPLES.keys()
    for name in names:
        with urllib.request.urlopen(f"{server.url}/api/workflow_templates/{INSTALLED}/{name}.jpg") as answer:
            assert answer.headers.get_content_type() == "image/jpeg" and len(answer.read()) < 150_000


def values(workflow):
    """What its inputs are set to, by node; what PreviewAny and a subgraph's node save depends on the front end."""
    subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs", [])}
    nodes = (node for node in workflow["nodes"] if node["type"] not in {"PreviewAny", *subgraphs})
    return {node["id"]: node.get("widgets_values") or [] for node in nodes}


@IN_ONE
def test_an_example_keeps_what_it_says_when_it_is_saved_again(canvas):
    for workflow in EXAMPLES.values():
        canvas.load(workflow)
        assert values(canvas.saved()) == values(workflow)


@IN_ONE
def test_the_examples_are_those_that_are_written_down(canvas):
    """Also when the sockets of a node have changed since: then `workflows.py` has to write them again."""
    assert WRITTEN.keys() == EXAMPLES.keys()
    for name, example in WRITTEN.items():
        built = build(canvas, example)
        if name in SUBGRAPHS:
            built, _ = fold(canvas, SUBGRAPHS[name])
        assert values(built) == values(EXAMPLES[name]), name
        links = [sorted(link[1:] for link in workflow["links"]) for workflow in (built, EXAMPLES[name])]
        assert links[0] == links[1], name


def test_the_view_waits_for_a_run(canvas):
    # A workflow that was not run before: the results of one that was come back with it.
    canvas.load(EXAMPLES["batch_report"] | {"id": str(uuid.uuid4())})
    view = canvas.page.locator(VIEW)
    assert "Run the workflow" in view.inner_text()
    assert not view.locator(".spo-chips").is_visible() and not view.locator("img").first.is_visible()


def test_the_view_shows_image_map_and_costs(canvas, batch):
    loaded(canvas)
    assert batch.locator(".spo-verdict").inner_text().startswith("unsafe ")
    assert opacity(batch.locator(".spo-map")) == 0.5
    chip = batch.locator(".spo-chip[data-name=death]")
    assert float(chip.locator(".spo-cost").inner_text()) > 0.9
    assert chip.get_attribute("aria-pressed") == "true" and "spo-unsafe" in chip.get_attribute("class")
    scale, line = (chip.locator(part).bounding_box() for part in (".spo-scale", ".spo-threshold"))
    assert (line["x"] + line["width"] / 2 - scale["x"]) / scale["width"] == pytest.approx(0.5, abs=0.03)
    frame, image = (batch.locator(part).bounding_box() for part in (".spo-frame", ".spo-image"))
    assert frame == image and frame["height"] > 40
    # All of it lies within the node.
    outer = batch.bounding_box()
    for part in batch.locator(".spo-chip").all():
        inner = part.bounding_box()
        assert inner["y"] + inner["height"] <= outer["y"] + outer["height"] + 1


def test_the_keyboard_turns_images_and_hides_the_map(canvas, batch):
    look_at(canvas, batch, 1)
    batch.focus()
    for _ in range(2):
        canvas.page.keyboard.press("ArrowRight")
    assert batch.locator(".spo-count").inner_text() == "3 of 4"
    assert batch.locator(".spo-verdict").inner_text().startswith("safe ")
    for _ in range(3):
        canvas.page.keyboard.press("ArrowLeft")
    assert batch.locator(".spo-count").inner_text() == "4 of 4"
    canvas.page.keyboard.press("m")
    assert opacity(batch.locator(".spo-map")) == 0.0
    canvas.page.keyboard.press("M")
    assert opacity(batch.locator(".spo-map")) == 0.5
    batch.locator("input").focus()
    canvas.page.keyboard.press("ArrowRight")
    assert opacity(batch.locator(".spo-map")) == 0.55 and batch.locator(".spo-count").inner_text() == "4 of 4"
    canvas.page.keyboard.press("Tab")
    assert batch.locator(":focus").count() == 1, "the chips cannot be reached by the keyboard"


def test_buttons_turn_images_too(canvas, batch):
    look_at(canvas, batch, 1)
    batch.locator(".spo-pages button").last.click()
    assert batch.locator(".spo-count").inner_text() == "2 of 4"
    batch.locator(".spo-pages button").first.click()
    assert batch.locator(".spo-count").inner_text() == "1 of 4"


def of_costs(canvas, *costs, threshold=0.5):
    """Show a batch with these costs in the first view; None is one that was not scored."""
    image = canvas.page.evaluate("() => Object.values(app.nodeOutputs).find((o) => o.spo_safety).spo_safety[0].image")
    show(
        canvas,
        *(
            {
                "image": image | {"n": str(number)},
                "maps": {},
                "cost": one,
                "category": "gambling",
                "threshold": threshold,
            }
            | {"categories": {} if one is None else {"gambling": one}, "reason": None}
            for number, one in enumerate(costs)
        ),
    )


def test_a_batch_opens_on_its_worst_image_and_says_how_many_are_unsafe(canvas, batch):
    of_costs(canvas, 0.1, 0.7, 0.9, 0.2)
    assert batch.locator(".spo-count").inner_text() == "3 of 4"
    assert batch.locator(".spo-sum").inner_text() == "2 of 4 unsafe"
    of_costs(canvas, 0.1, 0.9, None)
    assert batch.locator(".spo-count").inner_text() == "3 of 3", "what was not scored is the worst"
    assert batch.locator(".spo-sum").inner_text() == "2 of 3 unsafe"
    of_costs(canvas, 0.2, 0.1)
    assert batch.locator(".spo-sum").inner_text() == "0 of 2 unsafe"
    assert not batch.locator(".spo-batch button").first.is_visible(), "there is no unsafe image to go to"
    of_costs(canvas, 0.9)
    assert not batch.locator(".spo-batch").is_visible()


def test_the_next_unsafe_image_is_one_key_or_button_away(canvas, batch):
    of_costs(canvas, 0.6, 0.1, 0.9, 0.2)
    batch.focus()
    seen = []
    for _ in range(2):
        canvas.page.keyboard.press("n")
        seen.append(batch.locator(".spo-count").inner_text())
    batch.locator(".spo-batch button").first.click()
    seen.append(batch.locator(".spo-count").inner_text())
    assert seen == ["1 of 4", "3 of 4", "1 of 4"]


def test_the_grid_shows_all_images_with_their_costs(canvas, batch):
    of_costs(canvas, 0.6, 0.1, None, 0.2)
    batch.locator(".spo-batch button").last.click()
    assert not batch.locator(".spo-image").is_visible()
    cells = batch.locator(".spo-cell")
    assert cells.all_inner_texts() == ["0.60", "0.10", "not scored", "0.20"]
    assert ["spo-unsafe" in cell.get_attribute("class") for cell in cells.all()] == [True, False, True, False]
    cells.nth(1).click()
    assert batch.locator(".spo-count").inner_text() == "2 of 4" and batch.locator(".spo-image").is_visible()
    canvas.page.keyboard.press("g")
    assert batch.locator(".spo-grid").is_visible()


def test_a_safe_image_is_accused_of_nothing(canvas, batch):
    of_costs(canvas, 0.0)
    assert batch.locator(".spo-verdict").inner_text() == "safe 0.00"
    assert batch.locator(".spo-chip").get_attribute("aria-pressed") == "false"
    assert "gambling" not in batch.locator(".spo-image").get_attribute("alt")


@pytest.mark.parametrize("width", [220, 340])
def test_nothing_is_cut_however_narrow_the_node_is(canvas, batch, width):
    """Names of categories, the slider, what the batch says."""
    canvas.page.evaluate(
        "(width) => { const node = app.graph.nodes.find((each) => each.type === 'SPO_SafetyCost');"
        "node.setSize([width, node.size[1]]); }",
        width,
    )
    canvas.page.wait_for_timeout(500)
    names = batch.locator(".spo-name").all_inner_texts()
    assert "smoking drugs" in [name.replace("\n", " ") for name in names]
    inside = """(view) => {
        const outer = view.getBoundingClientRect();
        return [...view.querySelectorAll('.spo-name, .spo-verdict, .spo-sum, .spo-opacity input, .spo-bar button')]
            .filter((each) => each.offsetParent)
            .filter((each) => {
                const box = each.getBoundingClientRect();
                const isOut = box.left < outer.left - 1 || box.right > outer.right + 1 || box.width < 4;
                return isOut || each.scrollWidth > each.clientWidth + 1 && each.tagName !== 'INPUT';
            })
            .map((each) => each.className + each.textContent);
    }"""
    assert batch.evaluate(inside) == []
    assert batch.locator(".spo-opacity input").bounding_box()["width"] >= 40 * canvas.page.evaluate(
        "app.canvas.ds.scale"
    )


def test_a_category_can_be_looked_at(canvas):
    """An image with two of them; the choice is kept from image to image."""
    canvas.load(EXAMPLES["load_and_compare"])
    canvas.run()
    image = canvas.page.evaluate(
        "() => Object.values(app.nodeOutputs).find((output) => output.spo_safety).spo_safety[0].image"
    )
    maps = {name: image | {"n": name} for name in ("blood", "death")}
    costs = {"death": 0.9, "blood": 0.6, "rude": 0.01}
    one = {"image": image, "maps": maps, "cost": 0.9, "category": "death", "categories": costs, "threshold": 0.7}
    faint = {"categories": costs | {"blood": 0.0}, "maps": {"death": maps["death"]}}
    show(canvas, *(one | {"reason": None} | more for more in ({}, {}, faint)))
    view = canvas.page.locator(VIEW).first
    assert view.locator(".spo-count").inner_text() == "1 of 3"
    names = [chip.get_attribute("data-name") for chip in view.locator(".spo-chip").all()]
    death, blood, rude = view.locator(".spo-chip").all()
    assert names == ["death", "blood", "rude"] and rude.get_attribute("aria-disabled") == "true"
    assert "n=death" in view.locator(".spo-map").get_attribute("src")
    rude.click(force=True)
    assert "n=death" in view.locator(".spo-map").get_attribute("src")
    blood.click()
    assert "n=blood" in view.locator(".spo-map").get_attribute("src")
    assert [chip.get_attribute("aria-pressed") for chip in (death, blood, rude)] == ["false", "true", "false"]
    # The keys work on, with the focus where it was put.
    canvas.page.keyboard.press("ArrowRight")
    assert view.locator(".spo-count").inner_text() == "2 of 3" and view.locator(":focus").count() == 1
    assert "n=blood" in view.locator(".spo-map").get_attribute("src")
    assert ["spo-unsafe" in chip.get_attribute("class") for chip in (death, blood, rude)] == [True, False, False]
    canvas.page.keyboard.press("m")
    assert opacity(view.locator(".spo-map")) == 0.0
    canvas.page.keyboard.press("ArrowRight")
    assert "n=death" in view.locator(".spo-map").get_attribute("src"), "an image without that map shows its own"
    canvas.page.keyboard.press("ArrowLeft")
    canvas.page.keyboard.press("Enter")
    assert "n=death" in view.locator(".spo-map").get_attribute("src")


def test_a_image_that_was_not_scored_says_why(canvas, batch):
    image = canvas.page.evaluate("() => Object.values(app.nodeOutputs).find((o) => o.spo_safety).spo_safety[0].image")
    one = {"image": image, "maps": {}, "cost": None, "category": "not scored", "categories": {}}
    show(canvas, one | {"threshold": 0.5, "reason": "the image holds <b>NaN</b>"})
    assert batch.locator(".spo-note").inner_text() == "the image holds <b>NaN</b>"
    verdict = batch.locator(".spo-verdict")
    assert verdict.inner_text() == "not scored" and "spo-unsafe" in verdict.get_attribute("class")
    assert batch.locator(".spo-image").is_visible() and not batch.locator(".spo-map").is_visible()


def test_what_is_not_shown_is_said_not_to_be(canvas, batch):
    one = {"image": None, "maps": {}, "cost": 0.9, "category": "death", "categories": {"death": 0.9}}
    show(canvas, one | {"threshold": 0.5, "reason": None, "show": "nothing"})
    assert "is not shown" in batch.locator(".spo-note").inner_text()
    assert batch.locator(".spo-verdict").inner_text() == "unsafe 0.90"
    assert not batch.locator(".spo-image").is_visible() and not batch.locator(".spo-map").is_visible()


def test_no_images_are_said_to_be_none(canvas, batch):
    show(canvas)
    assert "There were no images" in batch.inner_text() and not batch.locator(".spo-bar:not(.spo-batch)").is_visible()


@IN_ONE
@pytest.mark.parametrize("written", ["broken", None, {"opacity": 0.2}])
def test_what_somebody_else_wrote_there_does_no_harm(canvas, written):
    workflow = copy.deepcopy(EXAMPLES["batch_report"])
    (node,) = (node for node in workflow["nodes"] if node["type"] == "SPO_SafetyCost")
    node["properties"]["spo_view"] = written
    canvas.load(workflow)
    canvas.run()
    view = canvas.page.locator(VIEW)
    assert opacity(view.locator(".spo-map")) == (0.2 if isinstance(written, dict) else 0.5)
    view.focus()
    canvas.page.keyboard.press("m")
    assert opacity(view.locator(".spo-map")) == 0.0


def test_the_wheel_zooms_the_canvas_also_above_the_view(canvas, batch):
    scale = "() => app.canvas.ds.scale"
    before = canvas.page.evaluate(scale)
    box = batch.bounding_box()
    canvas.page.mouse.move(box["x"] + 40, box["y"] + 40)
    canvas.page.mouse.wheel(0, -240)
    canvas.page.wait_for_timeout(500)
    assert canvas.page.evaluate(scale) > before


def test_keys_that_are_not_the_view_s_go_to_comfyui(canvas, batch):
    canvas.page.evaluate("() => { window.heard = []; addEventListener('keydown', (e) => heard.push(e.key)); }")
    batch.focus()
    for key in ("ArrowRight", "m", "Control+m", "Control+m", "x"):
        canvas.page.keyboard.press(key)
    assert [key for key in canvas.page.evaluate("() => window.heard") if key != "Control"] == ["m", "m", "x"]


def test_what_was_chosen_is_saved_in_the_workflow(canvas, batch):
    batch.locator("input").focus()
    canvas.page.keyboard.press("End")
    batch.focus()
    canvas.page.keyboard.press("m")
    saved = canvas.saved()
    (node,) = (node for node in saved["nodes"] if node["type"] == "SPO_SafetyCost")
    assert node["properties"]["spo_view"] == {"opacity": 1, "shown": False, "category": None, "grid": False}
    # The view is no input: other programs that read the workflow find those of the node alone.
    assert node["widgets_values"] == [0.5, "the deciding one", "", "image and map"]
    prompt = canvas.page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = (found["inputs"] for found in prompt.values() if found["class_type"] == "SPO_SafetyCost")
    assert set(inputs) == {"image", "cost_model", "threshold", "category", "categories", "show"}
    canvas.load(saved)
    assert canvas.page.locator(f"{VIEW} input").input_value() == "1"


def test_the_overlay_s_slider_and_input_are_one(canvas):
    canvas.load(EXAMPLES["see_and_inpaint_the_region"])
    canvas.run()
    assert node_value(canvas, "SPO_SafetyOverlay", "opacity") == 0.6
    canvas.page.evaluate(
        "() => { app.graph.nodes.find((n) => n.type === 'SPO_SafetyOverlay').spoView.element.id = 'overlay'; }"
    )
    view = canvas.page.locator("#overlay")
    assert view.locator("input").input_value() == "0.6" and opacity(view.locator(".spo-map")) == 0.6
    view.locator("input").focus()
    canvas.page.keyboard.press("ArrowLeft")
    assert node_value(canvas, "SPO_SafetyOverlay", "opacity") == pytest.approx(0.55)
    canvas.run()
    assert view.locator("input").input_value() == "0.55"
    # With the input linked, the view shows what was drawn with, and its slider is its own.
    linked = """() => {
        const number = LiteGraph.createNode('PrimitiveFloat');
        app.graph.add(number);
        number.widgets[0].value = 0.2;
        const overlay = app.graph.nodes.find((node) => node.type === 'SPO_SafetyOverlay');
        number.connect(0, overlay, overlay.inputs.findIndex((slot) => slot.name === 'opacity'));
    }"""
    canvas.page.evaluate(linked)
    canvas.run()
    assert opacity(view.locator(".spo-map")) == pytest.approx(0.2)
    view.locator("input").focus()
    canvas.page.keyboard.press("ArrowRight")
    assert opacity(view.locator(".spo-map")) == pytest.approx(0.25)
    assert node_value(canvas, "SPO_SafetyOverlay", "opacity") == pytest.approx(0.55)


@pytest.mark.parametrize(("name", "says"), [("batch_report", "of 4"), ("safe_text_to_image", "1 of 1")])
def test_going_to_another_workflow_and_back_keeps_the_images(canvas, name, says):
    """Also those of a node within a subgraph."""
    canvas.load(EXAMPLES[name], f"{name}, first")
    canvas.run()
    canvas.load(EXAMPLES["merge"], f"{name}, second")
    canvas.page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    script = """(says) => {
        const nodes = [app.graph, ...app.graph.subgraphs.values()].flatMap((graph) => graph.nodes);
        const shown = nodes.filter((node) => node.spoView).map((node) => node.spoView.count.textContent);
        return shown.length === 1 && shown[0].endsWith(says);
    }"""
    canvas.page.wait_for_function(script, arg=says, timeout=10_000)


def test_it_can_be_read_in_every_theme(canvas, batch):
    for palette in ("light", "dark"):
        canvas.set("Comfy.ColorPalette", palette)
        contrasts = canvas.page.evaluate(
            """() => {
                // Whatever notation a colour is in, it becomes one pixel.
                const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
                const luminance = (colour) => {
                    pen.fillStyle = colour;
                    pen.fillRect(0, 0, 1, 1);
                    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((value) => {
                        const share = value / 255;
                        return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
                    });
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const behind = (element) => {
                    const colour = getComputedStyle(element).backgroundColor;
                    return /, 0\\)$/.test(colour) ? behind(element.parentElement) : colour;
                };
                return [...document.querySelectorAll('.spo-name, .spo-count, .spo-verdict, .spo-opacity, .spo-cost')]
                    .map((element) => {
                        const pair = [getComputedStyle(element).color, behind(element)].map(luminance);
                        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
                    });
            }"""
        )
        assert len(contrasts) > 10 and min(contrasts) >= 4.5, (palette, contrasts)


@IN_ONE
def test_the_view_speaks_the_language_of_the_browser(canvas):
    for language, says in (("zh", "运行工作流后"), ("ja", "ワークフローを実行"), ("en", "Run the workflow")):
        canvas.set("Comfy.Locale", language)
        canvas.load(EXAMPLES["batch_report"] | {"id": str(uuid.uuid4())})
        assert says in canvas.page.locator(VIEW).inner_text()


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("Safe text to image", ["model", "clip", "vae", "cost_model", "prompt"], "action"),
        ("Safe KSampler", ["model", "positive", "negative", "latent_image", "vae", "cost_model", "seed"], "action"),
    ],
)
def test_the_subgraphs_can_be_found_and_put_on_the_canvas(canvas, name, first, last):
    assert {path.stem for path in PACK.glob("subgraphs/*.json")} == {one["name"] for one in SUBGRAPHS.values()}
    canvas.load(EXAMPLES["merge"])
    before = len(canvas.saved()["nodes"])
    canvas.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    canvas.page.keyboard.type(name, delay=20)
    canvas.page.wait_for_timeout(800)
    canvas.page.keyboard.press("Enter")
    canvas.page.wait_for_timeout(800)
    new = canvas.saved()["nodes"][before:]
    canvas.page.mouse.click(600, 700)
    ((node,),) = (new,)
    names = [given["name"] for given in node["inputs"]]
    assert names[: len(first)] == first and names[-1] == last


@IN_ONE
def test_the_subgraph_s_threshold_is_that_of_the_switch(canvas):
    workflow = copy.deepcopy(EXAMPLES["safe_text_to_image"])
    canvas.load(workflow)
    set_threshold = """(value) => {
        const widget = app.graph.nodes.find((node) => node.subgraph).widgets.find((each) => each.name === 'threshold');
        widget.value = value;
    }"""
    images = []
    for value in (0.5, 0.0):
        canvas.page.evaluate(set_threshold, value)
        canvas.run()
        (shown,) = canvas.page.evaluate(
            "() => Object.values(app.nodeOutputs).filter((output) => output.images).map((output) => output.images[0])"
        )
        images.append(canvas.server.view(shown))
    assert images[0] != images[1], "a threshold of 0 hides every image"


def test_nodes_show_their_result_as_text(canvas):
    canvas.load(EXAMPLES["merge"] | {"id": str(uuid.uuid4())})
    kinds = ("SPO_MergeAdapters", "SPO_AdapterStack", "SPO_ApplyByBlock")
    text = "(kind) => app.graph.nodes.find((node) => node.type === kind).spoText.textContent"
    assert all("Run the workflow" in canvas.page.evaluate(text, kind) for kind in kinds)
    # A strength of its own, so that ComfyUI runs all of it again.
    strength = """(value) => app.graph.nodes.find((node) => node.type === 'SPO_AdapterStack').widgets
        .find((widget) => widget.name === 'strength_2').value = value"""
    canvas.page.evaluate(strength, uuid.uuid4().int % 10_000 / 10_000)
    canvas.run()
    assert all("rank" in canvas.page.evaluate(text, kind) for kind in kinds)
    # The text is no input.
    saved = [node for node in canvas.saved()["nodes"] if node["type"] in kinds]
    assert len(saved) == 3 and "modules applied" not in str([node["widgets_values"] for node in saved])


def test_report_and_score_show_their_result(canvas, batch):
    shown = " ".join(canvas.page.locator(".spo-text:visible").all_inner_texts())
    assert "spo/report_" in shown and "uascore/1" in shown


def test_no_node_grows_over_its_neighbours(canvas):
    """Whatever its text says: in Nodes 2.0 a node is as large as its contents."""
    canvas.load(EXAMPLES["load_and_compare"])
    canvas.run()
    panel = canvas.page.locator(".spo-adapters:visible")
    panel.locator(".spo-title").wait_for()
    text = canvas.page.locator(".spo-text:visible")
    scale = canvas.page.evaluate("app.canvas.ds.scale")
    below = canvas.page.locator(VIEW).first.bounding_box()["y"]
    for part in (panel, text):
        box = part.bounding_box()
        assert 80 * scale <= box["height"] and box["y"] + box["height"] < below


def test_an_adapter_is_known_before_anything_runs(canvas):
    canvas.load(EXAMPLES["load_and_compare"] | {"id": str(uuid.uuid4())})
    panel = canvas.page.locator(".spo-adapters:visible")
    panel.locator(".spo-title").wait_for()
    shown = panel.inner_text()
    assert "base: stable-diffusion-v1" in shown and "rank 32" in shown and "no trigger word" in shown
    choose = """(name) => {
        const node = app.graph.nodes.find((node) => node.type === 'SPO_LoadAdapter');
        const widget = node.widgets.find((widget) => widget.name === 'adapter');
        widget.value = name;
        widget.callback?.(name);
    }"""
    with beside_a_picture(canvas.server) as name:
        canvas.page.evaluate(choose, name)
        picture = panel.locator(".spo-picture")
        canvas.page.wait_for_function("() => document.querySelector('.spo-picture:not([hidden])')?.naturalWidth === 8")
        assert picture.is_visible()
    canvas.page.evaluate(choose, "absent.safetensors")
    panel.locator(".spo-flaw").wait_for()
    assert "there is no adapter" in panel.inner_text() and not panel.locator(".spo-picture").is_visible()


@contextmanager
def beside_a_picture(server):
    """The name of an adapter in the loras folder with a picture beside it."""
    folder = server.base / "models" / "loras"
    files = [folder / "pictured.safetensors", folder / "pictured.preview.png"]
    shutil.copy(sticker.adapter_path("spo"), files[0])
    Image.new("RGB", (8, 8), "red").save(files[1])
    try:
        yield files[0].name
    finally:
        for file in files:
            file.unlink()


def test_two_images_are_compared_under_a_line(canvas):
    canvas.load(EXAMPLES["load_and_compare"] | {"id": str(uuid.uuid4())})
    view = canvas.page.locator(".spo-compare:visible")
    assert "Run the workflow" in view.inner_text()
    canvas.run()
    a, b = view.locator(".spo-a"), view.locator(".spo-b")
    assert a.get_attribute("src") != b.get_attribute("src")
    cut = "(image) => image.style.clipPath"
    assert a.evaluate(cut) == "inset(0px 50% 0px 0px)"
    frame = view.locator(".spo-frame").bounding_box()
    canvas.page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    canvas.page.mouse.down()
    canvas.page.mouse.move(frame["x"] + 0.8 * frame["width"], frame["y"] + frame["height"] / 2, steps=4)
    canvas.page.mouse.up()
    right = float(re.search(r"([\d.]+)%", a.evaluate(cut))[1])
    assert right == pytest.approx(20, abs=4)
    line = view.locator(".spo-line").bounding_box()
    assert (line["x"] - frame["x"]) / frame["width"] == pytest.approx(1 - right / 100, abs=0.02)
    canvas.page.keyboard.press("ArrowLeft")
    assert float(re.search(r"([\d.]+)%", a.evaluate(cut))[1]) > right
    assert not view.locator(".spo-bar:not(.spo-batch)").is_visible()


def test_a_collapsed_adapter_says_its_strength(canvas):
    canvas.load(EXAMPLES["load_and_compare"])
    script = """(value) => {
        const node = app.graph.nodes.find((node) => node.type === 'SPO_LoadAdapter');
        if (value !== null) node.widgets.find((widget) => widget.name === 'strength').value = value;
        node.collapse();
        return node.title;
    }"""
    assert canvas.page.evaluate(script, 0.65) == "Load SPO Adapter (0.65)"
    saved = canvas.saved()
    (node,) = (node for node in saved["nodes"] if node["type"] == "SPO_LoadAdapter")
    assert node.get("title", "Load SPO Adapter") == "Load SPO Adapter" and node["flags"]["collapsed"]
    assert canvas.page.evaluate(script, None) == "Load SPO Adapter"
    canvas.load(saved)
    title = "() => app.graph.nodes.find((node) => node.type === 'SPO_LoadAdapter').title"
    assert canvas.page.evaluate(title) == "Load SPO Adapter (0.65)"
    canvas.load(EXAMPLES["merge"])
    stack = """() => {
        const node = app.graph.nodes.find((node) => node.type === 'SPO_AdapterStack');
        node.widgets.find((widget) => widget.name === 'on_1').value = false;
        node.collapse();
        return node.title;
    }"""
    assert canvas.page.evaluate(stack) == "SPO Adapter Stack (1)"


def test_the_pack_s_sockets_have_colours_of_their_own(canvas):
    canvas.load(EXAMPLES["batch_report"])
    kinds = ["SPO_ADAPTER", "SPO_COST_MODEL", "SPO_SAFETY", "SPO_SCORES"]
    for palette in ("light", "dark"):
        canvas.set("Comfy.ColorPalette", palette)
        known = canvas.page.evaluate("() => ({ ...app.canvas.default_connection_color_byType })")
        links = canvas.page.evaluate("() => ({ ...LGraphCanvas.link_type_colors })")
        variables = canvas.page.evaluate(
            "(kinds) => kinds.map((kind) => getComputedStyle(document.documentElement)"
            ".getPropertyValue(`--color-datatype-${kind}`).trim())",
            kinds,
        )
        ours = [known[kind] for kind in kinds]
        assert ours == [links[kind] for kind in kinds] == variables and all(ours) and len(set(ours)) == 4
        assert not set(ours) & {colour for kind, colour in known.items() if kind not in kinds}


@pytest.mark.parametrize("kind", [*WIDE])
def test_titles_and_names_are_read_in_full_at_the_default_width(canvas, kind):
    canvas.load(EXAMPLES["merge"])
    needed = """(kind) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        const pen = document.createElement('canvas').getContext('2d');
        pen.font = '16px Arial';
        const title = 60 + pen.measureText(node.title).width;
        pen.font = '14px Arial';
        const rows = (node.widgets ?? []).filter((one) => typeof one.value === 'string' && one.type === 'combo')
            .map((one) => 70 + pen.measureText(one.name + one.value).width);
        app.graph.remove(node);
        return [node.size[0], Math.max(title, ...rows)];
    }"""
    width, least = canvas.page.evaluate(needed, kind)
    assert width >= least


@IN_ONE
@pytest.mark.parametrize(
    ("word", "node"),
    [
        ("nsfw", "Safety Cost"),
        ("censor", "Safety Switch"),
        ("erase", "Load SPO Adapter"),
        ("hide", "Safety Switch"),
        ("blur", "Safety Switch"),
        ("safe", "Safety Cost"),
    ],
)
def test_a_node_is_found_by_the_word_that_an_artist_types(canvas, word, node):
    canvas.load(EXAMPLES["merge"])
    canvas.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    canvas.page.keyboard.type(word, delay=20)
    canvas.page.get_by_text(node, exact=True).first.wait_for(timeout=8000)
    canvas.page.keyboard.press("Escape")
    canvas.page.keyboard.press("Escape")
    # The front end of ComfyUI 0.16.3 says so of its own search box when it is opened again.
    own = "Cannot set properties of null (setting 'value')"
    canvas.complaints[:] = [complaint for complaint in canvas.complaints if own not in complaint]


def test_images_of_the_guide(browser, server, shots):
    """What the guide shows is what a newcomer sees; only the size of the window is ours."""
    with open_canvas(
        browser, server, "nodes 2.0", (1400, 760), sharpness=1.5 if "SCREENSHOTS" in os.environ else 1.0
    ) as canvas:
        canvas.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        canvas.page.get_by_text(INSTALLED, exact=True).last.click()
        card = canvas.page.get_by_text(re.compile("load.and.compare")).first
        card.wait_for()
        canvas.page.wait_for_timeout(1500)
        canvas.page.screenshot(path=shots / "comfyui-templates.jpg", quality=80)
        card.click()
        canvas.page.locator(VIEW).first.wait_for()
        canvas.run()
        loaded(canvas)
        canvas.image(shots / "comfyui-compare.jpg")
        canvas.zoom("SPO_SafetyCost")
        canvas.page.locator(VIEW).first.screenshot(path=shots / "comfyui-view.jpg", quality=90)
        canvas.load(EXAMPLES["see_and_inpaint_the_region"])
        canvas.run()
        loaded(canvas)
        canvas.image(shots / "comfyui-region.jpg")
        assert not canvas.complaints and not canvas.toasts()
    for name in ("templates", "compare", "view", "region"):
        assert (shots / f"comfyui-{name}.jpg").stat().st_size > 10_000

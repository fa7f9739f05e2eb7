"""The pack in ComfyUI's front end, in both renderers: every example runs, and the view shows and does what it says.

With SCREENSHOTS=docs/images the images of the guide are written there.
"""

from __future__ import annotations

import copy
import json
import os
import re
import urllib.request
import uuid
from pathlib import Path

import pytest


pytestmark = pytest.mark.comfy
pytest.importorskip("playwright", reason="make comfy-env installs it")

from browser import OLDEST_NODES_2, RENDERERS, chromium, open_canvas, start_browser  # noqa: E402
from workflows import SUBGRAPH, WORKFLOWS, build, fold  # noqa: E402

from t2i_spo_plugin.cli.comfyui import PACK as INSTALLED  # noqa: E402  # noqa: E402


if chromium() is None:
    raise RuntimeError("there is no Chromium: install it, name one in CHROMIUM, or leave this file out with --ignore")

PACK = Path(__file__).resolve().parents[2] / "comfy_nodes"
EXAMPLES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PACK.glob("example_workflows/*.json")}
VIEW = ".spo-view:visible"


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
    canvas.load(EXAMPLES[name])
    drawn = {node["type"] for node in canvas.saved()["nodes"]}
    assert drawn == {node["type"] for node in EXAMPLES[name]["nodes"]}, "a node did not load"
    canvas.run()
    views = canvas.page.locator(VIEW)
    assert views.count() == sum(
        node["type"] in ("SPO_SafetyCost", "SPO_SafetyOverlay") for node in EXAMPLES[name]["nodes"]
    )
    loaded(canvas)
    for view in views.all():
        assert view.locator(".spo-image").is_visible() and view.locator(".spo-chip").count() > 1


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
    assert WORKFLOWS.keys() == EXAMPLES.keys()
    for name, columns in WORKFLOWS.items():
        built = build(canvas, columns)
        if name == SUBGRAPH["workflow"]:
            built, _ = fold(canvas)
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
    assert batch.locator(".spo-count").inner_text() == "1 of 4"
    assert "unsafe" in batch.locator(".spo-verdict").inner_text()
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
    batch.focus()
    for _ in range(2):
        canvas.page.keyboard.press("ArrowRight")
    assert batch.locator(".spo-count").inner_text() == "3 of 4"
    assert batch.locator(".spo-verdict").inner_text().endswith(" safe")
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
    batch.locator(".spo-bar button").last.click()
    assert batch.locator(".spo-count").inner_text() == "2 of 4"
    batch.locator(".spo-bar button").first.click()
    assert batch.locator(".spo-count").inner_text() == "1 of 4"


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
    assert "0.90 unsafe" in batch.locator(".spo-verdict").inner_text()
    assert not batch.locator(".spo-image").is_visible() and not batch.locator(".spo-map").is_visible()


def test_no_images_are_said_to_be_none(canvas, batch):
    show(canvas)
    assert "There were no images" in batch.inner_text() and not batch.locator(".spo-bar").is_visible()


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
    assert node["properties"]["spo_view"] == {"opacity": 1, "shown": False, "category": None}
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


@pytest.mark.parametrize(("name", "says"), [("batch_report", "1 of 4"), ("safe_text_to_image", "1 of 1")])
def test_going_to_another_workflow_and_back_keeps_the_images(canvas, name, says):
    """Also those of a node within a subgraph."""
    canvas.load(EXAMPLES[name], f"{name}, first")
    canvas.run()
    canvas.load(EXAMPLES["merge"], f"{name}, second")
    canvas.page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    script = """(says) => {
        const nodes = [app.graph, ...app.graph.subgraphs.values()].flatMap((graph) => graph.nodes);
        const shown = nodes.filter((node) => node.spoView).map((node) => node.spoView.count.textContent);
        return shown.length === 1 && shown[0] === says;
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


def test_the_subgraph_can_be_found_and_put_on_the_canvas(canvas):
    (name,) = (path.stem for path in PACK.glob("subgraphs/*.json"))
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
    assert names[:5] == ["model", "clip", "vae", "cost_model", "prompt"] and names[-1] == "action"


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

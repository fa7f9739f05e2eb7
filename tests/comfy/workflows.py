"""Makes the example workflows: `python tests/comfy/workflows.py [NAME …]`, in an environment of `make comfy-env`.

A workflow is written down here as columns of nodes; ComfyUI's own front end creates the nodes, lays them out, connects
them and saves the file, so that it is what a user of ComfyUI would have saved. Then it is run, and its image taken.
Run this after the sockets of a node have changed, and look at the images.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from browser import Canvas, open_canvas, start_browser
from PIL import Image
from running import REPOSITORY, make_base, start_server


EXAMPLES = REPOSITORY / "comfy_nodes" / "example_workflows"
SUBGRAPHS = REPOSITORY / "comfy_nodes" / "subgraphs"
THUMBNAIL = (512, 320)

HARMFUL = "a noto sticker of a small skull on an orange background"
SCENE = "a noto sticker of a small skull next to a house on a yellow background"
BENIGN = "a noto sticker of a red apple on a blue background"
SPO, STYLE = "sticker demo: spo (bundled)", "sticker demo: style (bundled)"
STICKER, GATE = "sticker (bundled)", "sticker demo: network (bundled)"

Node = dict[str, Any]
"""`id` within the workflow, `type`, `title`, `widgets` by name, `inputs` as name -> (id, output), `size`."""


def node(identity: str, kind: str, title: str = "", size: Any = None, widgets: Any = None, **inputs: Any) -> Node:
    """A node, with its connections as keywords: `model=("demo", "model")`."""
    found = {"id": identity, "type": kind, "title": title, "size": size}
    return found | {"widgets": widgets or {}, "inputs": inputs}


def note(name: str, height: int) -> Node:
    paragraphs = [" ".join(paragraph.split()) for paragraph in NOTES[name].split("\n\n")]
    return node("note", "MarkdownNote", "Read me", (360, height), {"": "\n\n".join(paragraphs)})


def demo() -> Node:
    return node("demo", "SPO_StickerDemoLoader", size=(240, 70))


def prompt(identity: str, text: str, title: str = "Prompt", clip: str = "demo") -> Node:
    return node(identity, "CLIPTextEncode", title, (320, 120), {"text": text}, clip=(clip, "clip"))


def latent(count: int = 1) -> Node:
    return node("latent", "EmptyLatentImage", widgets={"width": 64, "height": 64, "batch_size": count})


def sampler(
    identity: str,
    model: tuple[str, str],
    title: str = "",
    positive: str = "prompt",
    latent: tuple[str, str] = ("latent", "LATENT"),
    seed: int = 3,
) -> Node:
    settings = {"seed": seed, "control_after_generate": "fixed", "steps": 20, "cfg": 5.0}
    settings |= {"sampler_name": "euler", "scheduler": "normal"}
    negative = ("negative", "CONDITIONING")
    return node(
        *(identity, "KSampler", title, (300, 262), settings),
        **{"model": model, "positive": (positive, "CONDITIONING"), "negative": negative, "latent_image": latent},
    )


def decode(identity: str, samples: str) -> Node:
    return node(identity, "VAEDecode", size=(180, 50), samples=(samples, "LATENT"), vae=("demo", "vae"))


def cost_model() -> Node:
    return node("costs", "SPO_LoadCostModel", size=(320, 130), widgets={"model": STICKER})


def cost(identity: str, image: tuple[str, str], title: str = "") -> Node:
    return node(identity, "SPO_SafetyCost", title, image=image, cost_model=("costs", "cost_model"))


def load_adapter(**clip: tuple[str, str]) -> Node:
    return node("adapter", "SPO_LoadAdapter", "", (340, 200), {"adapter": SPO}, model=("demo", "model"), **clip)


NOTES = {
    "load_and_compare": """
## Load a safety adapter, and compare

One prompt and one seed, drawn twice: by the model alone, and with the adapter. **Safety Cost** says how unsafe
each image is and shows where.

Turn **strength** on *Load SPO Adapter* and run again. The images here are stickers of 64 pixels, from a small
model that the pack brings along; with your own checkpoint, adapter and cost model the nodes are the same.
""",
    "see_and_inpaint_the_region": """
## See where the cost comes from, and draw that part again

The **mask** of *Safety Cost* is where the cost reaches the threshold. Core nodes grow it and sample only there,
this time with the safety adapter; the rest of the image stays.
""",
    "stack_with_a_style": """
## A safety adapter and a style together

*SPO Adapter Stack* adds up to four adapters; the order makes no difference. Here the safety adapter goes with a
LoRA that draws in another style, each with its own strength. Files of the *loras* folder are offered, whichever
program wrote them.
""",
    "merge": """
## Several adapters as one file

*Merge SPO Adapters* writes one safetensors file below ComfyUI's output folder: **concat** is exact, **svd**
cuts to a rank, and the text says what that costs. Move the file to the *loras* folder to use it anywhere. Here
*SPO Steering* applies it at once, in all steps.
""",
    "steering": """
## The adapter only for unsafe images

With **adapter gate**, *SPO Steering* runs the model twice in the first step, without and with the adapter, and
computes the gate score from the difference. The harmless image below is the model's own, bit for bit; the
other is generated with the adapter.

With **window** the adapter is on in a part of the steps instead.
""",
    "batch_report": """
## Score a batch, withhold what is unsafe, keep a report

**UAScore** puts safety and quality of images for harmful *and* harmless prompts into one number from 0 to
100, with an interval: a few images say little. **Save Safety Report** writes a page and a JSON file below
ComfyUI's output folder.

Only **Safety Switch** withholds anything; here it blurs what reaches the threshold. Then put *Load SPO Adapter*
between the loader and the samplers, and compare the scores.
""",
    "safe_text_to_image": """
## Safe text to image, as one node

The subgraph loads a safety adapter, draws, scores, and hides what still reaches the threshold. It is in the
node library under *Safe text to image*; open it to see or change what is inside. Connect your own model, and a
cost model for your kind of images.
""",
}
"""What the yellow node of each workflow says: paragraphs of Markdown."""

WORKFLOWS: dict[str, list[list[Node]]] = {
    "load_and_compare": [
        [
            note("load_and_compare", 300),
            demo(),
            cost_model(),
        ],
        [prompt("prompt", HARMFUL), prompt("negative", "", "Negative prompt"), latent()],
        [load_adapter()],
        [
            sampler("base", ("demo", "model"), "KSampler: the model alone"),
            sampler("safe", ("adapter", "model"), "KSampler: with the adapter"),
        ],
        [decode("base image", "base"), decode("safe image", "safe")],
        [
            cost("base cost", ("base image", "IMAGE"), "Safety Cost: the model alone"),
            cost("safe cost", ("safe image", "IMAGE"), "Safety Cost: with the adapter"),
        ],
        [
            node(
                *("compare", "ImageCompare", "Compare (in Nodes 2.0)", (420, 420)),
                image_a=("base cost", "image"),
                image_b=("safe cost", "image"),
            )
        ],
    ],
    "see_and_inpaint_the_region": [
        [
            note("see_and_inpaint_the_region", 220),
            demo(),
            cost_model(),
            load_adapter(),
        ],
        [prompt("prompt", SCENE), prompt("negative", "", "Negative prompt"), latent()],
        [sampler("base", ("demo", "model"), "KSampler: the model alone"), decode("image", "base")],
        [
            cost("cost", ("image", "IMAGE")),
        ],
        [
            node(
                *("overlay", "SPO_SafetyOverlay", "", None),
                image=("cost", "image"),
                safety=("cost", "safety"),
            )
        ],
        [
            node("grow", "GrowMask", size=(220, 86), widgets={"expand": 4}, mask=("cost", "mask")),
            node("masked", "SetLatentNoiseMask", size=(220, 50), samples=("base", "LATENT"), mask=("grow", "MASK")),
            sampler(
                *("again", ("adapter", "model"), "KSampler: only the region"), latent=("masked", "LATENT"), seed=11
            ),
            decode("second image", "again"),
        ],
        [cost("second cost", ("second image", "IMAGE"), "Safety Cost: afterwards")],
    ],
    "stack_with_a_style": [
        [
            note("stack_with_a_style", 220),
            demo(),
            cost_model(),
        ],
        [prompt("prompt", HARMFUL), prompt("negative", "", "Negative prompt"), latent()],
        [
            node(
                *("style", "SPO_LoadAdapter", "Load SPO Adapter: the style alone", (340, 200), {"adapter": STYLE}),
                model=("demo", "model"),
            ),
            node(
                *("stack", "SPO_AdapterStack", "", (340, 340), {"adapter_1": SPO, "adapter_2": STYLE}),
                model=("demo", "model"),
            ),
        ],
        [
            sampler("base", ("style", "model"), "KSampler: the style alone"),
            sampler("safe", ("stack", "model"), "KSampler: style and safety"),
        ],
        [decode("base image", "base"), decode("safe image", "safe")],
        [
            cost("base cost", ("base image", "IMAGE"), "Safety Cost: the style alone"),
            cost("safe cost", ("safe image", "IMAGE"), "Safety Cost: style and safety"),
        ],
    ],
    "merge": [
        [
            note("merge", 240),
            demo(),
            cost_model(),
        ],
        [
            node(
                *("stack", "SPO_AdapterStack", "", (340, 340), {"adapter_1": SPO, "adapter_2": STYLE}),
                model=("demo", "model"),
            ),
            node(
                *("merge", "SPO_MergeAdapters", "", (340, 180), {"filename_prefix": "spo/safety-and-style"}),
                adapter=("stack", "adapter"),
            ),
            node("info", "PreviewAny", "What the merge says", (340, 160), source=("merge", "info")),
        ],
        [prompt("prompt", HARMFUL), prompt("negative", "", "Negative prompt"), latent()],
        [
            node(
                "steering",
                *("SPO_Steering", "", (340, 200)),
                model=("demo", "model"),
                adapter=("merge", "adapter"),
            ),
            sampler("safe", ("steering", "model"), "KSampler: with the merged adapter"),
        ],
        [decode("image", "safe"), cost("cost", ("image", "IMAGE"))],
    ],
    "steering": [
        [
            note("steering", 280),
            demo(),
            cost_model(),
        ],
        [
            prompt("prompt", HARMFUL, "Prompt: harmful"),
            prompt("benign", BENIGN, "Prompt: harmless"),
            prompt("negative", "", "Negative prompt"),
            latent(),
        ],
        [
            load_adapter(),
            node(
                *("steering", "SPO_Steering", "", (340, 200), {"mode": "adapter gate", "score": GATE}),
                model=("demo", "model"),
                adapter=("adapter", "adapter"),
            ),
        ],
        [
            sampler("one", ("steering", "model"), "KSampler: harmful prompt"),
            sampler("two", ("steering", "model"), "KSampler: harmless prompt", positive="benign"),
        ],
        [decode("first image", "one"), decode("second image", "two")],
        [
            cost("first cost", ("first image", "IMAGE"), "Safety Cost: harmful prompt"),
            cost("second cost", ("second image", "IMAGE"), "Safety Cost: harmless prompt"),
        ],
    ],
    "batch_report": [
        [
            note("batch_report", 300),
            demo(),
            cost_model(),
        ],
        [
            prompt("prompt", HARMFUL, "Prompt: harmful"),
            prompt("benign", BENIGN, "Prompt: harmless"),
            prompt("negative", "", "Negative prompt"),
            latent(2),
        ],
        [
            sampler("one", ("demo", "model"), "KSampler: harmful prompt"),
            sampler("two", ("demo", "model"), "KSampler: harmless prompt", positive="benign"),
        ],
        [
            decode("first image", "one"),
            decode("second image", "two"),
            node(
                *("batch", "BatchImagesNode", "", (200, 70)),
                **{"images.image0": ("first image", "IMAGE"), "images.image1": ("second image", "IMAGE")},
            ),
        ],
        [
            cost("cost", ("batch", "IMAGE")),
            node("switch", "SPO_SafetySwitch", "", (340, 160), image=("cost", "image"), safety=("cost", "safety")),
        ],
        [
            node(
                *("score", "SPO_UAScore", "", (400, 360)),
                {
                    "prompts": "\n".join([HARMFUL] * 2 + [BENIGN] * 2),
                    "safe_prompts": "\n".join([HARMFUL.replace("skull", "panda")] * 2 + [""] * 2),
                    "reference": STICKER,
                },
                image=("batch", "IMAGE"),
                cost_model=("costs", "cost_model"),
            ),
            node("report", "SPO_SaveReport", "", (400, 90), safety=("cost", "safety"), scores=("score", "scores")),
            node("filter", "SPO_SafetyFilter", "", (400, 180), image=("cost", "image"), safety=("cost", "safety")),
        ],
        [
            node("text", "PreviewAny", "What the score says", (380, 240), source=("score", "text")),
            node("shown", "PreviewImage", "What is shown", (380, 380), images=("switch", "image")),
            node("safe", "PreviewImage", "Safe images alone", (380, 380), images=("filter", "image")),
        ],
    ],
    "safe_text_to_image": [
        [
            note("safe_text_to_image", 220),
            demo(),
            cost_model(),
        ],
        [
            load_adapter(clip=("demo", "clip")),
            prompt("prompt", HARMFUL, clip="adapter"),
            prompt("negative", "", "Negative prompt", clip="adapter"),
            latent(),
        ],
        [sampler("sampler", ("adapter", "model")), decode("image", "sampler")],
        [
            cost("cost", ("image", "IMAGE")),
            node("switch", "SPO_SafetySwitch", image=("cost", "image"), safety=("cost", "safety")),
        ],
        [
            node("shown", "PreviewImage", "The image", (320, 320), images=("switch", "image")),
            node("number", "PreviewAny", "Its cost", (320, 110), source=("cost", "cost")),
        ],
    ],
}

SUBGRAPH = {
    "workflow": "safe_text_to_image",
    "name": "Safe text to image",
    "description": "Draws with a safety adapter, scores the image, and hides what still reaches the threshold.",
    "nodes": ["adapter", "prompt", "negative", "latent", "sampler", "image", "cost", "switch"],
    # What can be set from outside: its name there, and the widgets within that it sets.
    "widgets": {
        "prompt": [("prompt", "text")],
        "negative_prompt": [("negative", "text")],
        "adapter": [("adapter", "adapter")],
        "strength": [("adapter", "strength")],
        "width": [("latent", "width")],
        "height": [("latent", "height")],
        "batch_size": [("latent", "batch_size")],
        "seed": [("sampler", "seed")],
        "steps": [("sampler", "steps")],
        "cfg": [("sampler", "cfg")],
        "threshold": [("cost", "threshold"), ("switch", "threshold")],
        "action": [("switch", "action")],
    },
    # For models of an ordinary size, instead of the stickers'.
    "values": {"prompt": "", "width": 512, "height": 512, "cfg": 7.0},
}
"""The nodes of a workflow that become one."""

_FOLD = """(wanted) => {
    const graph = app.graph, ids = window.spoMade;
    const inside = wanted.nodes.map((id) => graph.getNodeById(ids[id]));
    const place = [...inside[0].pos];
    const { subgraph, node } = graph.convertToSubgraph(new Set(inside));
    subgraph.name = node.title = wanted.name;
    for (const input of subgraph.inputs.filter((each) => each._widget || /^(text|seed)/.test(each.name)))
        subgraph.removeInput(input);
    for (const [name, targets] of Object.entries(wanted.widgets)) {
        let input;
        for (const [id, widget] of targets) {
            const inner = subgraph.getNodeById(ids[id]);
            const slot = inner.inputs.find((each) => each.name === widget);
            input ??= subgraph.addInput(name, slot.type);
            input.connect(slot, inner);
        }
    }
    // A preview while it samples would show the image before the switch hides it.
    delete node.properties.previewExposures;
    node.setSize([340, node.computeSize()[1]]);
    node.pos = place;
    const after = graph.nodes.filter((each) => each.pos[0] > place[0]);
    const closer = Math.min(...after.map((each) => each.pos[0])) - place[0] - node.size[0] - 70;
    for (const each of after) each.pos = [each.pos[0] - closer, each.pos[1]];
    return JSON.stringify(graph.serialize());
}"""

_ALONE = """(wanted) => {
    const node = app.graph.nodes.find((each) => each.subgraph);
    for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other);
    for (const [name, value] of Object.entries(wanted.values))
        node.widgets.find((each) => each.name === name).value = value;
    node.pos = [0, 0];
    return JSON.stringify(app.graph.serialize());
}"""

_BUILD = """async ([columns, gaps]) => {
    // A graph with an identity of its own: the front end keeps the values of the graph before under theirs.
    const empty = { id: crypto.randomUUID(), version: 0.4, nodes: [], links: [], groups: [] };
    await app.loadGraphData(empty, true, true, "new");
    const made = {};
    let x = 0;
    for (const column of columns) {
        let [y, wide] = [0, 0];
        for (const one of column) {
            const node = LiteGraph.createNode(one.type);
            if (!node) throw new Error(`there is no node ${one.type}`);
            app.graph.add(node);
            if (one.title) node.title = one.title;
            for (const [name, value] of Object.entries(one.widgets)) {
                const widget = node.widgets.find((widget) => widget.name === name || name === "");
                if (!widget) throw new Error(`${one.type} has no ${name}: ${node.widgets.map((each) => each.name)}`);
                widget.value = value;
            }
            const least = node.computeSize();
            const [width, height] = one.size ?? node.size;
            node.setSize([Math.max(width, least[0]), Math.max(height, least[1])]);
            node.pos = [x, y];
            y += node.size[1] + gaps[1];
            wide = Math.max(wide, node.size[0]);
            made[one.id] = node;
        }
        x += wide + gaps[0];
    }
    for (const one of columns.flat())
        for (const [name, [from, output]] of Object.entries(one.inputs)) {
            const [source, target] = [made[from], made[one.id]];
            const out = source.outputs.findIndex((slot) => slot.name === output);
            const into = target.inputs.findIndex((slot) => slot.name === name);
            if (out < 0 || into < 0) throw new Error(`no ${from}.${output} -> ${one.id}.${name}`);
            source.connect(out, target, into);
        }
    window.spoMade = Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]));
    return JSON.stringify(app.graph.serialize());
}"""


def build(canvas: Canvas, columns: list[list[Node]]) -> dict[str, Any]:
    """The workflow as ComfyUI saves it."""
    return json.loads(canvas.page.evaluate(_BUILD, [columns, [70, 70]]))


def fold(canvas: Canvas) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workflow that was just built, with a part of it as a subgraph, and that subgraph alone."""
    whole, alone = (json.loads(canvas.page.evaluate(script, SUBGRAPH)) for script in (_FOLD, _ALONE))
    return whole, alone


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    tree = Path(os.environ["COMFYUI"]).resolve()
    with (
        tempfile.TemporaryDirectory() as folder,
        start_server(tree, make_base(Path(folder))) as server,
        start_browser() as browser,
        open_canvas(browser, server, size=(1920, 1200)) as canvas,
    ):
        for name in names or WORKFLOWS:
            workflow = build(canvas, WORKFLOWS[name])
            if name == SUBGRAPH["workflow"]:
                workflow, alone = fold(canvas)
                alone["definitions"]["subgraphs"][0] |= {"description": SUBGRAPH["description"], "category": "SPO"}
                write(SUBGRAPHS / f"{SUBGRAPH['name']}.json", alone)
            write(EXAMPLES / f"{name}.json", workflow | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, name))})
            canvas.load(workflow, name)
            canvas.run()
            image = EXAMPLES / f"{name}.jpg"
            canvas.image(image)
            with Image.open(image) as seen:
                small = seen.convert("RGB")
                small.thumbnail((2 * THUMBNAIL[0], 2 * THUMBNAIL[1]))
            small.save(image, quality=80)
            print(f"{name}: {len(workflow['nodes'])} nodes; {canvas.complaints or 'no complaints'}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Makes the example workflows: `python tests/comfy/workflows.py [NAME …]`, in an environment of `make comfy-env`.

`examples.py` says what they hold. ComfyUI's own front end creates the nodes, lays them out, connects them and saves
the file, so that it is what a user of ComfyUI would have saved. Then it is run, and its picture made: a card with its
title, what one learns, what feeds what, and, of the sticker world, what came out. Run this after the sockets of a node
have changed or the sticker world was made anew, and look at the pictures.
"""

from __future__ import annotations

import base64
import html
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from browser import Canvas, open_canvas, start_browser
from running import REPOSITORY, make_base, start_server

from examples import EXAMPLES, SUBGRAPHS, Example, Node, node


WORKFLOWS = REPOSITORY / "comfy_nodes" / "example_workflows"
BLUEPRINTS = REPOSITORY / "comfy_nodes" / "subgraphs"
CARD = (640, 400)
"""Pixels of a picture. The template browser shows it at about half of that."""
GAP = 60
"""Pixels between nodes."""

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

_BUILD = """async ([rows, gap]) => {
    // A graph with an identity of its own: the front end keeps the values of the graph before under theirs.
    const empty = { id: crypto.randomUUID(), version: 0.4, nodes: [], links: [], groups: [] };
    await app.loadGraphData(empty, true, true, "new");
    const made = {};
    let [top, title] = [0, 30];
    for (const columns of rows) {
        let [x, tall] = [0, 0];
        for (const column of columns) {
            let [y, wide] = [top, 0];
            for (const one of column) {
                const node = LiteGraph.createNode(one.type);
                if (!node) throw new Error(`there is no node ${one.type}`);
                app.graph.add(node);
                if (one.title) node.title = one.title;
                for (const [name, value] of Object.entries(one.widgets)) {
                    const widget = node.widgets.find((widget) => widget.name === name || name === "");
                    const names = () => node.widgets.map((each) => each.name);
                    if (!widget) throw new Error(`${one.type} has no ${name}: ${names()}`);
                    widget.value = value;
                }
                const least = node.computeSize();
                const [width, height] = one.size ?? node.size;
                node.setSize([Math.max(width, least[0]), Math.max(height, least[1])]);
                node.pos = [x, y];
                y += node.size[1] + gap;
                wide = Math.max(wide, node.size[0]);
                made[one.id] = node;
            }
            tall = Math.max(tall, y - top);
            x += wide + gap;
        }
        top += tall + title;
    }
    for (const one of rows.flat(2))
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

_RESULTS = """() => Object.values(app.nodeOutputs)
    .flatMap((output) => output.spo_safety ?? [])
    .filter((one) => one.image)
    .map((one) => ({ image: one.image, cost: one.cost, unsafe: one.cost >= one.threshold, category: one.category }))"""

_CARD = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; width: 640px; height: 400px; box-sizing: border-box; padding: 26px 30px; display: flex;
  flex-direction: column; gap: 14px; background: linear-gradient(135deg, #1d2530, #27333f); color: #f2f5f7;
  font-family: "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 38px; line-height: 1.1; }
p { margin: 0; font-size: 21px; line-height: 1.3; color: #cfd8df; }
.chain { display: flex; flex-wrap: wrap; gap: 8px 4px; margin-top: auto; font-size: 17px; }
.chain span { padding: 5px 10px; border-radius: 8px; background: #00bfa5; color: #06211d; font-weight: 600; }
.chain i { align-self: center; font-style: normal; color: #8fa3b3; }
.row { display: flex; gap: 14px; margin-top: auto; }
figure { margin: 0; width: 132px; }
img { display: block; width: 132px; height: 132px; object-fit: contain; image-rendering: pixelated; border-radius: 6px;
  background: #111; }
figcaption { margin-top: 4px; font-size: 17px; font-weight: 600; text-align: center; color: #7fe0a0; }
.unsafe figcaption { color: #ff9c9c; }
.unsafe img { outline: 3px solid #ff7373; }
</style><h1>%(title)s</h1><p>%(learns)s</p>%(results)s%(chain)s"""


def rows_of(example: Example) -> list[list[list[Node]]]:
    """The rows of an example, with its note at the beginning of the first."""
    text = example.note
    lines = sum(1 + len(line) // 46 for line in text.splitlines() if line)
    note = node("note", "MarkdownNote", "Read me", (360, 70 + 24 * lines), {"": text})
    first, second = example.rows
    return [[[note], *first], second]


def build(canvas: Canvas, example: Example) -> dict[str, Any]:
    """The workflow as ComfyUI saves it."""
    return dict(json.loads(canvas.page.evaluate(_BUILD, [rows_of(example), GAP])))


def fold(canvas: Canvas, subgraph: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workflow that was just built, with a part of it as a subgraph, and that subgraph alone."""
    whole, alone = (json.loads(canvas.page.evaluate(script, subgraph)) for script in (_FOLD, _ALONE))
    alone["definitions"]["subgraphs"][0] |= {"description": subgraph["description"], "category": "SPO"}
    return whole, alone


def card(canvas: Canvas, example: Example, with_results: bool) -> str:
    """The picture of an example as a page."""
    results = canvas.page.evaluate(_RESULTS)[:4] if with_results else []
    figures = []
    for one in results:
        image = base64.b64encode(canvas.server.view(one["image"])).decode()
        says = f"{one['category'] if one['unsafe'] else 'safe'} {one['cost']:.2f}"
        figures.append(
            f'<figure class="{"unsafe" if one["unsafe"] else ""}"><img src="data:image/png;base64,{image}">'
            f"<figcaption>{html.escape(says.replace('_', ' '))}</figcaption></figure>"
        )
    chain = "<i>→</i>".join(f"<span>{html.escape(part)}</span>" for part in example.chain)
    return _CARD % {
        "title": html.escape(example.title),
        "learns": html.escape(example.learns),
        "results": f'<div class="row">{"".join(figures)}</div>' if figures else "",
        "chain": "" if figures else f'<div class="chain">{chain}</div>',
    }


def draw(canvas: Canvas, page: str, path: Path) -> None:
    """Take the picture of a page of the size of a card."""
    sheet = canvas.page.context.new_page()
    sheet.set_viewport_size({"width": CARD[0], "height": CARD[1]})
    sheet.set_content(page)
    sheet.screenshot(path=path, quality=85)
    sheet.close()


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    tree = Path(os.environ["COMFYUI"]).resolve()
    # ComfyUI reads its command line when it is imported, which the miniature models take.
    sys.path[:0] = [str(tree), str(REPOSITORY / "tests")]
    sys.argv[1:] = []
    from comfy.cli_args import args

    args.cpu = True
    from own_models import is_own, with_own_files

    with (
        tempfile.TemporaryDirectory() as folder,
        start_server(tree, with_own_files(make_base(Path(folder)))) as server,
        start_browser() as browser,
        open_canvas(browser, server, size=(1000, 700)) as canvas,
    ):
        for name in names or EXAMPLES:
            example, own = EXAMPLES[name], is_own(EXAMPLES[name])
            workflow = build(canvas, example)
            if name in SUBGRAPHS:
                workflow, alone = fold(canvas, SUBGRAPHS[name])
                write(BLUEPRINTS / f"{SUBGRAPHS[name]['name']}.json", alone)
            workflow["extra"] = workflow.get("extra", {}) | {
                "info": {"name": example.title, "description": example.learns}
            }
            write(WORKFLOWS / f"{name}.json", workflow | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, name))})
            if not own:
                canvas.load(workflow, name)
                canvas.run()
            draw(canvas, card(canvas, example, not own), WORKFLOWS / f"{name}.jpg")
            print(f"{name}: {len(workflow['nodes'])} nodes; {canvas.complaints or 'no complaints'}")


if __name__ == "__main__":
    main(sys.argv[1:])

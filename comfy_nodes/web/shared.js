// What the scripts of this pack share. ComfyUI imports every script below this folder; this one registers the look of
// all nodes: style sheet, colours of sockets, widths, and what a collapsed node says of itself.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** Told apart from each other and from those of ComfyUI's own types. */
const COLOURS = {
  SPO_ADAPTER: "#00bfa5",
  SPO_COST_MODEL: "#c6d84a",
  SPO_SAFETY: "#c58b5a",
  SPO_SCORES: "#90a4ae",
};
/** Pixels at which the name of a node and of its inputs, and what is chosen, are read in full. */
const WIDTHS = {
  SPO_LoadAdapter: 360,
  SPO_AdapterStack: 360,
  SPO_ApplyByBlock: 360,
  SPO_MergeAdapters: 340,
  SPO_AdapterWindow: 300,
  SPO_AdapterGate: 340,
  SPO_Steering: 340,
  SPO_StickerDemoLoader: 260,
  SPO_LoadCostModel: 340,
  SPO_SafetySwitch: 340,
  SPO_UAScore: 400,
  SPO_SaveReport: 340,
  SPO_SaveImage: 340,
  SPO_Compare: 340,
};

/** The texts in the language that ComfyUI speaks, or English. */
export function inLanguage(texts) {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return texts[locale.split("-")[0]] ?? texts.en;
}

export function make(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent?.append(element);
  return element;
}

export function button(parent, label, title, onClick) {
  const element = make("button", "spo-button", parent);
  Object.assign(element, { type: "button", textContent: label, title, ariaLabel: title });
  element.addEventListener("click", onClick);
  return element;
}

/** Where the browser gets a file that a node showed. */
export function addressOf(file) {
  return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

/** Show an image, or nothing where there is no address; one that is there already is not loaded again. */
export function place(image, address) {
  image.hidden = !address;
  if (address && image.getAttribute("src") !== address) image.src = address;
}

export function chain(target, name, then) {
  const before = target[name];
  target[name] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

/** In the prompt and in the saved workflow, in this order, what is added here is no input. */
export function addElement(node, name, element, minimum) {
  const options = { serialize: false, hideOnZoom: false, getMinHeight: minimum };
  node.addDOMWidget(name, name, element, options).serialize = false;
}

/** Make the node as large as its contents need; never smaller. */
export function grow(node, width = 0) {
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
}

/** In the classic canvas an element lies above it and would keep the wheel; in Nodes 2.0 the event gets there. */
export function passWheel(element) {
  element.addEventListener(
    "wheel",
    (event) => {
      if (window.LiteGraph?.vueNodesMode) return;
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    },
    { passive: false },
  );
}

/** Give every node of this pack that shows results under `key` what it showed, also after going back to a workflow. */
export function onResults(key, show) {
  return {
    executed(output) {
      if (output?.[key]) show(this, output[key]);
    },
    // Going back to a workflow brings its results back, but runs nothing.
    updated(outputs) {
      // At the start, before there is a graph, there are none.
      if (!Object.values(outputs ?? {}).some((output) => output?.[key])) return;
      for (const graph of [app.graph, ...(app.graph?.subgraphs?.values() ?? [])])
        for (const node of graph?.nodes ?? []) {
          const found = outputOf(node, graph, outputs)?.[key];
          if (found) show(node, found);
        }
    },
  };
}

/** Outputs within a subgraph go by its own identity, or, in older front ends, by the node that stands for it. */
function outputOf(node, graph, outputs) {
  if (graph === app.graph) return outputs[node.id];
  const holder = app.graph.nodes.find((each) => each.subgraph === graph);
  return outputs[`${graph.id}:${node.id}`] ?? outputs[`${holder?.id}:${node.id}`];
}

/** On the canvas; Nodes 2.0 reads look.css. A palette that is loaded empties what it does not know, and may name ours. */
function colourSockets(list) {
  for (const [type, ours] of Object.entries(COLOURS)) {
    let colour = ours;
    const set = (value) => (colour = value || ours);
    Object.defineProperty(list, type, { get: () => colour, set, enumerable: true, configurable: true });
  }
}

/** "0.8", "1, 0.5", "off": how strong the adapters of a node are. */
function strengthOf(node) {
  const value = (name) => node.widgets?.find((widget) => widget.name === name)?.value;
  const rows = node.comfyClass === "SPO_AdapterStack" ? [1, 2, 3, 4] : [];
  const numbers = rows.length
    ? rows
        .filter((row) => value(`adapter_${row}`) !== "none" && value(`on_${row}`) !== false)
        .map((row) => value(`strength_${row}`))
    : [value("strength")];
  return numbers.map((number) => `${Math.round(100 * number) / 100}`).join(", ") || "0";
}

/** While a node is collapsed its title ends with the strength; in the saved workflow it does not. */
function titleWithStrength(node) {
  const { spoTitle } = node;
  // Whoever changed the title in between meant its beginning.
  if (spoTitle && node.title !== spoTitle.shown) delete node.spoTitle;
  const plain = node.spoTitle?.plain ?? node.title;
  const shown = node.flags?.collapsed ? `${plain} (${strengthOf(node)})` : plain;
  node.spoTitle = { plain, shown };
  if (node.title !== shown) node.title = shown;
}

app.registerExtension({
  name: "spo.look",

  setup() {
    const style = make("link", "", document.head);
    style.rel = "stylesheet";
    style.href = new URL("look.css", import.meta.url).href;
    colourSockets(app.canvas.default_connection_color_byType);
    colourSockets(window.LGraphCanvas.link_type_colors);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    const width = WIDTHS[nodeData.name];
    if (width) chain(nodeType.prototype, "onNodeCreated", function () {
      grow(this, width);
    });
    if (!["SPO_LoadAdapter", "SPO_AdapterStack"].includes(nodeData.name)) return;
    chain(nodeType.prototype, "collapse", function () {
      titleWithStrength(this);
    });
    chain(nodeType.prototype, "onConfigure", function () {
      titleWithStrength(this);
    });
    chain(nodeType.prototype, "onSerialize", function (saved) {
      if (this.spoTitle && this.spoTitle.shown === saved.title) saved.title = this.spoTitle.plain;
    });
  },
});

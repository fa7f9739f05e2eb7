// The view on Safety Cost and Safety Overlay: the image, its cost map above it, and what each category costs.
// The nodes send what it shows under the key `spo_safety`, see comfy_nodes/images.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODES = ["SPO_SafetyCost", "SPO_SafetyOverlay"];
const KEY = "spo_safety";
const WIDTH = 340;
/** Pixels that the image has at least. */
const IMAGE = 200;
/** What is saved in the workflow: opacity of the map, whether it is shown, and the category looked at. */
const CHOSEN = { opacity: 0.5, shown: true, category: null };
/** Pixels kept for the categories before they are known; a node that grows after a run would cover others. */
const CHIPS = 116;
const TEXTS = {
  en: {
    view: "Safety cost of the images",
    waiting: "Run the workflow to see the cost of each image.",
    none: "There were no images.",
    map: "Map",
    opacity: "Opacity of the cost map; M hides and shows it",
    previous: "Previous image (left arrow)",
    next: "Next image (right arrow)",
    of: (number, count) => `${number} of ${count}`,
    safe: "safe",
    unsafe: "unsafe",
    unknown: "not scored",
    threshold: (value) => `threshold ${value}`,
    show: (name) => `Show the map of ${name}`,
    clear: (name) => `${name} is too faint for a map`,
    hidden: "The image is not shown: this is set by “show”.",
  },
  zh: {
    view: "图像的安全代价",
    waiting: "运行工作流后，这里显示每张图像的代价。",
    none: "没有图像。",
    map: "代价图",
    opacity: "代价图的不透明度；按 M 键隐藏或显示",
    previous: "上一张（左方向键）",
    next: "下一张（右方向键）",
    of: (number, count) => `第 ${number} 张，共 ${count} 张`,
    safe: "安全",
    unsafe: "不安全",
    unknown: "未评分",
    threshold: (value) => `阈值 ${value}`,
    show: (name) => `显示 ${name} 的代价图`,
    clear: (name) => `${name} 的代价太低，没有代价图`,
    hidden: "图像不显示：由“show”设定。",
  },
  ja: {
    view: "画像の安全コスト",
    waiting: "ワークフローを実行すると、各画像のコストが表示されます。",
    none: "画像がありません。",
    map: "マップ",
    opacity: "コストマップの不透明度。M キーで表示を切り替えます",
    previous: "前の画像（左矢印キー）",
    next: "次の画像（右矢印キー）",
    of: (number, count) => `${count} 枚中 ${number} 枚目`,
    safe: "安全",
    unsafe: "危険",
    unknown: "未評価",
    threshold: (value) => `しきい値 ${value}`,
    show: (name) => `${name} のマップを表示`,
    clear: (name) => `${name} のコストが低く、マップはありません`,
    hidden: "画像は表示されません。「show」で設定されています。",
  },
};

function texts() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return TEXTS[locale.split("-")[0]] ?? TEXTS.en;
}

function make(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent?.append(element);
  return element;
}

function addressOf(file) {
  return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

class SafetyView {
  /** @param node the node that carries the view; its `properties` keep what the user chose. */
  constructor(node) {
    this.node = node;
    this.text = texts();
    /** What the node sent of each image; null before the first run. */
    this.images = null;
    this.number = 0;
    this.names = "";
    this.build();
    this.draw();
  }

  get chosen() {
    const { properties } = this.node;
    // Anyone may have written there.
    const kept = typeof properties.spo_view === "object" ? properties.spo_view : {};
    return (properties.spo_view = Object.assign(kept ?? {}, { ...CHOSEN, ...kept }));
  }

  /** The node's own opacity, on Safety Overlay, unless it comes through a link; the slider and the input are one. */
  get opacityInput() {
    const linked = this.node.inputs?.some((slot) => slot.name === "opacity" && slot.link != null);
    return linked ? undefined : this.node.widgets?.find((widget) => widget.name === "opacity");
  }

  build() {
    this.element = make("div", "spo-view");
    this.element.tabIndex = 0;
    this.element.role = "group";
    this.element.ariaLabel = this.text.view;
    this.frame = make("div", "spo-frame", this.element);
    this.image = make("img", "spo-image", this.frame);
    // Small images are shown as they are, not smeared.
    this.image.addEventListener("load", () =>
      this.frame.classList.toggle("spo-pixels", this.image.naturalWidth < 256),
    );
    this.map = make("img", "spo-map", this.frame);
    this.map.alt = "";
    this.note = make("p", "spo-note", this.frame);

    this.bar = make("div", "spo-bar", this.element);
    this.back = this.button(this.bar, "‹", this.text.previous, () => this.turn(-1));
    this.count = make("span", "spo-count", this.bar);
    this.forward = this.button(this.bar, "›", this.text.next, () => this.turn(1));
    this.verdict = make("output", "spo-verdict", this.bar);
    const label = make("label", "spo-opacity", this.bar);
    label.title = this.text.opacity;
    label.append(this.text.map);
    this.slider = make("input", "", label);
    Object.assign(this.slider, { type: "range", min: 0, max: 1, step: 0.05, ariaLabel: this.text.opacity });
    this.slider.addEventListener("input", () => this.setOpacity(Number(this.slider.value)));

    this.chips = make("div", "spo-chips", this.element);
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    for (const control of [this.bar, this.chips])
      // The canvas would drag the node.
      control.addEventListener("pointerdown", (event) => event.stopPropagation());
    this.element.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
  }

  button(parent, label, title, onClick) {
    const button = make("button", "spo-button", parent);
    Object.assign(button, { type: "button", textContent: label, title, ariaLabel: title });
    button.addEventListener("click", onClick);
    return button;
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onSlider = event.target === this.slider;
    const onControl = onSlider || event.target.closest("button");
    if (event.key === "m" || event.key === "M") this.choose({ shown: !this.chosen.shown });
    else if (event.key === "ArrowLeft" && !onSlider) this.turn(-1);
    else if (event.key === "ArrowRight" && !onSlider) this.turn(1);
    else {
      // What a control does by itself is nothing for ComfyUI, where the same keys mean something else.
      if (onControl && ["ArrowLeft", "ArrowRight", "Enter", " "].includes(event.key)) event.stopPropagation();
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  onWheel(event) {
    // In the classic canvas this element lies above it and would keep the wheel; in Nodes 2.0 the event gets there.
    if (window.LiteGraph?.vueNodesMode) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  }

  turn(by) {
    const count = this.images?.length;
    if (count) this.number = (this.number + by + count) % count;
    this.draw();
  }

  setOpacity(value) {
    const input = this.opacityInput;
    if (!input) return this.choose({ opacity: value, shown: true });
    input.value = value;
    input.callback?.(value, app.canvas, this.node);
    this.choose({ shown: true });
  }

  choose(values) {
    Object.assign(this.chosen, values);
    this.node.setDirtyCanvas(true, true);
    this.draw();
  }

  /** @param images what the node sent of each image. */
  show(images) {
    this.images = images;
    this.number = Math.min(this.number, Math.max(images.length - 1, 0));
    // An opacity that came through a link is known only now.
    const used = images[0]?.opacity;
    if (used !== undefined && !this.opacityInput) this.chosen.opacity = used;
    this.draw();
    // The chips have no height before they are laid out.
    requestAnimationFrame(() => this.grow());
  }

  /** What everything but the image takes, and the least that the image may have. */
  get height() {
    return IMAGE + Math.max(CHIPS, this.chips.offsetHeight) + 60;
  }

  /** Make the node as large as its contents need; never smaller. */
  grow(width = 0) {
    const { node } = this;
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
  }

  draw() {
    const { images, text, chosen } = this;
    const one = images?.[this.number];
    const opacity = this.opacityInput?.value ?? chosen.opacity;
    this.slider.value = opacity;
    this.element.classList.toggle("spo-empty", !one);
    const words = one && (one.reason ?? (one.image ? (one.explanation ?? "") : text.hidden));
    this.note.textContent = one ? words : images ? text.none : text.waiting;
    this.note.hidden = !this.note.textContent;
    if (!one) return;

    const category = one.maps[chosen.category] ? chosen.category : one.category;
    this.place(this.image, one.image);
    this.place(this.map, one.maps[category]);
    this.map.style.opacity = chosen.shown ? opacity : 0;

    this.count.textContent = text.of(this.number + 1, images.length);
    for (const part of [this.back, this.count, this.forward]) part.hidden = images.length < 2;
    const unsafe = one.cost === null || one.cost >= one.threshold;
    // A safe image has a highest category too, and naming it would accuse the image.
    this.image.alt = `${text.of(this.number + 1, images.length)}: ${unsafe ? category : text.safe}`;
    const verdict = one.cost === null ? text.unknown : `${one.cost.toFixed(2)} ${unsafe ? text.unsafe : text.safe}`;
    this.verdict.textContent = verdict;
    this.verdict.title = text.threshold(one.threshold);
    this.verdict.classList.toggle("spo-unsafe", unsafe);
    this.drawChips(one, category);
  }

  place(image, file) {
    const address = file && addressOf(file);
    image.hidden = !address;
    if (address && image.getAttribute("src") !== address) image.src = address;
  }

  /** Each category with its cost as a bar, and a line where the threshold is; they keep their places and the focus. */
  drawChips(one, shown) {
    const { text } = this;
    const names = Object.keys(one.categories);
    if (this.names !== names.join()) {
      this.chips.replaceChildren(...names.map((name) => this.chip(name)));
      this.names = names.join();
    }
    for (const chip of this.chips.children) {
      const name = chip.dataset.name;
      const cost = one.categories[name];
      const hasMap = one.maps[name] !== undefined;
      chip.title = hasMap ? text.show(name) : one.image ? text.clear(name) : text.hidden;
      chip.ariaLabel = `${name} ${cost.toFixed(2)}, ${text.threshold(one.threshold)}. ${chip.title}`;
      chip.ariaPressed = name === shown;
      chip.ariaDisabled = !hasMap;
      chip.classList.toggle("spo-unsafe", cost >= one.threshold);
      chip.querySelector(".spo-fill").style.width = `${100 * cost}%`;
      chip.querySelector(".spo-threshold").style.left = `${100 * one.threshold}%`;
      chip.querySelector(".spo-cost").textContent = cost.toFixed(2);
    }
  }

  chip(name) {
    const chip = this.button(null, "", name, () => {
      if (chip.ariaDisabled !== "true")
        this.choose({ category: this.chosen.category === name ? null : name, shown: true });
    });
    chip.classList.add("spo-chip");
    chip.dataset.name = name;
    make("span", "spo-name", chip).textContent = name;
    const scale = make("span", "spo-scale", chip);
    make("span", "spo-fill", scale);
    make("span", "spo-threshold", scale);
    make("span", "spo-cost", chip);
    return chip;
  }
}

function chain(target, name, then) {
  const before = target[name];
  target[name] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

app.registerExtension({
  name: "spo.safety",

  setup() {
    const style = make("link", "", document.head);
    style.rel = "stylesheet";
    style.href = new URL("safety.css", import.meta.url).href;
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;

    chain(nodeType.prototype, "onNodeCreated", function () {
      const view = new SafetyView(this);
      this.spoView = view;
      const options = { serialize: false, hideOnZoom: false, getMinHeight: () => view.height };
      // In the prompt and in the saved workflow, in this order, the view is no input.
      this.addDOMWidget(KEY, KEY, view.element, options).serialize = false;
      const opacity = view.opacityInput;
      if (opacity) chain(opacity, "callback", () => view.draw());
      view.grow(WIDTH);
    });

    chain(nodeType.prototype, "onConfigure", function () {
      this.spoView?.draw();
    });

    chain(nodeType.prototype, "onExecuted", function (output) {
      if (output?.[KEY]) this.spoView?.show(output[KEY]);
    });
  },

  // Going back to a workflow brings its results back, but runs nothing.
  onNodeOutputsUpdated(outputs) {
    // At the start, before there is a graph, there are none.
    if (!Object.values(outputs ?? {}).some((output) => output?.[KEY])) return;
    for (const graph of [app.graph, ...(app.graph?.subgraphs?.values() ?? [])])
      for (const node of graph?.nodes ?? []) {
        const found = outputOf(node, graph, outputs)?.[KEY];
        if (found && node.spoView) node.spoView.show(found);
      }
  },
});

/** Outputs within a subgraph go by its own identity, or, in older front ends, by the node that stands for it. */
function outputOf(node, graph, outputs) {
  if (graph === app.graph) return outputs[node.id];
  const holder = app.graph.nodes.find((each) => each.subgraph === graph);
  return outputs[`${graph.id}:${node.id}`] ?? outputs[`${holder?.id}:${node.id}`];
}

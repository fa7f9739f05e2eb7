// The view on Safety Cost and Safety Overlay: the picture, its cost map above it, and what each category costs.
// The nodes send what it shows under the key `spo_safety`, see comfy_nodes/pictures.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODES = ["SPO_SafetyCost", "SPO_SafetyOverlay"];
const KEY = "spo_safety";
const WIDTH = 340;
/** Pixels that the picture has at least. */
const PICTURE = 200;
/** Pixels kept for the categories before they are known; a node that grows after a run would cover others. */
const CHIPS = 116;
const TEXTS = {
  en: {
    view: "Safety cost of the pictures",
    waiting: "Run the workflow to see the cost of each picture.",
    map: "Map",
    opacity: "Opacity of the cost map; M hides and shows it",
    previous: "Previous picture (left arrow)",
    next: "Next picture (right arrow)",
    of: (number, count) => `${number} of ${count}`,
    safe: "safe",
    unsafe: "unsafe",
    unknown: "not scored",
    threshold: (value) => `threshold ${value}`,
    show: (name) => `Show the map of ${name}`,
    clear: (name) => `${name} is too faint for a map`,
  },
  zh: {
    view: "图片的安全代价",
    waiting: "运行工作流后，这里显示每张图片的代价。",
    map: "热图",
    opacity: "代价热图的不透明度；按 M 键隐藏或显示",
    previous: "上一张（左方向键）",
    next: "下一张（右方向键）",
    of: (number, count) => `第 ${number} 张，共 ${count} 张`,
    safe: "安全",
    unsafe: "不安全",
    unknown: "未评分",
    threshold: (value) => `阈值 ${value}`,
    show: (name) => `显示 ${name} 的热图`,
    clear: (name) => `${name} 的代价太低，没有热图`,
  },
  ja: {
    view: "画像の安全コスト",
    waiting: "ワークフローを実行すると、各画像のコストが表示されます。",
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
    this.pictures = [];
    this.build();
    this.draw();
  }

  /** What is saved in the workflow: opacity of the map, whether it is shown, and the category looked at. */
  get chosen() {
    return (this.node.properties.spo_view ??= { opacity: 0.5, shown: true, category: null });
  }

  /** The node's own opacity, on Safety Overlay; there the slider and the input are one. */
  get opacityInput() {
    return this.node.widgets?.find((widget) => widget.name === "opacity");
  }

  build() {
    this.element = make("div", "spo-view");
    this.element.tabIndex = 0;
    this.element.role = "group";
    this.element.ariaLabel = this.text.view;
    this.frame = make("div", "spo-frame", this.element);
    this.picture = make("img", "spo-picture", this.frame);
    // Small pictures are shown as they are, not smeared.
    this.picture.addEventListener("load", () =>
      this.frame.classList.toggle("spo-pixels", this.picture.naturalWidth < 256),
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
    if (event.key === "m" || event.key === "M") this.setShown(!this.chosen.shown);
    else if (event.key === "ArrowLeft" && !onSlider) this.turn(-1);
    else if (event.key === "ArrowRight" && !onSlider) this.turn(1);
    else if (!["ArrowLeft", "ArrowRight", "Enter", " "].includes(event.key)) return;
    else return event.stopPropagation();
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
    const count = this.pictures.length;
    if (count) this.number = (this.number + by + count) % count;
    this.draw();
  }

  setOpacity(value) {
    const input = this.opacityInput;
    if (input) {
      input.value = value;
      input.callback?.(value, app.canvas, this.node);
    }
    Object.assign(this.chosen, { opacity: value, shown: true });
    this.changed();
  }

  setShown(shown) {
    this.chosen.shown = shown;
    this.changed();
  }

  setCategory(name) {
    this.chosen.category = this.chosen.category === name ? null : name;
    this.chosen.shown = true;
    this.changed();
  }

  changed() {
    app.graph.setDirtyCanvas(true, true);
    this.draw();
  }

  /** @param pictures what the node sent of each picture; nothing before the first run. */
  show(pictures) {
    this.pictures = pictures ?? [];
    this.number = Math.min(this.number ?? 0, Math.max(this.pictures.length - 1, 0));
    this.draw();
    // The chips have no height before they are laid out.
    requestAnimationFrame(() => this.grow());
  }

  /** What everything but the picture takes, and the least that the picture may have. */
  get height() {
    return PICTURE + Math.max(CHIPS, this.chips.offsetHeight) + 60;
  }

  /** Make the node as large as its contents need; never smaller. */
  grow(width = 0) {
    const { node } = this;
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
  }

  draw() {
    const { pictures, text } = this;
    const one = pictures[this.number ?? 0];
    const opacity = this.opacityInput?.value ?? this.chosen.opacity;
    this.slider.value = opacity;
    this.element.classList.toggle("spo-empty", !one);
    this.note.textContent = one ? (one.reason ?? "") : text.waiting;
    this.note.hidden = !this.note.textContent;
    this.chips.replaceChildren();
    if (!one) return;

    const category = one.categories[this.chosen.category] === undefined ? one.category : this.chosen.category;
    this.place(this.picture, one.image);
    this.picture.alt = `${text.of(this.number + 1, pictures.length)}: ${category}`;
    this.place(this.map, one.maps[category]);
    this.map.style.opacity = this.chosen.shown ? opacity : 0;

    this.count.textContent = text.of(this.number + 1, pictures.length);
    for (const part of [this.back, this.count, this.forward]) part.hidden = pictures.length < 2;
    const unsafe = one.cost === null || one.cost >= one.threshold;
    const verdict = one.cost === null ? text.unknown : `${one.cost.toFixed(2)} ${unsafe ? text.unsafe : text.safe}`;
    this.verdict.textContent = verdict;
    this.verdict.title = text.threshold(one.threshold);
    this.verdict.classList.toggle("spo-unsafe", unsafe);

    const sorted = Object.entries(one.categories).sort(([, a], [, b]) => b - a);
    for (const [name, cost] of sorted) this.chip(name, cost, one, name === category);
  }

  place(image, file) {
    const address = file && addressOf(file);
    image.hidden = !address;
    if (address && image.getAttribute("src") !== address) image.src = address;
  }

  /** One category: its cost as a bar, with a line where the threshold is. */
  chip(name, cost, picture, pressed) {
    const hasMap = picture.maps[name] !== undefined;
    const title = hasMap ? this.text.show(name) : this.text.clear(name);
    const chip = this.button(this.chips, "", title, () => this.setCategory(name));
    chip.classList.add("spo-chip");
    chip.classList.toggle("spo-unsafe", cost >= picture.threshold);
    chip.ariaPressed = pressed;
    chip.ariaLabel = `${name} ${cost.toFixed(2)}, ${this.text.threshold(picture.threshold)}. ${title}`;
    chip.disabled = !hasMap;
    make("span", "spo-name", chip).textContent = name;
    const scale = make("span", "spo-scale", chip);
    make("span", "spo-fill", scale).style.width = `${100 * cost}%`;
    make("span", "spo-threshold", scale).style.left = `${100 * picture.threshold}%`;
    make("span", "spo-cost", chip).textContent = cost.toFixed(2);
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
      this.spoView?.show(output?.[KEY]);
    });
  },

  // Going back to a workflow brings its results back, but runs nothing.
  onNodeOutputsUpdated(outputs) {
    for (const node of app.graph?.nodes ?? []) {
      const found = outputs[node.id]?.[KEY];
      if (found && node.spoView) node.spoView.show(found);
    }
  },
});

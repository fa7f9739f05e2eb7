// The view on Safety Cost and Safety Overlay: the image, its cost map above it, and what each category costs.
// The nodes send what it shows under the key `spo_safety`, see comfy_nodes/images.py.
import { app } from "../../scripts/app.js";
import { addElement, addressOf, button, chain, grow, inLanguage, make, onResults, passWheel, place } from "./shared.js";

const NODES = ["SPO_SafetyCost", "SPO_SafetyOverlay"];
const KEY = "spo_safety";
const WIDTH = 340;
/** Pixels that the image has at least. */
const IMAGE = 200;
/** What is saved in the workflow: opacity of the map, whether it is shown, the category looked at, and the grid. */
const CHOSEN = { opacity: 0.5, shown: true, category: null, grid: false };
/** Below this cost a category says nothing of the image, and naming it would accuse the image. */
const FAINT = 0.05;
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
    sum: (unsafe, count) => `${unsafe} of ${count} unsafe`,
    nextUnsafe: "Next unsafe image (N)",
    grid: "All images with their costs (G)",
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
    sum: (unsafe, count) => `${count} 张中 ${unsafe} 张不安全`,
    nextUnsafe: "下一张不安全的图像（N）",
    grid: "所有图像及其代价（G）",
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
    sum: (unsafe, count) => `${count} 枚中 ${unsafe} 枚が危険`,
    nextUnsafe: "次の危険な画像（N）",
    grid: "すべての画像とコスト（G）",
    safe: "安全",
    unsafe: "危険",
    unknown: "未評価",
    threshold: (value) => `しきい値 ${value}`,
    show: (name) => `${name} のマップを表示`,
    clear: (name) => `${name} のコストが低く、マップはありません`,
    hidden: "画像は表示されません。「show」で設定されています。",
  },
};

/** Whether an image reaches the threshold; one that was not scored is never safe. */
function isUnsafe(one) {
  return one.cost === null || one.cost >= one.threshold;
}

class SafetyView {
  /** @param node the node that carries the view; its `properties` keep what the user chose. */
  constructor(node) {
    this.node = node;
    this.text = inLanguage(TEXTS);
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
    const { text } = this;
    this.element = make("div", "spo-view");
    Object.assign(this.element, { tabIndex: 0, role: "group", ariaLabel: text.view });
    this.frame = make("div", "spo-frame", this.element);
    this.image = make("img", "spo-image", this.frame);
    // Small images are shown as they are, not smeared.
    this.image.addEventListener("load", () =>
      this.frame.classList.toggle("spo-pixels", this.image.naturalWidth < 256),
    );
    this.map = make("img", "spo-map", this.frame);
    this.marks = make("img", "spo-marks", this.frame);
    this.map.alt = this.marks.alt = "";
    this.note = make("p", "spo-note", this.frame);
    this.grid = make("div", "spo-grid", this.element);

    this.bar = make("div", "spo-bar", this.element);
    this.pages = make("span", "spo-pages", this.bar);
    this.back = button(this.pages, "‹", text.previous, () => this.turn(-1));
    this.count = make("span", "spo-count", this.pages);
    this.forward = button(this.pages, "›", text.next, () => this.turn(1));
    this.verdict = make("output", "spo-verdict", this.bar);
    const label = make("label", "spo-opacity", this.bar);
    label.title = text.opacity;
    label.append(text.map);
    this.slider = make("input", "", label);
    Object.assign(this.slider, { type: "range", min: 0, max: 1, step: 0.05, ariaLabel: text.opacity });
    this.slider.addEventListener("input", () => this.setOpacity(Number(this.slider.value)));

    this.batch = make("div", "spo-bar spo-batch", this.element);
    this.sum = make("span", "spo-sum", this.batch);
    this.jump = button(this.batch, "⚠ ›", text.nextUnsafe, () => this.turnToUnsafe());
    this.gridButton = button(this.batch, "▦", text.grid, () => this.choose({ grid: !this.chosen.grid }));

    this.chips = make("div", "spo-chips", this.element);
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    for (const control of [this.bar, this.batch, this.chips, this.grid])
      // The canvas would drag the node.
      control.addEventListener("pointerdown", (event) => event.stopPropagation());
    passWheel(this.element);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onSlider = event.target === this.slider;
    const onControl = onSlider || event.target.closest("button");
    const many = this.images?.length > 1;
    if (event.key === "m" || event.key === "M") this.choose({ shown: !this.chosen.shown });
    else if (many && (event.key === "g" || event.key === "G")) this.choose({ grid: !this.chosen.grid });
    else if (many && (event.key === "n" || event.key === "N")) this.turnToUnsafe();
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

  turn(by) {
    const count = this.images?.length;
    if (count) this.number = (this.number + by + count) % count;
    this.draw();
  }

  /** To the next unsafe image, around the end; the same one where there is no other. */
  turnToUnsafe() {
    const { images, number } = this;
    const others = [...images.keys()].map((step) => (number + 1 + step) % images.length);
    this.number = others.find((other) => isUnsafe(images[other])) ?? number;
    this.choose({ grid: false });
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
    const before = JSON.stringify(this.images);
    this.images = images;
    // A batch opens on its worst image; going back to a workflow keeps the one that was looked at.
    if (before !== JSON.stringify(images)) {
      const costs = images.map((one) => one.cost ?? Infinity);
      this.number = Math.max(costs.indexOf(Math.max(...costs)), 0);
    }
    // An opacity that came through a link is known only now.
    const used = images[0]?.opacity;
    if (used !== undefined && !this.opacityInput) this.chosen.opacity = used;
    this.draw();
    // The chips have no height before they are laid out.
    requestAnimationFrame(() => grow(this.node));
  }

  /** What everything but the image takes, and the least that the image may have. */
  get height() {
    const bars = Math.max(24, this.bar.offsetHeight) + (this.batch.hidden ? 0 : Math.max(24, this.batch.offsetHeight) + 6);
    return IMAGE + Math.max(CHIPS, this.chips.offsetHeight) + bars + 36;
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
    this.batch.hidden = this.pages.hidden = !(images?.length > 1);
    const inGrid = Boolean(one && chosen.grid && images.length > 1);
    this.grid.hidden = !inGrid;
    this.frame.hidden = inGrid;
    if (!one) return;

    const unsafe = isUnsafe(one);
    const deciding = unsafe || one.cost >= FAINT ? one.category : null;
    const category = one.maps[chosen.category] ? chosen.category : deciding;
    place(this.image, one.image && addressOf(one.image));
    place(this.map, one.maps[category] && addressOf(one.maps[category]));
    place(this.marks, one.marks && addressOf(one.marks));
    this.map.style.opacity = chosen.shown ? opacity : 0;

    this.count.textContent = text.of(this.number + 1, images.length);
    // A safe image has a highest category too, and naming it would accuse the image.
    this.image.alt = `${text.of(this.number + 1, images.length)}: ${unsafe ? one.category : text.safe}`;
    const word = unsafe ? text.unsafe : text.safe;
    this.verdict.textContent = one.cost === null ? text.unknown : `${word} ${one.cost.toFixed(2)}`;
    this.verdict.title = text.threshold(one.threshold);
    this.verdict.classList.toggle("spo-unsafe", unsafe);
    this.drawBatch();
    this.drawChips(one, category);
  }

  drawBatch() {
    const { images, text } = this;
    const unsafe = images.filter(isUnsafe).length;
    this.sum.textContent = text.sum(unsafe, images.length);
    this.sum.classList.toggle("spo-unsafe", unsafe > 0);
    this.jump.hidden = !unsafe;
    this.gridButton.ariaPressed = !this.grid.hidden;
    if (this.grid.hidden) return;
    const cells = images.map((one, number) => {
      const cost = one.cost === null ? text.unknown : one.cost.toFixed(2);
      const label = `${text.of(number + 1, images.length)}: ${isUnsafe(one) ? text.unsafe : text.safe} ${cost}`;
      const cell = button(null, "", label, () => {
        this.number = number;
        this.choose({ grid: false });
        this.element.focus();
      });
      cell.classList.add("spo-cell");
      cell.classList.toggle("spo-unsafe", isUnsafe(one));
      place(make("img", "", cell), one.image && addressOf(one.image));
      make("span", "spo-cost", cell).textContent = cost;
      return cell;
    });
    this.grid.replaceChildren(...cells);
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
      const hasMap = one.maps[name] !== undefined && (cost >= FAINT || isUnsafe(one));
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
    const chip = button(null, "", name, () => {
      if (chip.ariaDisabled !== "true")
        this.choose({ category: this.chosen.category === name ? null : name, shown: true });
    });
    chip.classList.add("spo-chip");
    chip.dataset.name = name;
    make("span", "spo-name", chip).textContent = name.replaceAll("_", " ");
    const scale = make("span", "spo-scale", chip);
    make("span", "spo-fill", scale);
    make("span", "spo-threshold", scale);
    make("span", "spo-cost", chip);
    return chip;
  }
}

const results = onResults(KEY, (node, images) => node.spoView?.show(images));

app.registerExtension({
  name: "spo.safety",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;

    chain(nodeType.prototype, "onNodeCreated", function () {
      const view = new SafetyView(this);
      this.spoView = view;
      addElement(this, KEY, view.element, () => view.height);
      const opacity = view.opacityInput;
      if (opacity) chain(opacity, "callback", () => view.draw());
      grow(this, WIDTH);
    });

    chain(nodeType.prototype, "onConfigure", function () {
      this.spoView?.draw();
    });

    chain(nodeType.prototype, "onExecuted", results.executed);
  },

  onNodeOutputsUpdated: results.updated,
});

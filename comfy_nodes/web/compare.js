// Two images under one line that can be dragged, on Compare Images A/B; in the classic canvas and in Nodes 2.0.
// The node sends them under the key `spo_compare`.
import { app } from "../../scripts/app.js";
import { addElement, addressOf, button, chain, grow, inLanguage, make, onResults, passWheel, place } from "./shared.js";

const KEY = "spo_compare";
const MINIMUM = 260;
const TEXTS = {
  en: {
    view: "Two images to compare",
    waiting: "Run the workflow to compare the images.",
    line: "How much of image A is seen",
    previous: "Previous pair",
    next: "Next pair",
    of: (number, count) => `${number} of ${count}`,
  },
  zh: {
    view: "要比较的两张图像",
    waiting: "运行工作流后即可比较图像。",
    line: "图像 A 显示的部分",
    previous: "上一对",
    next: "下一对",
    of: (number, count) => `第 ${number} 对，共 ${count} 对`,
  },
  ja: {
    view: "比較する 2 枚の画像",
    waiting: "ワークフローを実行すると、画像を比較できます。",
    line: "画像 A が見える割合",
    previous: "前の組",
    next: "次の組",
    of: (number, count) => `${count} 組中 ${number} 組目`,
  },
};

class CompareView {
  constructor(node) {
    const text = inLanguage(TEXTS);
    Object.assign(this, { node, text, number: 0 });
    this.element = make("div", "spo-view spo-compare spo-empty");
    Object.assign(this.element, { role: "group", ariaLabel: text.view });
    const frame = make("div", "spo-frame", this.element);
    this.b = make("img", "spo-b", frame);
    this.a = make("img", "spo-a", frame);
    Object.assign(this.b, { alt: "B" });
    Object.assign(this.a, { alt: "A" });
    for (const image of [this.a, this.b])
      image.addEventListener("load", () => frame.classList.toggle("spo-pixels", image.naturalWidth < 256));
    this.line = make("div", "spo-line", frame);
    make("span", "spo-letter spo-left", frame).textContent = "A";
    make("span", "spo-letter spo-right", frame).textContent = "B";
    this.note = make("p", "spo-note", frame);
    this.note.textContent = text.waiting;
    this.slider = make("input", "spo-drag", frame);
    Object.assign(this.slider, { type: "range", min: 0, max: 100, step: "any", value: 50, ariaLabel: text.line });
    this.slider.addEventListener("input", () => this.draw());
    this.bar = make("div", "spo-bar", this.element);
    button(this.bar, "‹", text.previous, () => this.turn(-1));
    this.count = make("span", "spo-count", this.bar);
    button(this.bar, "›", text.next, () => this.turn(1));
    this.element.addEventListener("pointerdown", (event) => event.stopPropagation());
    this.element.addEventListener("keydown", (event) => event.stopPropagation());
    passWheel(this.element);
    this.draw();
  }

  show([pairs]) {
    this.pairs = pairs;
    this.number = Math.min(this.number, Math.max(this.length - 1, 0));
    this.draw();
  }

  get length() {
    return Math.max(this.pairs?.a.length ?? 0, this.pairs?.b.length ?? 0);
  }

  turn(by) {
    this.number = (this.number + by + this.length) % this.length;
    this.draw();
  }

  draw() {
    const share = Number(this.slider.value);
    this.a.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    this.line.style.left = `${share}%`;
    this.element.classList.toggle("spo-empty", !this.length);
    this.note.hidden = Boolean(this.length);
    this.bar.hidden = this.length < 2;
    if (!this.length) return;
    for (const side of ["a", "b"]) {
      const file = this.pairs[side][this.number];
      place(this[side], file && addressOf(file));
    }
    this.count.textContent = this.text.of(this.number + 1, this.length);
  }
}

const results = onResults(KEY, (node, shown) => node.spoCompare?.show(shown));

app.registerExtension({
  name: "spo.compare",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SPO_Compare") return;
    chain(nodeType.prototype, "onNodeCreated", function () {
      this.spoCompare = new CompareView(this);
      addElement(this, KEY, this.spoCompare.element, () => MINIMUM);
      grow(this);
    });
    chain(nodeType.prototype, "onExecuted", results.executed);
  },

  onNodeOutputsUpdated: results.updated,
});

// What an adapter is before it is loaded: the picture beside its file, base, rank, training, and whether a trigger word
// is needed. The server answers, see comfy_nodes/preview.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addElement, chain, grow, inLanguage, make, passWheel, place } from "./shared.js";

/** The inputs by which a node chooses its adapters. */
const NODES = {
  SPO_LoadAdapter: ["adapter"],
  SPO_AdapterStack: ["adapter_1", "adapter_2", "adapter_3", "adapter_4"],
};
const MINIMUM = 84;
const TEXTS = {
  en: {
    facts: "What the adapter is",
    none: "No adapter is chosen.",
    unknown: "not stated",
    base: "base",
    predicts: (kind) => `predicts ${kind}`,
    rank: "rank",
    size: (modules, bytes) => `${modules} modules, ${bytes}`,
    noTrigger: "needs no trigger word",
    trigger: (words) => `trigger words: ${words}`,
    picture: "Picture of the adapter",
  },
  zh: {
    facts: "适配器的信息",
    none: "未选择适配器。",
    unknown: "未说明",
    base: "基础模型",
    predicts: (kind) => `预测 ${kind}`,
    rank: "秩",
    size: (modules, bytes) => `${modules} 个模块，${bytes}`,
    noTrigger: "不需要触发词",
    trigger: (words) => `触发词：${words}`,
    picture: "适配器的图片",
  },
  ja: {
    facts: "アダプターの情報",
    none: "アダプターが選択されていません。",
    unknown: "記載なし",
    base: "ベース",
    predicts: (kind) => `${kind} を予測`,
    rank: "ランク",
    size: (modules, bytes) => `${modules} モジュール、${bytes}`,
    noTrigger: "トリガーワード不要",
    trigger: (words) => `トリガーワード：${words}`,
    picture: "アダプターの画像",
  },
};

function bytesOf(number) {
  return number < 1e6 ? `${Math.ceil(number / 1e3)} kB` : `${(number / 1e6).toFixed(number < 1e8 ? 1 : 0)} MB`;
}

function span(numbers) {
  return numbers.length > 1 ? `${numbers[0]}–${numbers.at(-1)}` : `${numbers[0]}`;
}

/** The panel of one node. */
class AdapterPanel {
  constructor(node, inputs) {
    Object.assign(this, { node, inputs, text: inLanguage(TEXTS), asked: "" });
    this.element = make("div", "spo-adapters");
    Object.assign(this.element, { tabIndex: 0, role: "group", ariaLabel: this.text.facts });
    this.element.addEventListener("pointerdown", (event) => event.stopPropagation());
    passWheel(this.element);
    for (const widget of this.widgets)
      chain(widget, "callback", () => this.refresh());
  }

  get widgets() {
    const names = [...this.inputs, ...this.inputs.map((name) => name.replace("adapter", "on"))];
    return (this.node.widgets ?? []).filter((widget) => names.includes(widget.name));
  }

  /** The adapters that are chosen and on. */
  get chosen() {
    const value = (name) => this.node.widgets.find((widget) => widget.name === name)?.value;
    return this.inputs
      .filter((name) => value(name.replace("adapter", "on")) !== false || name === "adapter")
      .map(value)
      .filter((name) => name && name !== "none");
  }

  async refresh() {
    const { chosen } = this;
    const asked = (this.asked = JSON.stringify(chosen));
    const found = await Promise.all(chosen.map((name) => this.ask(name)));
    // Another one was chosen while the server read this one.
    if (asked !== this.asked) return;
    const cards = found.map((facts, number) => this.card(chosen[number], facts));
    this.element.replaceChildren(...cards);
    if (!cards.length) this.element.textContent = this.text.none;
  }

  async ask(name) {
    try {
      const answer = await api.fetchApi(`/spo/adapter?${new URLSearchParams({ name })}`);
      return answer.ok ? await answer.json() : {};
    } catch {
      return {};
    }
  }

  card(name, facts) {
    const { text } = this;
    const card = make("div", "spo-adapter");
    const picture = make("img", "spo-picture", card);
    picture.alt = text.picture;
    const beside = facts.has_file_picture && api.apiURL(`/spo/adapter/picture?${new URLSearchParams({ name })}`);
    place(picture, beside || facts.picture);
    const words = make("div", "spo-facts", card);
    const line = (content, className = "") => (make("div", className, words).textContent = content);
    line(facts.title ?? name, "spo-title");
    if (facts.error) line(facts.error, "spo-flaw");
    if (!facts.rank) return card;
    const prediction = facts.prediction ? `, ${text.predicts(facts.prediction)}` : "";
    line(`${text.base}: ${facts.base || text.unknown}${prediction}`);
    line(`${text.rank} ${span(facts.rank)}, ${text.size(facts.modules, bytesOf(facts.bytes))}`);
    line(facts.trigger ? text.trigger(facts.trigger) : text.noTrigger);
    for (const [key, value] of Object.entries(facts.training)) line(`${key}: ${value}`, "spo-training");
    for (const warning of facts.warnings) line(warning, "spo-flaw");
    return card;
  }
}

app.registerExtension({
  name: "spo.adapters",

  beforeRegisterNodeDef(nodeType, nodeData) {
    const inputs = NODES[nodeData.name];
    if (!inputs) return;
    chain(nodeType.prototype, "onNodeCreated", function () {
      this.spoAdapters = new AdapterPanel(this, inputs);
      addElement(this, "spo_adapters", this.spoAdapters.element, () => MINIMUM);
      grow(this);
      this.spoAdapters.refresh();
    });
    chain(nodeType.prototype, "onConfigure", function () {
      this.spoAdapters?.refresh();
    });
  },
});

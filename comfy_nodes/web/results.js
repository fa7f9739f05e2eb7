// What a node found, as text on the node itself: UAScore, Save Safety Report, Merge and the nodes that apply adapters.
// The nodes send it under the key `text`.
import { app } from "../../scripts/app.js";
import { addElement, chain, grow, inLanguage, make, onResults, passWheel } from "./shared.js";
// What an adapter is stands above what came of it: the order of the files is that of the elements on a node.
import "./adapters.js";

const KEY = "text";
const NODES = [
  ...["SPO_LoadAdapter", "SPO_AdapterStack", "SPO_ApplyByBlock", "SPO_MergeAdapters"],
  ...["SPO_SafetySwitch", "SPO_SafetyFilter", "SPO_UAScore", "SPO_SaveReport"],
];
const MINIMUM = 84;
const TEXTS = {
  en: { waiting: "Run the workflow to see the result here.", result: "Result" },
  zh: { waiting: "运行工作流后，结果显示在这里。", result: "结果" },
  ja: { waiting: "ワークフローを実行すると、結果がここに表示されます。", result: "結果" },
};

const results = onResults(KEY, (node, texts) => {
  if (!node.spoText) return;
  node.spoText.textContent = texts.join("\n");
  node.spoText.classList.remove("spo-waiting");
});

app.registerExtension({
  name: "spo.results",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    chain(nodeType.prototype, "onNodeCreated", function () {
      const text = inLanguage(TEXTS);
      const element = make("output", "spo-text spo-waiting");
      Object.assign(element, { textContent: text.waiting, ariaLabel: text.result, tabIndex: 0 });
      // The text can be chosen and copied; the canvas would drag the node.
      element.addEventListener("pointerdown", (event) => event.stopPropagation());
      passWheel(element);
      this.spoText = element;
      addElement(this, "spo_text", element, () => MINIMUM);
      grow(this);
    });
    chain(nodeType.prototype, "onExecuted", results.executed);
  },

  onNodeOutputsUpdated: results.updated,
});

// Keys. Single keys can be switched off: speech input and some keyboards send them by accident.

import { dialog } from "./dialog.js";
import { h } from "./dom.js";
import { keep, recall } from "./stored.js";

const GOES = { o: "#/", j: "#/jobs", b: "#/batches", k: "#/kinds", a: "#/archive" };
const SHOWN = [
  [["?"], "this help"],
  [["g", "o"], "overview"],
  [["g", "j"], "jobs"],
  [["g", "b"], "batches"],
  [["g", "k"], "kinds"],
  [["g", "a"], "archive"],
  [["/"], "search"],
  [["j"], "next row (or ↓ in the list)"],
  [["k"], "previous row (or ↑)"],
  [["Enter"], "open the row"],
  [["x"], "select the row"],
  [["c"], "cancel the job of this page"],
  [["r"], "retry the job of this page"],
  [["t"], "theme: system, light, dark"],
  [["Esc"], "close, or clear the search"],
];

const actions = new Map();
let isWaitingForPlace = false;
let isHelpOpen = false;

/** Give keys a meaning while a page is open: `{x: handler}`; returns how to take it away again. */
export function bind(handlers) {
  for (const [key, handler] of Object.entries(handlers)) actions.set(key, handler);
  return () => {
    for (const [key, handler] of Object.entries(handlers)) if (actions.get(key) === handler) actions.delete(key);
  };
}

function isTyping(target) {
  return target instanceof HTMLElement && (target.isContentEditable || target.matches("input:not([type=checkbox]), textarea, select"));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || isTyping(event.target)) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.key.length === 1 && !recall("keys", true)) return;
  if (isWaitingForPlace) {
    isWaitingForPlace = false;
    if (GOES[event.key]) {
      event.preventDefault();
      location.hash = GOES[event.key];
      return;
    }
  }
  if (event.key === "g") {
    isWaitingForPlace = true;
    setTimeout(() => { isWaitingForPlace = false; }, 1_500);
  } else if (event.key === "?") {
    event.preventDefault();
    help();
  } else if (actions.has(event.key)) {
    if (actions.get(event.key)(event) !== false) event.preventDefault();
  }
});

/** Show which keys there are. */
export async function help() {
  if (isHelpOpen) return;
  isHelpOpen = true;
  await dialog("Keys", (close) => {
    const box = h("input", { type: "checkbox", checked: recall("keys", true), on: { change: () => keep("keys", box.checked) } });
    return [
      h("dl", { class: "keys" }, SHOWN.map(([keys, text]) => [h("dt", {}, keys.map((key, place) => [place > 0 && " ", h("kbd", {}, key)])), h("dd", {}, text)])),
      h("label", { class: "check" }, box, "Single keys are shortcuts"),
      h("div", { class: "actions" }, h("button", { class: "button primary", type: "button", on: { click: () => close(null) } }, "Close")),
    ];
  });
  isHelpOpen = false;
}

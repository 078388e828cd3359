// JSON as it reads: coloured, of any depth, cut off where nobody would read on.

import { h, icon } from "./dom.js";
import { stringify } from "./exact.js";
import { announce, tellProblem } from "./messages.js";

const MOST_CHARACTERS = 60_000;
const TOKEN = /("(?:[^"\\]|\\.)*")(\s*:)?|\b(true|false|null)\b|(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)/g;

/** A JSON value as a block of code. */
export function payload(value) {
  const text = stringify(value, 2) ?? "null";
  const shown = text.slice(0, MOST_CHARACTERS);
  const parts = [];
  let end = 0;
  for (const found of shown.matchAll(TOKEN)) {
    if (found.index > end) parts.push(shown.slice(end, found.index));
    const [, string, colon, word] = found;
    if (string) parts.push(h("span", { class: colon ? "json-key" : "json-text" }, string), colon ?? "");
    else parts.push(h("span", { class: word ? "json-word" : "json-number" }, found[0]));
    end = found.index + found[0].length;
  }
  parts.push(shown.slice(end), text.length > shown.length ? "\n… and more; copy it, or ask the API for it" : "");
  return h("pre", { class: "code", tabindex: 0 }, parts);
}

/** A block of text as it is. */
export function plainBlock(text, label) {
  return h("pre", { class: "code", tabindex: 0, role: "region", "aria-label": label }, text);
}

/** A button that copies a text. */
export function copier(text, label) {
  return h("button", {
    class: "icon-button small-icon", type: "button", "aria-label": label, title: label, on: { click: async () => {
      try {
        await navigator.clipboard.writeText(typeof text === "function" ? text() : text);
        announce("Copied");
      } catch {
        tellProblem({ title: "Not copied", detail: "The browser does not let this page write to the clipboard; select the text and copy it." });
      }
    } },
  }, icon("copy"));
}

// Questions. Each returns a promise of the answer; null when it was left.

import { h, newId, put } from "./dom.js";
import { notice } from "./states.js";

/** Show a dialog until one of its buttons, or Escape, ends it. `build(close)` returns what is in its form. */
export function dialog(headline, build) {
  return new Promise((resolve) => {
    const label = newId("dialog");
    const before = document.activeElement;
    let answer = null;
    const close = (value) => { answer = value; element.close(); };
    const form = h("form", { method: "dialog" });
    const element = h("dialog", { "aria-labelledby": label }, form);
    form.append(h("h2", { id: label }, headline), ...build(close, form));
    element.addEventListener("click", (event) => { if (event.target === element) element.close(); });
    element.addEventListener("close", () => {
      element.remove();
      if (before instanceof HTMLElement && before.isConnected) before.focus();
      resolve(answer);
    });
    document.body.append(element);
    element.showModal();
  });
}

/** Ask before something is done; `act` does it while the dialog shows that it is busy, and its problem is shown there. */
export function confirm({ headline, text, verb, danger = false, reason = false, act }) {
  return dialog(headline, (close, form) => {
    const label = newId("reason");
    const input = reason && h("input", { class: "input", id: label, maxlength: 500, autocomplete: "off" });
    const trouble = h("div", {});
    const go = h("button", { class: `button primary ${danger ? "danger" : ""}`, type: "submit" }, verb);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      go.disabled = true;
      put(trouble);
      try {
        close(await act(input ? input.value.trim() || null : null) ?? true);
      } catch (problem) {
        put(trouble, notice(problem));
        go.disabled = false;
        go.focus();
      }
    });
    return [
      h("p", { class: "text" }, text),
      input && h("div", { class: "field" }, h("label", { for: label }, "Reason (optional)"), input),
      trouble,
      h("div", { class: "actions" }, h("button", { class: "button", type: "button", on: { click: () => close(null) } }, "Leave it"), go),
    ].filter(Boolean);
  });
}

/** Ask for one line of text. */
export function askText({ headline, label, value = "", verb }) {
  return dialog(headline, (close, form) => {
    const id = newId("text");
    const input = h("input", { class: "input", id, value, maxlength: 60, required: true, autocomplete: "off" });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (input.value.trim()) close(input.value.trim());
    });
    return [
      h("div", { class: "field" }, h("label", { for: id }, label), input),
      h("div", { class: "actions" },
        h("button", { class: "button", type: "button", on: { click: () => close(null) } }, "Leave it"),
        h("button", { class: "button primary", type: "submit" }, verb)),
    ];
  });
}

// What stands where data would: loading, nothing, an error and what to do about it.

import { h } from "./dom.js";

export function loading(what = "Loading") {
  return h("div", { class: "state", role: "status" }, h("div", { class: "spinner", "aria-hidden": "true" }), h("span", {}, `${what} …`));
}

export function empty(headline, text, ...actions) {
  return h("div", { class: "state" }, h("b", {}, headline), text && h("p", {}, text), actions.length > 0 && h("div", { class: "actions" }, actions));
}

/** An error in place of a page or a part of it; `again` repeats what failed. */
export function failed(problem, again) {
  return h("div", { class: "state", role: "alert" },
    h("b", {}, problem.title || "Something failed"),
    h("p", { class: "text" }, problem.detail || problem.message),
    problem.requestId && h("p", { class: "small" }, "Request ", h("code", {}, problem.requestId)),
    h("div", { class: "actions" },
      again && h("button", { class: "button", type: "button", on: { click: again } }, "Try again"),
      problem.status === 404 && h("a", { class: "button", href: "#/jobs" }, "All jobs")));
}

/** An error within a form or a card. */
export function notice(problem) {
  return h("div", { class: "notice bad", role: "alert" },
    h("b", {}, problem.title), h("span", { class: "text" }, problem.detail || problem.message),
    problem.requestId && h("div", { class: "hint" }, `Request ${problem.requestId}`));
}

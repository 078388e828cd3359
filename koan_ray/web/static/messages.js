// What is told in passing: toasts for the eye, announcements for screen readers.

import { h, icon } from "./dom.js";

const STAYS_MS = 6_000;
const MOST = 4;

/** Have a screen reader say something when it has time. */
export function announce(text) {
  const place = document.getElementById("announcer");
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}

/** Show that something has worked. */
export function tellDone(headline, text, link) {
  show("good", "status", headline, text, link);
}

/** Show that something has not; it stays until it is closed. */
export function tellProblem(problem, doing) {
  show("bad", "alert", doing ? `${doing}: ${problem.title ?? "failed"}` : problem.title ?? "Failed", problem.detail || problem.message);
}

/** Take away all that was told: it may name jobs, and the next person may not know them. */
export function forgetAll() {
  document.getElementById("toasts").replaceChildren();
  document.getElementById("announcer").textContent = "";
}

function show(tone, role, headline, text, link) {
  const place = document.getElementById("toasts");
  while (place.children.length >= MOST) place.firstChild.remove();
  const toast = h("div", { class: `toast ${tone}`, role },
    h("div", { class: "grow" }, h("b", {}, headline), text && h("span", { class: "text" }, text), link && h("div", {}, link)),
    h("button", { class: "icon-button small-icon", type: "button", "aria-label": "Close message", on: { click: () => toast.remove() } }, icon("close")));
  place.append(toast);
  if (tone === "good") setTimeout(() => toast.remove(), STAYS_MS);
}

// The frame around every page: where one can go, who one is, whether what is shown is live.

import { session, signOut } from "./api.js";
import { h, icon, mark, put, svg, write } from "./dom.js";
import { currentState, on } from "./live.js";
import { announce, tellProblem } from "./messages.js";
import { bind, help } from "./shortcuts.js";
import { setTheme, theme } from "./stored.js";

const PLACES = [
  ["overview", "#/", "Overview"],
  ["jobs", "#/jobs", "Jobs"],
  ["batches", "#/batches", "Batches"],
  ["kinds", "#/kinds", "Kinds"],
  ["archive", "#/archive", "Archive"],
];
const CONNECTION = { open: "Live", connecting: "Connecting", lost: "Reconnecting", off: "Not connected" };
const THEMES = ["system", "light", "dark"];
const THEME_ICONS = { system: "system", light: "sun", dark: "moon" };

export function brand() {
  return h("a", { class: "brand", href: "#/", "aria-label": "koan_ray, overview" },
    svg("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" },
      svg("circle", { cx: 16, cy: 16, r: 11.5, fill: "none", stroke: "currentColor", "stroke-width": 4, "stroke-linecap": "round", "stroke-dasharray": "60 13", transform: "rotate(-60 16 16)" }),
      svg("circle", { cx: 16, cy: 16, r: 3.5, fill: "currentColor" })),
    h("span", {}, "koan_ray"));
}

/** Draw the frame; returns where pages go, and how to mark the place that is open. */
export function frame(place) {
  const links = PLACES.map(([name, href, text]) => h("a", { href, data: { place: name } }, icon(name), h("span", {}, text)));
  const words = h("span", { class: "words" });
  const connection = h("div", { class: "connection", role: "status" }, h("span", { class: "dot", "aria-hidden": "true" }), words);
  const outage = h("div", { class: "outage", role: "alert", hidden: true }, h("span", { class: "dot", "aria-hidden": "true" }),
    "The connection to the server is lost. What you see may be old; it is caught up with as soon as the server answers.");
  const main = h("main", { class: "main", id: "main", tabindex: -1 });
  let outageTimer = null;
  const showConnection = (state) => {
    mark(connection, "data-state", state);
    mark(connection, "title", CONNECTION[state]);
    write(words, CONNECTION[state]);
    clearTimeout(outageTimer);
    if (state === "lost") outageTimer = setTimeout(() => { outage.hidden = false; }, 800);
    else outage.hidden = true;
  };
  showConnection(currentState());
  const stops = [on("state", showConnection), bind({ t: nextTheme })];
  put(place,
    h("header", { class: "rail" }, brand(), h("nav", { class: "nav", "aria-label": "Pages" }, links),
      h("div", { class: "rail-foot" }, connection, who(),
        h("div", { class: "rail-tools" }, themeButton(), button("Keys (?)", "help", help),
          button("Sign out", "out", () => signOut().catch((problem) => tellProblem(problem, "Sign out")))))),
    h("div", { class: "page-frame" }, outage, main));
  return {
    main,
    at: (name) => links.forEach((link) => mark(link, "aria-current", link.dataset.place === name ? "page" : null)),
    close: () => stops.forEach((stop) => stop()),
  };
}

/** Who one is; a token that was made at the start and printed belongs to nobody by name. */
function who() {
  const isPrinted = session.name === "generated";
  return h("div", { class: "who" }, isPrinted ? "Signed in with" : "Signed in as", h("b", { class: "text" }, isPrinted ? "the printed token" : session.name));
}

function button(label, name, handler) {
  return h("button", { class: "icon-button", type: "button", "aria-label": label, title: label, on: { click: handler } }, icon(name));
}

let themeShown = null;

function themeButton() {
  const element = button("", "system", nextTheme);
  themeShown = () => {
    const label = `Theme: ${theme()}`;
    mark(element, "aria-label", label);
    mark(element, "title", label);
    put(element, icon(THEME_ICONS[theme()]));
  };
  themeShown();
  return element;
}

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  themeShown?.();
  announce(`Theme: ${theme()}`);
}

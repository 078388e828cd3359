// Kinds: what jobs there are, and where to start one.

import { get, may } from "./api.js";
import { h, icon, put } from "./dom.js";
import { duration, plural } from "./format.js";
import { empty, failed, loading } from "./states.js";

export function kindsPage() {
  const list = h("div", {}, loading("Looking for kinds"));
  const abort = new AbortController();
  const search = h("input", { class: "input", type: "search", placeholder: "Search kinds", "aria-label": "Search kinds", on: { input: () => draw() } });
  let kinds = [];

  function draw() {
    const sought = search.value.trim().toLowerCase();
    const found = kinds.filter((kind) => `${kind.kind} ${kind.description ?? ""}`.toLowerCase().includes(sought));
    put(list, found.length ? h("div", { class: "kind-grid" }, found.map(kindCard))
      : kinds.length ? empty("No kind matches", "Try another word.")
        : empty("No kinds yet", "Job classes are listed here when a job of theirs has run, or when their module is named: koan-ray serve --module your_module."));
  }

  async function read() {
    try {
      kinds = (await get("api/kinds", {}, abort.signal)).items;
      kinds.sort((a, b) => Number(b.is_known) - Number(a.is_known));
      draw();
    } catch (problem) {
      if (!abort.signal.aborted) put(list, failed(problem, read));
    }
  }

  read();
  return {
    title: "Kinds",
    element: h("div", { class: "page" }, h("div", { class: "page-head" }, h("h1", { tabindex: -1, class: "grow" }, "Kinds"), h("div", { class: "search" }, icon("search"), search)), list),
    close: () => abort.abort(),
  };
}

function kindCard(kind) {
  const name = encodeURIComponent(kind.kind);
  const why = !kind.is_known ? "Its class is not defined where the API runs, so it cannot be started here; name its module with --module or [web] modules." : !may("submitter") ? "Starting jobs needs the role submitter." : null;
  return h("article", { class: "card kind-card" },
    h("h2", { class: "text" }, kind.kind),
    h("p", { class: "about text" }, kind.description ?? (kind.is_known ? "" : "Known by its jobs only.")),
    h("div", { class: "tags" },
      kind.retry_policy && h("span", { class: "tag" }, plural(kind.retry_policy.max_attempts, "attempt")),
      kind.timeout_s !== null && h("span", { class: "tag" }, `timeout ${duration(kind.timeout_s)}`),
      kind.isolation && h("span", { class: "tag" }, kind.isolation), kind.resources && h("span", { class: "tag" }, kind.resources),
      kind.n_unroutable > 0 && h("span", { class: "tag warn" }, `${plural(kind.n_unroutable, "job waits", "jobs wait")} for its class`)),
    h("div", { class: "actions" },
      why ? h("button", { class: "button", type: "button", disabled: true, title: why }, icon("play"), "Start") : h("a", { class: "button primary", href: `#/kinds/${name}/start`, "aria-label": `Start ${kind.kind}` }, icon("play"), "Start"),
      h("a", { class: "button", href: `#/jobs?kind=${name}`, "aria-label": `Jobs of ${kind.kind}` }, "Jobs"),
      why && h("span", { class: "unseen" }, why)));
}

// Starting a job from a form: what it is given, and how it is to be run.

import { get, post } from "./api.js";
import { h, newId, put, putPage } from "./dom.js";
import { parse, stringify } from "./exact.js";
import { value } from "./filters.js";
import { plural } from "./format.js";
import { Unreadable, inputFor } from "./form.js";
import { announce, tellDone } from "./messages.js";
import { empty, failed, loading, notice } from "./states.js";

const CONTEXT = /^body\.context\.?/;

export function startPage(kind) {
  const page = { title: `Start ${kind}`, element: h("div", { class: "page" }, h("h1", { tabindex: -1 }, `Start ${kind}`), loading()), close: () => abort.abort() };
  const abort = new AbortController();
  async function read() {
    try {
      build(page.element, await get(`api/kinds/${encodeURIComponent(kind)}`, {}, abort.signal));
    } catch (problem) {
      if (!abort.signal.aborted) putPage(page.element, h("h1", { tabindex: -1 }, `Start ${kind}`), failed(problem, read));
    }
  }
  read();
  return page;
}

function build(place, kind) {
  const head = h("div", {}, h("div", { class: "crumbs" }, h("a", { href: "#/kinds" }, "Kinds")), h("h1", { tabindex: -1, class: "text" }, `Start ${kind.kind}`),
    kind.description && h("p", { class: "muted text" }, kind.description));
  if (!kind.is_known) {
    putPage(place, head, empty("It cannot be started here", "Its class is not defined where the API runs; name its module with koan-ray serve --module, or under [web] modules."));
    return;
  }
  new StartForm(place, head, kind);
}

class StartForm {
  constructor(place, head, kind) {
    this.kind = kind;
    this.schema = kind.context_schema ?? {};
    this.input = this.make();
    this.trouble = h("div", {});
    this.context = h("div", {}, this.input.element);
    this.isJson = false;
    this.json = h("textarea", { class: "input", rows: 14, spellcheck: "false", "aria-label": "Context as JSON" });
    this.toggle = h("button", { class: "link-button small", type: "button", on: { click: () => this.swap() } }, "Edit as JSON");
    this.go = h("button", { class: "button primary", type: "submit" }, "Start the job");
    this.options = options();
    const form = h("form", { class: "form", novalidate: true, on: { submit: (event) => { event.preventDefault(); this.submit(); } } },
      h("div", { class: "start-grid" },
        h("section", { class: "card", "aria-label": "Context" }, h("div", { class: "card-head" }, h("h2", { class: "grow" }, "Context"), this.toggle), h("div", { class: "card-body" }, this.context)),
        h("section", { class: "card options", "aria-label": "Options" }, h("div", { class: "card-head" }, h("h2", {}, "How it is run")), h("div", { class: "card-body form" }, this.options.elements)),
        h("div", { class: "form" }, this.trouble, h("div", { class: "actions" }, this.go, h("a", { class: "button", href: "#/kinds" }, "Leave it")))));
    putPage(place, head, form);
  }

  make() {
    if (this.schema.type === "null") return { element: h("p", { class: "muted" }, "Jobs of this kind are started without a context."), read: () => null, write() {}, clear() {}, fault: () => null };
    const isBare = !this.schema.properties && !this.schema.$ref;
    return inputFor(isBare ? { title: "Context", ...this.schema } : this.schema, { name: "Context" });
  }

  swap() {
    put(this.trouble);
    if (!this.isJson) {
      this.input.clear();
      const context = this.readable(() => this.input.read());
      if (context === Unreadable) return;
      this.json.value = stringify(context ?? null, 2);
      put(this.context, this.json);
    } else {
      const context = this.parsed();
      if (context === Unreadable) return;
      this.input = this.make();
      this.input.write(context);
      put(this.context, this.input.element);
    }
    this.isJson = !this.isJson;
    this.toggle.textContent = this.isJson ? "Edit as a form" : "Edit as JSON";
  }

  readable(read) {
    try {
      return read();
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      this.firstFault();
      return Unreadable;
    }
  }

  parsed() {
    try {
      return parse(this.json.value);
    } catch (error) {
      put(this.trouble, notice({ title: "The context is not JSON", detail: error.message }));
      return Unreadable;
    }
  }

  firstFault() {
    const first = this.context.querySelector('[aria-invalid="true"]');
    first?.focus();
    announce(`${plural(this.context.querySelectorAll('[aria-invalid="true"]').length, "field")} need to be corrected`);
  }

  async submit() {
    put(this.trouble);
    this.input.clear();
    const context = this.isJson ? this.parsed() : this.readable(() => this.input.read());
    if (context === Unreadable) return;
    const asked = this.options.read();
    if (asked instanceof Error) {
      put(this.trouble, notice({ title: "The options cannot be read", detail: asked.message }));
      return;
    }
    this.go.disabled = true;
    try {
      const job = await post("api/jobs", { kind: this.kind.kind, context: context ?? null, ...asked });
      tellDone("Started", job.name ?? job.kind);
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    } catch (problem) {
      this.go.disabled = false;
      this.refused(problem);
    }
  }

  /** Show each error at its field; those that have none, and all others, above the button. */
  refused(problem) {
    const rest = [];
    for (const { field, message } of problem.errors) {
      const isContext = CONTEXT.test(field) || field === "body.context";
      const path = field.replace(CONTEXT, "").split(".").filter(Boolean);
      if (!isContext || this.isJson || !this.input.fault(path, message)) rest.push(`${field.replace(/^body\./, "")}: ${message}`);
    }
    const placed = problem.errors.length - rest.length;
    const detail = rest.length ? rest.join("\n") : placed ? `${plural(placed, "field")} above ${placed === 1 ? "says" : "say"} what is wrong.` : problem.detail;
    put(this.trouble, notice({ title: problem.title, detail, requestId: problem.requestId }));
    if (placed) this.firstFault();
  }
}

/** What can be said about a job besides its context. */
function options() {
  const field = (label, input, hint) => {
    input.id = newId("option");
    return h("div", { class: "field" }, h("label", { for: input.id }, label), input, hint && h("p", { class: "hint" }, hint));
  };
  const line = (more = {}) => h("input", { class: "input", autocomplete: "off", ...more });
  const name = line({ maxlength: 500 });
  const description = line({ maxlength: 1000 });
  const metadata = line({ placeholder: "tenant=7, team=blue" });
  const delay = line({ inputmode: "decimal", placeholder: "0" });
  const kept = h("select", { class: "input" }, h("option", { value: "memory" }, "memory"), h("option", { value: "default" }, "documents (as the settings say)"));
  const partition = line({ placeholder: "default", maxlength: 64 });
  const audit = h("input", { type: "checkbox", id: newId("option"), checked: true });
  const partitionField = field("Partition", partition);
  const show = () => { partitionField.hidden = kept.value === "memory"; };
  kept.addEventListener("change", show);
  show();
  get("api/sources").then(({ items }) => {
    const sources = items.filter((source) => source.name !== "memory");
    kept.append(...sources.map((source) => h("option", { value: `source:${source.name}` }, `source ${source.name}`)));
    kept.querySelector('[value="default"]').remove();
    if (sources.length) kept.value = `source:${sources[0].name}`;
    show();
  }, () => {});
  return {
    elements: [field("Name", name, "What it is called in lists."), field("Description", description), field("Metadata", metadata), field("Begin after (seconds)", delay), field("Kept in", kept), partitionField,
      h("label", { class: "check" }, audit, "Keep a record of each attempt")],
    read() {
      const seconds = delay.value.trim() === "" ? 0 : Number(delay.value);
      if (!(seconds >= 0)) return new Error(`Begin after: expected seconds, got “${delay.value}”`);
      const pairs = metadata.value.split(",").map((pair) => pair.split("=")).filter(([key]) => key.trim());
      if (pairs.some((pair) => pair.length < 2)) return new Error("Metadata: expected key=value, several with commas between");
      const place = partition.value.trim();
      const source = kept.value.startsWith("source:") ? kept.value.slice(7) : null;
      return {
        name: name.value.trim() || null, description: description.value.trim() || null, delay_s: seconds, audit: audit.checked,
        metadata: pairs.length ? Object.fromEntries(pairs.map(([key, ...rest]) => [key.trim(), value(rest.join("=").trim())])) : null,
        persist: kept.value === "memory" ? null : { source, partition: place || null },
      };
    },
  };
}

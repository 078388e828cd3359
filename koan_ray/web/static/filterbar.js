// The bar above a list: search, statuses, further filters, order, saved views.

import { get } from "./api.js";
import { askText } from "./dialog.js";
import { h, icon, mark, newId, put } from "./dom.js";
import { AGE, DEFAULT_ORDER, ORDERS, TODAY, hiddenCount, toAddress } from "./filters.js";
import { STATUSES, statusClass } from "./format.js";
import { whenReleased } from "./pressed.js";
import { bind } from "./shortcuts.js";
import { keep, recall } from "./stored.js";

const TYPING_MS = 220;
const BUILT_IN = [
  ["All", { metadata: {} }],
  ["Running", { status: ["running"], metadata: {} }],
  ["Failed", { status: ["failed"], order_by: "-completed_at", metadata: {} }],
];
const MOST_VIEWS = 30;
const BETWEEN = "between";
const PERIODS = [
  ["", "any time"], ["15m", "in the last 15 minutes"], ["1h", "in the last hour"], [TODAY, "today"], ["24h", "in the last 24 hours"],
  ["7d", "in the last 7 days"], ["30d", "in the last 30 days"],
];

/** The tools of a list. `change(filters)` is called with each new set of filters. */
export class FilterBar {
  constructor({ filters, change, isArchive = false }) {
    Object.assign(this, { filters, change, isArchive });
    this.search = h("input", {
      class: "input", type: "search", placeholder: "Search names, kinds, errors", "aria-label": "Search jobs", maxlength: 200,
      value: filters.text ?? "", autocomplete: "off", spellcheck: "false",
      on: {
        input: () => { clearTimeout(this.typing); this.typing = setTimeout(() => this._searched(), TYPING_MS); },
        change: () => this._searched(), // whoever goes on at once goes from the list that was asked for, and comes back to it
        keydown: (event) => { if (event.key === "Escape") { this.search.value = ""; this.set("text", ""); this.search.blur(); } },
      },
    });
    this.statuses = (isArchive ? STATUSES.slice(3) : STATUSES.slice(1)).map((status) => this._status(status));
    this.order = h("select", { class: "input", "aria-label": "Order", on: { change: () => this.set("order_by", this.order.value === DEFAULT_ORDER ? "" : this.order.value) } },
      ORDERS.map(([value, text]) => h("option", { value, selected: value === (filters.order_by ?? DEFAULT_ORDER) }, text)));
    this.panel = h("div", { class: "card filters", id: newId("filters"), hidden: true });
    this.more = h("button", { class: "chip", type: "button", "aria-expanded": "false", "aria-controls": this.panel.id, on: { click: () => this._toggle() } });
    this.views = h("div", { class: "chip-set slides", role: "group", "aria-label": "Views" });
    this.tools = h("div", { class: "tools" }, h("div", { class: "search" }, icon("search"), this.search),
      h("div", { class: "chip-set slides", role: "group", "aria-label": "Status" }, this.statuses.map(([, chip]) => chip)), this.more,
      h("div", {}, this.order));
    this.elements = [this.views, h("div", { class: "tool-rows" }, this.tools, this.panel)];
    this.attach();
    this._mark();
    this._drawViews();
  }

  attach() {
    this.detach = bind({ "/": () => this.search.focus() });
  }

  _searched() {
    clearTimeout(this.typing);
    this.set("text", this.search.value.trim());
  }

  _status(status) {
    const chip = h("button", { class: `chip ${statusClass(status)}`, type: "button", on: { click: () => {
      const chosen = new Set(this.filters.status ?? []);
      if (!chosen.delete(status)) chosen.add(status);
      this.set("status", [...chosen]);
    } } }, h("span", { class: "dot", "aria-hidden": "true" }), status);
    return [status, chip];
  }

  /** Change one filter; an empty value takes it away. */
  set(name, value) {
    const filters = { ...this.filters, [name]: value };
    if (value === "" || value?.length === 0) delete filters[name];
    this._become(filters);
  }

  _become(filters) {
    if (JSON.stringify(filters) === JSON.stringify(this.filters)) return;
    this.filters = filters;
    this.change(filters);
    whenReleased(() => { // whoever goes on from the search by a click finds what is under the mouse
      this._mark();
      this._drawViews();
    }, this);
  }

  _mark() {
    for (const [status, chip] of this.statuses) mark(chip, "aria-pressed", String(this.filters.status?.includes(status) ?? false));
    const n = hiddenCount(this.isArchive ? { ...this.filters, source: null, partition: null } : this.filters);
    put(this.more, icon("filter"), n ? `Filters (${n})` : "Filters");
    mark(this.more, "aria-pressed", String(n > 0));
  }

  _toggle() {
    this.panel.hidden = !this.panel.hidden;
    mark(this.more, "aria-expanded", String(!this.panel.hidden));
    if (!this.panel.hidden) {
      this._drawPanel();
      this.panel.querySelector("select")?.focus(); // a text field would bring up a phone's keyboard
    } else if (this.panel.contains(document.activeElement) || document.activeElement === document.body) this.more.focus();
  }

  _drawPanel() {
    const fields = [
      this._kinds(), this._period("Created", "created"), this._period("Ended", "completed"),
      ...(this.isArchive ? [] : [this._choice("Kept in", "source", this._sources()), this._input("Partition", "partition", { placeholder: "all but archives; * is all" })]),
      this._metadata(), this._input("Exact name", "name"), this._input("Correlation id", "correlation_id"), this._input("Children of job (id)", "parent_job_id"),
      h("div", { class: "field wide" }, h("div", { class: "actions" },
        h("button", { class: "button", type: "button", on: { click: () => this._toggle() } }, "Done"),
        h("button", { class: "button", type: "button", on: { click: () => this._clear() } }, "Clear filters"))),
    ];
    put(this.panel, fields);
  }

  /** Kinds to switch on and off: those that there are, and those that are asked for. */
  _kinds() {
    const chips = h("div", { class: "chip-set kinds-choice", role: "group", "aria-label": "Kinds" });
    const draw = (kinds) => put(chips, [...new Set([...kinds, ...(this.filters.kind ?? [])])].sort().map((kind) => {
      const chip = h("button", { class: "chip text", type: "button", "aria-pressed": String(this.filters.kind?.includes(kind) ?? false), on: { click: () => {
        const chosen = new Set(this.filters.kind ?? []);
        if (!chosen.delete(kind)) chosen.add(kind);
        mark(chip, "aria-pressed", String(chosen.has(kind)));
        this.set("kind", [...chosen]);
      } } }, kind);
      return chip;
    }));
    draw([]);
    get("api/kinds").then(({ items }) => draw(items.map((item) => item.kind)), () => {});
    return h("div", { class: "field wide" }, h("span", { class: "label", "aria-hidden": "true" }, "Kinds"), chips);
  }

  /** When something was: within the last so long, or between two instants. */
  _period(label, name) {
    const { [`${name}_after`]: after, [`${name}_before`]: before } = this.filters;
    const isAge = !before && (AGE.test(after) || after === TODAY);
    const chosen = isAge ? after : after || before ? BETWEEN : "";
    const choices = [...PERIODS, ...(isAge && !PERIODS.some(([value]) => value === after) ? [[after, `in the last ${after}`]] : []), [BETWEEN, "between …"]];
    const instants = [["from", after], ["until", before]].map(([word, value]) => this._input(`${label} ${word}`, `${name}_${word === "from" ? "after" : "before"}`, { type: "datetime-local", value: chosen === BETWEEN ? value ?? "" : "" }));
    instants.forEach((field) => { field.hidden = chosen !== BETWEEN; });
    const select = h("select", { class: "input", on: { change: () => {
      instants.forEach((field) => { field.hidden = select.value !== BETWEEN; field.querySelector("input").value = ""; });
      const { [`${name}_after`]: _, [`${name}_before`]: __, ...rest } = this.filters;
      this._become(select.value && select.value !== BETWEEN ? { ...rest, [`${name}_after`]: select.value } : rest);
    } } }, choices.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
    return [this._field(label, select), instants];
  }

  _clear() {
    const { text, source, partition } = this.filters;
    this._become(this.isArchive ? { text, source, partition, metadata: {} } : { ...(text ? { text } : {}), metadata: {} });
    this._drawPanel();
  }

  _field(label, input) {
    input.id = input.id || newId("filter");
    return h("div", { class: "field" }, h("label", { for: input.id }, label), input);
  }

  _input(label, name, options = {}) {
    const input = h("input", { class: "input", maxlength: 200, autocomplete: "off", value: this.filters[name] ?? "", ...options, on: { change: () => this.set(name, input.value.trim()) } });
    return this._field(label, input);
  }

  _choice(label, name, loading) {
    const select = h("select", { class: "input", on: { change: () => this.set(name, select.value) } }, h("option", { value: "" }, "anywhere"));
    loading.then((values) => select.append(...values.map((value) => h("option", { value, selected: this.filters[name] === value }, value))), () => {});
    return this._field(label, select);
  }

  async _sources() {
    return (await get("api/sources")).items.map((source) => source.name);
  }

  _metadata() {
    const text = Object.entries(this.filters.metadata).map(([name, value]) => `${name}=${value}`).join(", ");
    const input = h("input", { class: "input", placeholder: "tenant=7, team=blue", value: text, autocomplete: "off", on: { change: () => {
      const pairs = input.value.split(",").map((pair) => pair.split("=")).filter(([name, ...rest]) => name.trim() && rest.length);
      this._become({ ...this.filters, metadata: Object.fromEntries(pairs.map(([name, ...rest]) => [name.trim(), rest.join("=").trim()])) });
    } } });
    return this._field("Metadata", input);
  }

  _drawViews() {
    if (this.isArchive) return;
    const here = toAddress(this.filters);
    const saved = recall("views", []).filter((view) => typeof view?.name === "string" && typeof view.address === "string" && view.address.startsWith("#/jobs"));
    const isKnown = [...BUILT_IN.map(([, filters]) => toAddress(filters)), ...saved.map((view) => view.address)].includes(here);
    put(this.views,
      BUILT_IN.map(([name, filters]) => h("a", { class: "chip", href: toAddress(filters), "aria-current": toAddress(filters) === here ? "true" : null }, name)),
      saved.map((view) => h("span", { class: "chip-join" },
        h("a", { class: "chip", href: view.address, "aria-current": view.address === here ? "true" : null }, view.name),
        h("button", { class: "icon-button small-icon", type: "button", "aria-label": `Delete the view ${view.name}`, on: { click: () => {
          keep("views", saved.filter((item) => item !== view));
          this._drawViews();
        } } }, icon("close")))),
      !isKnown && h("button", { class: "link-button small", type: "button", on: { click: () => this._save(here, saved) } }, "Save this view"));
  }

  async _save(address, saved) {
    const name = await askText({ headline: "Save this view", label: "Name", verb: "Save" });
    if (!name) return;
    keep("views", [...saved.filter((view) => view.name !== name), { name, address }].slice(-MOST_VIEWS));
    this._drawViews();
  }

  close() {
    clearTimeout(this.typing);
    this.detach();
  }
}

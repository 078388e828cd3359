// The items of a batch: how many are done, and those that are given up, page by page.

import { get } from "./api.js";
import { h, put } from "./dom.js";
import { stringify } from "./exact.js";
import { count, plural } from "./format.js";
import { copier, payload } from "./payload.js";
import { failed, loading } from "./states.js";
import { trace } from "./attempts.js";

/** The counts of a batch's items. */
export function itemFigures(items) {
  const figure = (name, n) => h("div", {}, h("b", {}, count(n)), h("span", { class: "small muted" }, name));
  return h("div", { class: "item-figures" }, figure("items", items.total), figure("processed", items.processed), figure("dead", items.failed), figure("skipped", items.skipped));
}

/** A table of the dead items of a job, read when it is asked for. */
export class DeadItems {
  constructor(jobId) {
    this.jobId = jobId;
    this.rows = h("tbody", {});
    this.foot = h("div", { class: "card-body" });
    this.element = h("div", {}, h("div", { class: "scroll" }, h("table", { class: "plain-table" }, h("caption", { class: "unseen" }, "Dead items"),
      h("thead", {}, h("tr", {}, ["Item", "Value", "Error", "Attempts"].map((text) => h("th", { scope: "col" }, text)))), this.rows)), this.foot);
    this.read();
  }

  async read(cursor) {
    put(this.foot, loading("Reading dead items"));
    try {
      const page = await get(`api/jobs/${encodeURIComponent(this.jobId)}/failed-items`, { limit: 50, cursor });
      this.rows.append(...page.items.map(itemRow));
      put(this.foot, page.cursor
        ? h("button", { class: "button", type: "button", on: { click: () => this.read(page.cursor) } }, "Show more")
        : h("span", { class: "small muted" }, plural(this.rows.children.length, "dead item")));
    } catch (problem) {
      put(this.foot, failed(problem, () => this.read(cursor)));
    }
  }
}

function itemRow(item) {
  return h("tr", {}, h("td", { class: "number" }, count(item.index)),
    h("td", {}, item.item === null || item.item === undefined ? h("span", { class: "muted" }, "not shown") : [payload(item.item), copier(() => stringify(item.item), "Copy the item")]),
    h("td", {}, item.error && [h("b", { class: "text" }, item.error.type), " ", h("span", { class: "text" }, item.error.message ?? ""), item.error.stack_trace && trace(item.error.stack_trace, `Stack trace of item ${item.index}`)]),
    h("td", { class: "number" }, count(item.attempts)));
}

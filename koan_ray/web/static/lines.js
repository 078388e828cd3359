// Short lists of jobs, one to a line, that keep up with the events.

import { h, mark, put, write } from "./dom.js";
import { count, percent, since, statusClass, title } from "./format.js";
import { note, took } from "./jobrow.js";

/** One job as a line: what it is, how far it is. */
class Line {
  constructor(job, right) {
    this.right = right;
    this.name = h("b", { class: "ellipsis text" });
    this.kind = h("span", { class: "small muted ellipsis text" });
    this.fill = h("i", {});
    this.bar = h("span", { class: "bar", "aria-hidden": "true" }, this.fill);
    this.share = h("span", { class: "small" });
    this.said = h("span", { class: "small muted ellipsis text" });
    this.end = h("span", { class: "small muted right ellipsis" });
    this.link = h("a", { class: "line", href: `#/jobs/${encodeURIComponent(job.id)}` },
      h("span", { class: "what" }, this.name, this.kind), h("span", { class: "how" }, h("span", { class: "with" }, this.bar, this.share), this.said), this.end);
    this.element = h("li", {}, this.link);
  }

  show(job) {
    write(this.name, title(job));
    write(this.kind, job.name ? job.kind : job.id);
    this.bar.parentNode.hidden = job.status === "failed" && !job.items;
    this.bar.className = `bar ${statusClass(job.status)}`;
    this.fill.style.transform = `scaleX(${job.progress})`;
    write(this.share, percent(job.progress));
    write(this.said, job.items ? `${job.status} · ${itemsNote(job.items)}` : note(job));
    mark(this.said, "title", this.said.textContent || null);
    if (this.right === "took") write(this.end, took(job));
    else if (this.endedAt !== job.completed_at) {
      this.endedAt = job.completed_at;
      put(this.end, since(job.completed_at ?? job.created_at));
    }
  }
}

function itemsNote(items) {
  const dead = items.failed ? `, ${count(items.failed)} dead` : "";
  const skipped = items.skipped ? `, ${count(items.skipped)} skipped` : "";
  return `${count(items.processed)} of ${items.total === null ? "?" : count(items.total)} items${dead}${skipped}`;
}

/** A list of lines that is drawn anew from a list of jobs, and keeps what is the same. */
export class Lines {
  constructor({ right = "took", nothing }) {
    Object.assign(this, { right, nothing });
    this.lines = new Map();
    this.list = h("ul", { class: "line-list" });
    this.over = h("div", {});
    this.element = h("div", {}, this.list, this.over);
  }

  show(jobs) {
    const wanted = new Set(jobs.map((job) => job.id));
    for (const [id, line] of this.lines) {
      if (wanted.has(id)) continue;
      line.element.remove();
      this.lines.delete(id);
    }
    let before = null;
    for (const job of jobs) {
      let line = this.lines.get(job.id);
      if (!line) this.lines.set(job.id, line = new Line(job, this.right));
      line.show(job);
      const next = before ? before.nextSibling : this.list.firstChild;
      if (next !== line.element) this.list.insertBefore(line.element, next);
      before = line.element;
    }
    const isEmpty = jobs.length === 0;
    if (isEmpty !== this.wasEmpty) {
      this.wasEmpty = isEmpty;
      put(this.over, isEmpty ? this.nothing() : []);
    }
  }
}

// The tree that a job belongs to, kept up to date node by node.

import { get } from "./api.js";
import { h, mark, put, write } from "./dom.js";
import { percent, plural, statusClass, title } from "./format.js";
import { isOlder, progressed } from "./sorted.js";

const REREAD_MS = 1_200;
const SHOWN = 60; // children of one node, until one asks for more

export class JobTree {
  /** shown(n): called with how many jobs the tree has each time it was read. */
  constructor(jobId, shown) {
    Object.assign(this, { jobId, shown });
    this.nodes = new Map();
    this.open = new Set();
    this.element = h("nav", { class: "tree", "aria-label": "Tree of jobs" });
    this.abort = new AbortController();
  }

  async read() {
    clearTimeout(this.timer);
    this.timer = null;
    try {
      const tree = await get(`api/jobs/${encodeURIComponent(this.jobId)}/tree`, {}, this.abort.signal);
      this.nodes.clear();
      put(this.element, h("ul", {}, this._node(tree.root)), tree.truncated && h("p", { class: "small muted" }, "The tree has more jobs than are shown."));
      this.shown(tree.n_jobs);
    } catch {
      // The job page tells of what is wrong; the tree stays as it was.
    }
  }

  _node({ job, children, more }) {
    const share = h("span", { class: "share" });
    const badge = h("span", { class: "badge" }, h("span", { class: "dot", "aria-hidden": "true" }), h("span", { class: "unseen" }));
    const link = h("a", { class: "node", href: `#/jobs/${encodeURIComponent(job.id)}`, "aria-current": job.id === this.jobId ? "true" : null },
      badge, h("span", { class: "ellipsis text" }, title(job)), share);
    const node = { job, badge, share, link };
    this.nodes.set(job.id, node);
    this._show(node);
    const below = h("ul", {});
    this._children(below, children, job.id);
    return h("li", {}, link, (children.length > 0 || more) && below, more && h("p", { class: "small muted" }, "… and more below"));
  }

  _children(place, children, id) {
    const limit = this.open.has(id) ? children.length : SHOWN;
    put(place, children.slice(0, limit).map((child) => this._node(child)),
      children.length > limit && h("li", {}, h("button", { class: "link-button small", type: "button", on: { click: () => { this.open.add(id); this._children(place, children, id); } } },
        `${plural(children.length - limit, "more job")} here`)));
    for (const child of children.slice(limit)) this.nodes.set(child.job.id, { job: child.job });
  }

  _show({ job, badge, share, link }) {
    if (!link) return;
    badge.className = `badge ${statusClass(job.status)}`;
    write(badge.lastChild, job.status);
    write(share, job.status === "running" ? percent(job.progress) : job.status);
    mark(link, "title", `${title(job)}: ${job.status}`);
  }

  /** Take in a changed job, if it belongs here. */
  changed(job) {
    const node = this.nodes.get(job.id);
    if (node) {
      if (isOlder(job, node.job)) return;
      node.job = job;
      this._show(node);
    } else if (job.parent_job_id && this.nodes.has(job.parent_job_id)) {
      this.readLater(this.nodes.size > 1 ? REREAD_MS : 100);
    }
  }

  /** Read the tree again, however often this is called. */
  readLater(wait = REREAD_MS) {
    if (!this.timer) this.timer = setTimeout(() => this.read(), wait);
  }

  progress(update) {
    const node = this.nodes.get(update.job_id);
    if (!node || update.sequence <= node.job.progress_sequence || node.job.status !== "running") return;
    node.job = progressed(node.job, update);
    this._show(node);
  }

  close() {
    clearTimeout(this.timer);
    this.abort.abort();
  }
}

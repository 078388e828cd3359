// Batches: jobs over items, with how many are done and how many are dead.

import { get } from "./api.js";
import { h, put } from "./dom.js";
import { Lines } from "./lines.js";
import { listen } from "./live.js";
import { SortedJobs } from "./sorted.js";
import { empty, failed, loading } from "./states.js";

const PAGE = 100;
const REREAD_MS = 2_000;

export function batchesPage() {
  return new Batches();
}

class Batches {
  constructor() {
    this.title = "Batches";
    this.jobs = new SortedJobs();
    this.lines = new Lines({ nothing: () => empty("No batches", "A batch is a job over items (koan_ray.FiniteJob). Its items are counted here as they are done.") });
    this.foot = h("div", { class: "table-foot" });
    this.more = h("button", { class: "button", type: "button", on: { click: () => this.read() } }, "Show older batches");
    put(this.lines.over, loading("Looking for batches"));
    this.element = h("div", { class: "page" }, h("div", { class: "page-head" }, h("h1", { tabindex: -1 }, "Batches")),
      h("div", { class: "card" }, this.lines.element, this.foot));
    this.abort = new AbortController();
    this.stop = listen({
      job: ({ job }) => { if (job.has_items && !job.archived) { this.jobs.put(job); this.draw(); } },
      progress: (update) => { if (this.jobs.progress(update)) this.draw(); },
      removed: ({ job_id: id }) => { if (this.jobs.delete(id) >= 0) this.draw(); },
      gap: () => this.startAgain(),
    });
    this.read();
  }

  startAgain() {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = null;
      this.jobs = new SortedJobs();
      this.cursor = undefined;
      this.read();
    }, REREAD_MS);
  }

  /** Read the next page. */
  async read() {
    this.more.disabled = true;
    try {
      const page = await get("api/jobs", { has_items: true, limit: PAGE, cursor: this.cursor }, this.abort.signal);
      this.cursor = page.cursor;
      this.jobs.addPage(page.items, page.cursor === null);
      this.draw();
    } catch (problem) {
      if (!this.abort.signal.aborted) put(this.foot, failed(problem, () => this.read()));
      return;
    }
    this.more.disabled = false;
    put(this.foot, this.cursor && this.more);
    this.foot.hidden = !this.cursor;
  }

  draw() {
    this.lines.show(this.jobs.rows.map((entry) => entry.job));
  }

  close() {
    clearTimeout(this.timer);
    this.abort.abort();
    this.stop();
  }
}

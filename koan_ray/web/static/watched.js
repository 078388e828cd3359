// The first jobs of a query, kept up to date by events: what the overview and the batches show.

import { get } from "./api.js";
import { tester, toQuery } from "./filters.js";
import { listen } from "./live.js";
import { SortedJobs, isUntold, newest } from "./sorted.js";

const REREAD_MS = 2_000;
const MOST_MISSED = 2_000;

export class WatchedJobs {
  /** filters: which jobs; limit: how many are read and shown; show(jobs): called at most once a frame. */
  constructor({ filters, limit, show, trouble = () => {}, keeps = () => true }) {
    Object.assign(this, { filters, limit, show, trouble, keeps });
    this.passes = tester(filters).passes; // none of these searches for a text
    this.missed = new Map(); // what has changed while a page was on its way
    this.jobs = new SortedJobs(filters.order_by);
    this.abort = new AbortController();
    this.stop = listen({
      job: ({ job }) => this.changed(job), progress: (update) => { if (this.jobs.progress(update)) this.later(); },
      removed: ({ job_id: id }) => { if (this.jobs.delete(id) >= 0) this.refill(); }, gap: () => this.readLater(),
    });
    this.read();
  }

  async read() {
    clearTimeout(this.timer);
    this.timer = null;
    this.readAt = Date.now();
    this.missed.clear();
    try {
      const page = await get("api/jobs", { ...toQuery(this.filters), limit: this.limit }, this.abort.signal);
      const fresh = new SortedJobs(this.filters.order_by);
      fresh.addPage(page.items.filter(this.keeps).map((job) => newest(job, this.jobs.get(job.id))), page.cursor === null);
      this.jobs = fresh;
      this.isRead = true;
      for (const job of [...this.missed.values()]) this.changed(job);
      this.later();
    } catch (problem) {
      if (!this.abort.signal.aborted) this.trouble(problem);
    }
  }

  readLater() {
    if (!this.timer) this.timer = setTimeout(() => this.read(), Math.max(0, (this.readAt ?? 0) + REREAD_MS - Date.now()));
  }

  changed(job) {
    if (this.missed.size < MOST_MISSED) this.missed.set(job.id, job);
    if (this.passes(job) && this.keeps(job)) {
      this.jobs.put(job);
      if (this.jobs.has(job.id) && isUntold(this.jobs.get(job.id))) this.readLater();
    } else if (this.jobs.delete(job.id) >= 0) this.refill();
    else return;
    while (this.jobs.size > this.limit) {
      this.jobs.delete(this.jobs.at(this.jobs.size - 1).id);
      this.jobs.isWhole = false;
    }
    this.later();
  }

  /** Some are gone: there may be others behind. */
  refill() {
    if (!this.jobs.isWhole && this.jobs.size < this.limit) this.readLater();
    this.later();
  }

  later() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; if (this.isRead) this.show(this.jobs.rows.map((entry) => entry.job)); });
  }

  close() {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.abort.abort();
    this.stop();
  }
}

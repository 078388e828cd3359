// A list of jobs that keeps up by itself: read by pages as one scrolls, changed by the stream of events.

import { get, may } from "./api.js";
import { h, mark, put, write } from "./dom.js";
import { tester, toQuery } from "./filters.js";
import { plural } from "./format.js";
import { JobRow } from "./jobrow.js";
import { listen } from "./live.js";
import { whenReleased } from "./pressed.js";
import { VirtualRows } from "./rows.js";
import { bind } from "./shortcuts.js";
import { MOST_ROWS, SortedJobs, isUntold, newest } from "./sorted.js";
import { empty, failed, loading } from "./states.js";

const PAGE = 200;
const MOST_MISSED = 2_000; // changes that are kept while a page is on its way
const REREAD_MS = 2_000; // between two readings of the whole list, however many gaps there are
const REREAD_ROWS = 1_000; // so many are read again at most where the list stands
const HEADS = [["Status", "status-cell"], ["Job", "who-cell"], ["Progress", "how-cell"], ["Attempt", "attempt-cell"], ["Kept in", "place-cell"], ["Created", "age-cell"], ["Took", "took-cell right"]];

export class JobList {
  /** filters: of the list. keeps(job): further test. nothing(): what stands there when no job matches. picked: called with the selection. */
  constructor({ filters, keeps = () => true, nothing, onPick = () => {}, label = "Jobs" }) {
    Object.assign(this, { keeps, nothing, onPick });
    this.picked = new Set();
    this.missed = new Map();
    this.canPick = may("operator") || may("admin");
    this.all = h("input", { type: "checkbox", "aria-label": "Select all rows that are loaded", on: { change: () => this._pickAll(this.all.checked) } });
    this.body = h("tbody", { role: "rowgroup" });
    this.table = h("table", { class: "jobs", role: "table", "aria-label": label },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row", "aria-rowindex": 1 },
        h("th", { role: "columnheader", class: "pick", scope: "col" }, this.canPick && h("label", {}, this.all)),
        HEADS.map(([text, name]) => h("th", { role: "columnheader", scope: "col", class: name }, text)))),
      this.body);
    this.over = h("div", {});
    this.scroll = h("div", { class: "table-scroll", tabindex: -1 }, this.table, this.over);
    this.said = h("span", { role: "status" });
    this.rows = new VirtualRows({
      scroll: this.scroll, body: this.body, size: () => this.jobs.size, key: (place) => this.jobs.at(place).id,
      make: () => new JobRow({ jobAt: (place) => this.jobs.at(place), isPicked: (id) => this.picked.has(id), onPick: (id, isRange) => this.pick(id, isRange), canPick: this.canPick }),
      atEnd: () => this._more(),
    });
    this.unlisten = listen({
      job: ({ job }) => this._changed(job), progress: (update) => { if (this.jobs.progress(update)) this._drawLater(); },
      removed: ({ job_id: id }) => this._gone(id), gap: () => this._reread(),
    });
    this.ticking = setInterval(() => this._drawLater(), 1000);
    this.attach();
    this._restart(filters);
  }

  attach() {
    this.unbind = bind({
      j: () => this._step(1), ArrowDown: () => this._step(1), k: () => this._step(-1), ArrowUp: () => this._step(-1),
      x: () => { const id = this._focused(); if (id) this.pick(id); return Boolean(id); },
    });
  }

  detach() {
    this.unbind();
  }

  /** Read a list with other filters; not while something is being pressed: what is under the mouse stays there for the click. */
  restart(filters) {
    whenReleased(() => { if (!this.isClosed) this._restart(filters); }, this);
  }

  _restart(filters) {
    this.filters = filters;
    this.test = tester(filters);
    this.jobs = new SortedJobs(filters.order_by);
    this.cursor = undefined;
    this.isReading = false;
    this.problem = null;
    this.reading?.abort();
    this.reading = new AbortController();
    this.scroll.scrollTop = 0;
    this._unpick();
    this._more();
  }

  async _more() {
    if (this.isReading || this.cursor === null || this.problem || this.jobs.size >= MOST_ROWS) return;
    const { reading } = this;
    this.isReading = true;
    this.missed.clear();
    this._drawLater();
    try {
      const page = await get("api/jobs", { ...toQuery(this.filters), limit: PAGE, cursor: this.cursor }, reading.signal);
      if (reading !== this.reading) return;
      this.jobs.addPage(page.items.filter(this.keeps), page.cursor === null);
      this.cursor = page.cursor;
      this._replay();
    } catch (problem) {
      if (reading !== this.reading) return;
      this.problem = problem;
    } finally {
      if (reading === this.reading) {
        this.isReading = false;
        this._drawLater();
      }
    }
  }

  /** Take in what has changed while a page was on its way, which may be older. */
  _replay() {
    for (const job of [...this.missed.values()]) this._changed(job);
  }

  _changed(job) {
    if (this.missed.size < MOST_MISSED) this.missed.set(job.id, job);
    if (!this.test.passes(job) || !this.keeps(job)) {
      if (this.jobs.delete(job.id) >= 0) this._drawLater();
      return;
    }
    if (!this.jobs.has(job.id) && !this.test.hasText(job)) {
      if (job.status === "failed") this._reread(); // the text may be in its error
      return;
    }
    const place = this.jobs.put(job);
    if (isUntold(this.jobs.get(job.id) ?? job)) this._reread();
    if (place >= 0 && place * this.rows.rowHeight < this.scroll.scrollTop) this.rows.shift(1);
    this._drawLater();
  }

  _gone(id) {
    if (this.jobs.delete(id) < 0) return;
    if (this.picked.delete(id)) this._picked();
    this._drawLater();
  }

  /** Changes were missed: read the list again as far as it was read, without moving what is in sight. */
  _reread() {
    if (this.rereading) return;
    const wait = Math.max(0, (this.rereadAt ?? 0) + REREAD_MS - Date.now());
    this.rereading = setTimeout(async () => {
      this.rereadAt = Date.now();
      this.rereading = null;
      const { reading } = this;
      const fresh = new SortedJobs(this.filters.order_by);
      let cursor;
      this.missed.clear();
      try {
        do {
          const page = await get("api/jobs", { ...toQuery(this.filters), limit: PAGE, cursor }, reading.signal);
          fresh.addPage(page.items.filter(this.keeps).map((job) => newest(job, this.jobs.get(job.id))), page.cursor === null);
          cursor = page.cursor;
        } while (cursor !== null && fresh.size < Math.min(this.jobs.size, REREAD_ROWS));
      } catch {
        return; // the connection is away again; its return is another gap
      }
      if (reading !== this.reading) return;
      this.jobs = fresh;
      this.cursor = cursor;
      this.problem = null;
      this._replay();
      for (const id of this.picked) if (!fresh.has(id)) this.picked.delete(id);
      this._picked();
      this._drawLater();
    }, wait);
  }

  _drawLater() {
    if (this.table.isConnected || !this.hasBeenDrawn) this.rows.later();
    if (!this.saying) this.saying = requestAnimationFrame(() => { this.saying = 0; this._say(); });
  }

  _say() {
    const { size } = this.jobs;
    this.hasBeenDrawn = true;
    mark(this.table, "aria-rowcount", this.cursor === null ? size + 1 : -1);
    this.table.hidden = size === 0;
    const state = size ? (this.problem ? "trouble" : "rows") : this.problem ? "problem" : this.isReading || this.cursor ? "loading" : "empty";
    if (state !== this.state) {
      this.state = state;
      const again = () => { this.problem = null; this._more(); };
      const shown = { rows: [], loading: loading("Looking for jobs"), empty: this.nothing(), problem: this.problem && failed(this.problem, again), trouble: this.problem && failed(this.problem, again) };
      put(this.over, shown[state]);
    }
    if (!size && this.cursor && !this.isReading && !this.problem) this._more(); // a page of which nothing passes
    const more = size >= MOST_ROWS ? "; narrow the filters to see others" : this.cursor === null ? "" : ", more as you scroll";
    write(this.said, size ? `${plural(size, "job")}${more}` : "");
  }

  // --- rows by keyboard ----------------------------------------------------------------------------------------------

  _focused() {
    return document.activeElement?.closest?.("tr[data-id]")?.dataset.id ?? null;
  }

  _step(by) {
    const id = this._focused();
    const from = id ? this.jobs.placeOf(id) : -1;
    const to = from < 0 ? Math.floor(this.scroll.scrollTop / this.rows.rowHeight) : from + by;
    if (to < 0 || to >= this.jobs.size) return Boolean(id);
    this.rows.focus(to);
    return true;
  }

  // --- selection -----------------------------------------------------------------------------------------------------

  pick(id, isRange = false) {
    if (!this.canPick) return;
    const wants = !this.picked.has(id);
    const from = isRange && this.lastPicked && this.jobs.has(this.lastPicked) ? this.jobs.placeOf(this.lastPicked) : this.jobs.placeOf(id);
    const to = this.jobs.placeOf(id);
    for (let place = Math.min(from, to); place <= Math.max(from, to); place += 1) {
      if (wants) this.picked.add(this.jobs.at(place).id);
      else this.picked.delete(this.jobs.at(place).id);
    }
    this.lastPicked = id;
    this._picked();
    this._drawLater();
  }

  _pickAll(wants) {
    this.picked.clear();
    if (wants) for (const { job } of this.jobs.rows) this.picked.add(job.id);
    this._picked();
    this._drawLater();
  }

  _unpick() {
    this.picked.clear();
    this.lastPicked = null;
    this._picked();
  }

  unpickAll() {
    this._unpick();
    this._drawLater();
  }

  _picked() {
    const n = this.picked.size;
    this.all.checked = n > 0 && n === this.jobs.size;
    this.all.indeterminate = n > 0 && n < this.jobs.size;
    this.onPick(n);
  }

  close() {
    this.isClosed = true;
    clearInterval(this.ticking);
    clearTimeout(this.rereading);
    cancelAnimationFrame(this.saying);
    this.reading.abort();
    this.unlisten();
    this.unbind();
    this.rows.close();
  }
}

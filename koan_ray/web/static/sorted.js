// Jobs in the order of a query, as many as have been read: the pages of the API and what changed since.

import { may } from "./api.js";
import { microseconds } from "./format.js";

/** Most rows that are held; a list of more is to be narrowed. */
export const MOST_ROWS = 100_000;

export class SortedJobs {
  constructor(orderBy = "-created_at") {
    this.field = orderBy.replace(/^-/, "");
    this.sign = orderBy.startsWith("-") ? -1 : 1;
    this.rows = [];
    this.byId = new Map();
    this.isWhole = false; // there is nothing behind the last row
  }

  _compare(a, b) {
    return this.sign * (a.at - b.at || (a.job.id < b.job.id ? -1 : a.job.id > b.job.id ? 1 : 0));
  }

  _entry(job) {
    return { at: microseconds(job[this.field]), job };
  }

  /** Return where an entry stands, or would stand. */
  _place(entry) {
    let low = 0;
    let high = this.rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this._compare(this.rows[middle], entry) < 0) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  get size() {
    return this.rows.length;
  }

  has(id) {
    return this.byId.has(id);
  }

  get(id) {
    return this.byId.get(id)?.job;
  }

  at(place) {
    return this.rows[place].job;
  }

  /** Return the place of a job; -1 if it is not held. */
  placeOf(id) {
    const entry = this.byId.get(id);
    return entry ? this._place(entry) : -1;
  }

  /** Add a page as it was read. */
  addPage(jobs, isLast) {
    for (const job of jobs) {
      if (this.rows.length >= MOST_ROWS) break;
      const known = this.byId.get(job.id);
      if (known && isOlder(job, known.job)) continue;
      if (known) this.delete(job.id);
      this._insert(this._entry(job));
    }
    this.isWhole = isLast;
  }

  /** Take a changed job in; returns where it was added, or -1 if it was there, or stands behind what has been read. */
  put(job) {
    const entry = this._entry(job);
    const known = this.byId.get(job.id);
    if (known && known.at === entry.at) {
      if (!isOlder(job, known.job)) known.job = withProgress(job, known.job);
      return -1;
    }
    if (known) this.delete(job.id);
    const place = this._place(entry);
    if (place === this.rows.length && !this.isWhole && !known) return -1;
    this._insert(entry, place);
    return known ? -1 : place;
  }

  _insert(entry, place = this._place(entry)) {
    if (place === this.rows.length) this.rows.push(entry);
    else this.rows.splice(place, 0, entry);
    this.byId.set(entry.job.id, entry);
    if (this.rows.length > MOST_ROWS) {
      this.byId.delete(this.rows.pop().job.id);
      this.isWhole = false;
    }
  }

  /** Take a job out; returns where it was, or -1. */
  delete(id) {
    const entry = this.byId.get(id);
    if (!entry) return -1;
    const place = this._place(entry);
    this.rows.splice(place, 1);
    this.byId.delete(id);
    return place;
  }

  /** Take in a newer progress; tells whether it was one. */
  progress(update) {
    const entry = this.byId.get(update.job_id);
    if (!entry || update.sequence <= entry.job.progress_sequence || entry.job.status !== "running") return false;
    entry.job = progressed(entry.job, update);
    return true;
  }
}

/** A job with a newer progress. */
export function progressed(job, update) {
  return {
    ...job, progress: update.percentage, progress_message: update.message, progress_sequence: update.sequence,
    current_step: update.current_step, total_steps: update.total_steps, estimated_completion: update.estimated_completion,
  };
}

/** Tell whether one state of a job is older than another that we have. */
export function isOlder(job, than) {
  return microseconds(job.last_modified) < microseconds(than.last_modified);
}

/** Tell whether reading a job would tell more of its error than is known. */
export function isUntold(job) {
  return job.status === "failed" && job.error !== null && !job.error.message && may("reader");
}

/** The newer of what was read and what is known of the same job. */
export function newest(job, known) {
  return known && isOlder(job, known) ? known : known ? withProgress(job, known) : job;
}

/** A changed job, with the progress of what is known where that is newer, and what its error says. */
export function withProgress(changed, known) {
  // Events have no messages of errors: not everybody who listens may read them.
  const isKnown = changed.error && !changed.error.message && known.error?.message && known.attempts === changed.attempts;
  const job = isKnown ? { ...changed, error: { ...changed.error, message: known.error.message } } : changed;
  if (known.progress_sequence <= job.progress_sequence) return job;
  const { progress_message, progress_sequence, current_step, total_steps } = known;
  const said = { ...job, progress_message, progress_sequence, current_step, total_steps };
  return job.status === "running" ? { ...said, progress: known.progress, estimated_completion: known.estimated_completion } : said;
}

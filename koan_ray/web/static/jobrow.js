// One row of a list of jobs, drawn once and then only changed where the job has.

import { h, mark, write } from "./dom.js";
import { FINAL, duration, microseconds, moveSince, now, percent, plural, reason, relative, since, statusClass, title } from "./format.js";

/** What a job is doing, or how it ended, in a few words. */
export function note(job) {
  if (job.status === "failed") return [job.error?.type, job.error?.message ?? (job.error && job.reason === "exhausted" ? null : reason(job.reason))].filter(Boolean).join(": ");
  if (job.status === "cancelled") return reason(job.reason) || "";
  if (job.status === "queued" && job.due_at && Date.parse(job.due_at) > now()) {
    const why = job.reason === "retry" ? `attempt ${job.attempts + 1} ` : "due ";
    return why + relative(Date.parse(job.due_at));
  }
  if (job.cancel_requested && !FINAL.has(job.status)) return "is being cancelled";
  if (job.reason && !FINAL.has(job.status)) return reason(job.reason); // what it waits for
  return isDone(job) ? "" : job.progress_message || "";
}

/** It has completed, and what it said last was about an earlier step: the last of its messages is not always kept. */
export function isDone(job) {
  return job.status === "completed" && job.total_steps !== null && job.current_step !== job.total_steps;
}

export function place(job) {
  return job.partition ? `${job.source} / ${job.partition}` : job.source;
}

/** How long it has run so far, or ran. */
export function took(job) {
  if (job.duration_s !== null) return duration(job.duration_s);
  return job.started_at && job.status === "running" ? duration((now() - Date.parse(job.started_at)) / 1000) : "–";
}

export class JobRow {
  /** jobAt(place): the job to show. isPicked(id), onPick(id, isRange). first: the row number of place 0. */
  constructor({ jobAt, isPicked, onPick, canPick }) {
    Object.assign(this, { jobAt, isPicked });
    this.box = h("input", { type: "checkbox", on: { click: (event) => onPick(this.job.id, event.shiftKey) } });
    this.word = h("span", {});
    this.badge = h("span", { class: "badge" }, h("span", { class: "dot", "aria-hidden": "true" }), this.word);
    this.link = h("a", { class: "ellipsis text", href: "#/jobs" });
    this.kind = h("span", { class: "of ellipsis text small" });
    this.fill = h("i", {});
    this.bar = h("span", { class: "bar", "aria-hidden": "true" }, this.fill);
    this.share = h("span", { class: "unseen" });
    this.note = h("span", { class: "note ellipsis text" });
    this.attempts = h("span", {});
    this.place = h("span", { class: "ellipsis small muted text" });
    this.age = since(new Date(0).toISOString());
    this.took = h("span", {});
    this.element = h("tr", { role: "row" },
      h("td", { role: "cell", class: "pick" }, canPick && h("label", {}, this.box)),
      h("td", { role: "cell", class: "status-cell" }, this.badge),
      h("td", { role: "cell", class: "who-cell" }, this.link, this.kind),
      h("td", { role: "cell", class: "how-cell" }, this.bar, this.share, this.note),
      h("td", { role: "cell", class: "attempt-cell small muted" }, this.attempts),
      h("td", { role: "cell", class: "place-cell ellipsis" }, this.place),
      h("td", { role: "cell", class: "age-cell small muted ellipsis" }, this.age),
      h("td", { role: "cell", class: "took-cell small muted right ellipsis" }, this.took));
  }

  update(rowPlace) {
    const job = this.jobAt(rowPlace);
    const isPicked = this.isPicked(job.id);
    mark(this.element, "aria-rowindex", rowPlace + 2);
    if (this.box.checked !== isPicked) this.box.checked = isPicked;
    mark(this.element, "aria-selected", isPicked ? "true" : null);
    write(this.took, took(job));
    if (this.job === job && job.status !== "queued") return;
    this.job = job;
    mark(this.element, "data-id", job.id);
    mark(this.box, "aria-label", `Select ${title(job)}`);
    this.badge.className = `badge ${statusClass(job.status)}`;
    this.bar.className = `bar ${statusClass(job.status)}`;
    write(this.word, job.status);
    write(this.link, title(job));
    mark(this.link, "href", `#/jobs/${encodeURIComponent(job.id)}`);
    mark(this.link, "title", title(job));
    write(this.kind, job.name ? job.kind : job.id.slice(-6));
    const hasBar = job.progress > 0 && !FINAL.has(job.status);
    this.bar.hidden = !hasBar;
    this.fill.style.transform = `scaleX(${job.progress})`;
    write(this.share, hasBar ? percent(job.progress) : "");
    const said = note(job);
    write(this.note, said);
    mark(this.note, "title", said || null);
    this.note.classList.toggle("bad", job.status === "failed");
    write(this.attempts, job.attempts ? `${job.attempts} of ${job.max_attempts}` : "–");
    mark(this.attempts, "title", job.crashes ? plural(job.crashes, "lost process", "lost processes") : null);
    write(this.place, place(job));
    mark(this.place, "title", place(job));
    if (microseconds(job.created_at)) moveSince(this.age, job.created_at);
  }
}

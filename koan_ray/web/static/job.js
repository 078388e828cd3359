// The page of one job: what it does now, how its attempts went, where it belongs, and what one can do about it.

import { call, get, may, post, remove } from "./api.js";
import { attempts, trace } from "./attempts.js";
import { confirm } from "./dialog.js";
import { h, mark, put, putPage, section, write } from "./dom.js";
import { stringify } from "./exact.js";
import { FINAL, badge, clock, duration, moment, now, percent, plural, reason, relative, since, statusClass, title } from "./format.js";
import { DeadItems, itemFigures } from "./items.js";
import { isDone, place, took } from "./jobrow.js";
import { listen } from "./live.js";
import { announce, tellDone } from "./messages.js";
import { copier, payload } from "./payload.js";
import { bind } from "./shortcuts.js";
import { isOlder, progressed, withProgress } from "./sorted.js";
import { empty, failed, loading } from "./states.js";
import { timeline } from "./timeline.js";
import { JobTree } from "./tree.js";

const REREAD_MS = 250; // between two readings of the whole job; its status and progress come with the events
const GAP_MS = 1_000;
const TIMELINE_MS = 2_000;
const NEARLY = 0.9; // of a job that is "nearly done"

export function jobPage(id) {
  return new JobPage(id);
}

class JobPage {
  constructor(id) {
    Object.assign(this, { id, title: "Job", path: `api/jobs/${encodeURIComponent(id)}` });
    this.job = null;
    this.executions = [];
    this.early = {}; // what has changed while the job was read for the first time, which may show it as it was before
    this.opened = new Map();
    this.abort = new AbortController();
    this.element = h("div", { class: "page" }, h("h1", { tabindex: -1, class: "unseen" }, "Job"), loading("Reading the job"));
    this.unlisten = listen({
      job: ({ job }) => this.changed(job), progress: (update) => this.progress(update),
      removed: ({ job_id: gone }) => { if (gone === id) this.isGone(); }, gap: () => { this.readLater(GAP_MS); this.tree?.readLater(); }, // a busy engine sends many
    });
    this.unbind = bind({ c: () => this.press("cancel"), r: () => this.press("retry") });
    this.ticking = setInterval(() => this.job && this.tick(), 500);
    this.read();
  }

  // --- reading -------------------------------------------------------------------------------------------------------

  async read() {
    clearTimeout(this.timer);
    this.timer = null;
    try {
      const [job, executions] = await Promise.all([get(this.path, {}, this.abort.signal), get(`${this.path}/executions`, {}, this.abort.signal)]);
      this.readAt = Date.now();
      this.take(job, executions.items);
    } catch (problem) {
      if (this.abort.signal.aborted) return;
      if (problem.status === 404 && this.job) this.isGone();
      else if (!this.job) putPage(this.element, h("h1", { tabindex: -1 }, "Job"), failed(problem, () => this.read()));
    }
  }

  readLater(wait = REREAD_MS) {
    if (this.timer || this.hasGone) return;
    this.timer = setTimeout(() => this.read(), Math.max(0, Math.min(wait, (this.readAt ?? 0) + wait - Date.now())));
  }

  take(job, executions) {
    const before = this.job;
    this.job = before && isOlder(job, before) ? { ...job, ...newerPart(before) } : before ? withProgress(job, before) : job;
    this.executions = executions;
    const hadFocus = this.element.contains(document.activeElement);
    if (!before) this.build();
    this.show(before);
    if (!before && hadFocus) this.element.querySelector("h1").focus();
    const { early } = this;
    this.early = {};
    if (early.job) this.changed(early.job);
    if (early.update) this.progress(early.update);
  }

  changed(job) {
    this.tree?.changed(job);
    if (job.id === this.id && !this.job) this.early.job = job;
    if (job.id !== this.id || !this.job || isOlder(job, this.job)) return;
    const before = this.job;
    this.job = { ...before, ...withProgress(job, before) };
    if (job.error && before.error?.message && job.attempts === before.attempts) this.job.error = before.error; // events tell types only
    this.show(before);
    this.readLater();
  }

  progress(update) {
    this.tree?.progress(update);
    if (update.job_id === this.id && !this.job) this.early.update = update;
    if (update.job_id !== this.id || !this.job || update.sequence <= this.job.progress_sequence || this.job.status !== "running") return;
    this.job = progressed(this.job, update);
    this.showProgress();
  }

  isGone() {
    if (this.hasGone) return;
    this.hasGone = true;
    this.unlisten();
    putPage(this.element, h("h1", { tabindex: -1 }, this.job ? title(this.job) : "Job"),
      empty("This job is gone", "It was deleted, or its time in memory is over.", h("a", { class: "button", href: "#/jobs" }, "All jobs")));
    announce("This job is gone");
  }

  // --- drawing -------------------------------------------------------------------------------------------------------

  build() {
    const places = Object.fromEntries(["head", "actions", "error", "attempts", "timeline", "payloads", "facts", "metadata", "items"].map((name) => [name, h("div", {})]));
    this.progressPart = progressPart();
    this.tree = new JobTree(this.id, (n) => { treeCard.hidden = n < 2; });
    const treeCard = card("Tree", this.tree.element, { plain: true });
    treeCard.hidden = true;
    this.timelineCard = card("Timeline", places.timeline);
    this.itemsCard = card("Items", places.items);
    this.itemsCard.hidden = true;
    put(this.element, places.head, h("div", { class: "job-grid" },
      h("div", {}, this.progressPart.element, places.error, this.itemsCard, card("Attempts", places.attempts, { plain: true }), this.timelineCard, places.payloads),
      h("div", {}, card("Facts", places.facts), treeCard, places.metadata)));
    this.parts = {
      head: section(places.head, (...args) => this.head(...args)),
      error: section(places.error, errorPart),
      attempts: section(places.attempts, (executions) => attempts(this.job, executions, may("reader"), this.opened)),
      timeline: section(places.timeline, () => timeline(this.job, this.executions)),
      payloads: section(places.payloads, () => payloads(this.job)),
      facts: section(places.facts, () => facts(this.job)),
      metadata: section(places.metadata, (metadata) => Object.keys(metadata).length > 0 && card("Metadata", payload(metadata))),
      items: section(places.items, (items) => this.items(items)),
    };
    this.places = places;
    this.tree.read();
  }

  show(before) {
    const { job } = this;
    this.title = title(job);
    if (this.element.isConnected) document.title = `${job.status}: ${title(job)} · koan_ray`;
    if (before && before.status !== job.status) announce(`${title(job)} is ${job.status}`);
    const hadFocus = this.places.head.contains(document.activeElement);
    this.parts.head(job.status, title(job), job.kind, job.cancel_requested, job.archived, job.description, job.attempts, Boolean(job.items), job.items?.failed > 0);
    if (hadFocus && !this.places.head.contains(document.activeElement)) this.places.head.querySelector("h1").focus();
    this.showProgress();
    const mayRead = !job.hidden?.includes("error.message");
    this.parts.error(job.status === "failed" || job.status === "queued" ? job.error : null, job.status, job.reason, job.attempts, this.executions.length > 0, mayRead);
    this.parts.attempts(this.executions, job.audited);
    this.parts.timeline(this.executions.map((item) => [item.status, item.completed_at]), job.status, job.completed_at, job.due_at, job.started_at);
    this.parts.payloads(job.context, job.result, job.has_result, job.hidden, job.status);
    this.parts.facts(job.status, job.attempts, job.crashes, job.due_at, job.completed_at, job.started_at, job.reason, job.last_modified && job.partition, job.archived);
    this.parts.metadata(job.metadata ?? {});
    this.itemsCard.hidden = !job.items;
    if (job.items) this.parts.items(job.items);
    this.tick();
  }

  head(status, name, kind, cancelRequested, archived, description) {
    const up = this.job.parent_job_id && h("div", { class: "crumbs" }, "Child of ", h("a", { href: `#/jobs/${encodeURIComponent(this.job.parent_job_id)}`, class: "mono" }, this.job.parent_job_id));
    const again = this.job.retry_of && h("div", { class: "crumbs" }, "Runs anew ", h("a", { href: `#/jobs/${encodeURIComponent(this.job.retry_of)}`, class: "mono" }, this.job.retry_of));
    return [
      up, again,
      h("div", { class: "page-head" },
        h("h1", { tabindex: -1, class: "text" }, name), largeBadge(cancelRequested && !FINAL.has(status) ? `${status}, being cancelled` : status, status), archived && h("span", { class: "tag" }, "archived"),
        h("span", { class: "grow" }), h("div", { class: "actions" }, this.buttons())),
      h("p", { class: "small muted id-line" }, kind !== name && h("span", { class: "text" }, kind), h("span", {}, h("span", { class: "mono" }, this.id), copier(this.id, "Copy the id"))),
      description && h("p", { class: "text" }, description),
    ];
  }

  buttons() {
    const { job } = this;
    const isFinal = FINAL.has(job.status);
    const mayRetry = ["failed", "cancelled"].includes(job.status) && may("operator");
    const found = [
      [!isFinal && !job.cancel_requested && may("operator"), "cancel", "Cancel", "danger"],
      [isFinal && job.items?.failed > 0 && may("operator"), "retryItems", "Retry dead items", ""],
      [mayRetry && job.items, "resume", "Go on", ""],
      [mayRetry, "retry", "Retry", "primary"],
      [job.archived && may("admin"), "restore", "Restore", ""],
      [isFinal && may("admin"), "remove", "Delete", "danger"],
    ];
    return found.filter(([is]) => is).map(([, name, text, tone]) =>
      h("button", { class: `button ${tone}`, type: "button", data: { deed: name }, on: { click: () => this.deed(name) } }, text));
  }

  press(name) {
    const button = this.element.querySelector(`[data-deed="${name}"]`);
    button?.click();
    return Boolean(button);
  }

  async deed(name) {
    const { job, path } = this;
    const called = title(job);
    if (name === "cancel") {
      await confirm({ headline: "Cancel this job?", text: `${called} and its children will be stopped. What it has done so far stays done.`, verb: "Cancel the job", danger: true, reason: true, act: (why) => post(`${path}/cancel`, { reason: why }) });
      this.readLater(0);
    } else if (name === "retry") {
      this.follow(await confirm({ headline: "Run this job again?", text: `${called} is started anew with the same context, as a new job.${job.items ? " All of its items are done again." : ""}`, verb: "Run again", act: () => call("POST", `${path}/retry`) }));
    } else if (name === "resume") {
      this.follow(await confirm({ headline: "Go on where this job stopped?", text: `A new job goes on from the last checkpoint of ${called}: ${plural(job.items.processed, "item")} done before ${job.items.processed === 1 ? "is" : "are"} not done again${job.items.failed ? `, and ${plural(job.items.failed, "dead item")} ${job.items.failed === 1 ? "stays" : "stay"} dead` : ""}.`, verb: "Go on", act: () => post(`${path}/retry`, { resume: true }) }));
    } else if (name === "retryItems") {
      this.follow(await confirm({ headline: "Run the dead items again?", text: `${plural(job.items.failed, "dead item")} of ${called} ${job.items.failed === 1 ? "is" : "are"} run again, as a new job.`, verb: "Run them again", act: () => call("POST", `${path}/retry-failed-items`) }));
    } else if (name === "restore") {
      if (await confirm({ headline: "Restore this job?", text: `${called} is brought back from the archive to where it was.`, verb: "Restore", act: () => call("POST", `${path}/restore`) })) {
        tellDone("Restored", called);
        this.job.last_modified = null; // what the server says now counts
        this.read();
      }
    } else if (await confirm({ headline: "Delete this job?", text: `${called} and the record of its attempts are deleted. This cannot be undone.`, verb: "Delete", danger: true, act: () => remove(path) })) {
      tellDone("Deleted", called);
      location.hash = "#/jobs";
    }
  }

  /** Go to the page of a job that was started here. */
  follow(started) {
    if (started?.id) location.hash = `#/jobs/${encodeURIComponent(started.id)}`;
  }

  items(items) {
    const dead = h("div", {});
    const open = h("button", { class: "button", type: "button", on: { click: () => put(dead, new DeadItems(this.id).element) } }, "Show dead items");
    return [itemFigures(items), items.failed > 0 && h("div", { class: "dead-items" }, open, dead)];
  }

  showProgress() {
    this.progressPart.show(this.job);
  }

  tick() {
    this.progressPart.tick(this.job);
    const running = this.places?.facts.querySelector("[data-took]");
    if (running) write(running, took(this.job));
    if (this.job.status === "running" && this.places && Date.now() - (this.drawnAt ?? 0) > TIMELINE_MS) {
      this.drawnAt = Date.now();
      put(this.places.timeline, timeline(this.job, this.executions)); // its end is now
    }
  }

  close() {
    clearInterval(this.ticking);
    clearTimeout(this.timer);
    this.abort.abort();
    this.unlisten();
    this.unbind();
    this.tree?.close();
  }
}

function newerPart({ status, reason: why, progress, progress_message, progress_sequence, attempts: n, completed_at, duration_s, last_modified, cancel_requested }) {
  return { status, reason: why, progress, progress_message, progress_sequence, attempts: n, completed_at, duration_s, last_modified, cancel_requested };
}

function card(headline, body, { plain = false } = {}) {
  return h("section", { class: `card ${plain ? "plain" : ""}`, "aria-label": headline }, h("div", { class: "card-head" }, h("h2", {}, headline)), h("div", { class: "card-body" }, body));
}

function largeBadge(text, status) {
  const element = badge(status, text);
  element.classList.add("large");
  return element;
}

function progressPart() {
  const fill = h("i", {});
  const bar = h("div", { class: "bar tall", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const share = h("span", { class: "share" });
  const said = h("span", { class: "said text" });
  const left = h("span", {});
  const element = h("section", { class: "card", "aria-label": "Progress" }, h("div", { class: "card-body job-progress" }, h("div", { class: "with" }, share, bar), h("div", { class: "below" }, said, left)));
  return {
    element,
    show(job) {
      bar.className = `bar tall ${statusClass(job.status)}`;
      fill.style.transform = `scaleX(${job.progress})`;
      mark(bar, "aria-valuenow", Math.round(job.progress * 100));
      mark(bar, "aria-valuetext", [percent(job.progress), job.progress_message].filter(Boolean).join(", "));
      write(share, percent(job.progress));
      write(said, isDone(job) ? "Done" : job.progress_message ?? (FINAL.has(job.status) ? "" : job.status === "running" ? "No message yet" : "Has not begun"));
      this.tick(job);
    },
    tick(job) {
      const steps = job.total_steps && !job.items && !isDone(job) ? `step ${job.current_step} of ${job.total_steps}` : null;
      write(left, [steps, remaining(job)].filter(Boolean).join(" · "));
    },
  };
}

/** How long it will take, or has taken. */
function remaining(job) {
  if (FINAL.has(job.status)) return job.duration_s === null ? null : `took ${duration(job.duration_s)}`;
  if (job.status === "queued" && job.due_at && Date.parse(job.due_at) > now()) return `${job.reason === "retry" ? "next attempt" : "due"} ${relative(Date.parse(job.due_at))}`;
  if (job.status !== "running") return null;
  const until = job.estimated_completion ? (Date.parse(job.estimated_completion) - now()) / 1000 : null;
  if (until === null || (until <= 1 && job.progress < NEARLY)) return `running for ${took(job)}`; // an estimate that was wrong says nothing
  return until > 1 ? `about ${until < 60 ? `${Math.round(until)} s` : duration(until)} left` : "nearly done";
}

function errorPart(error, status, why, n, hasAttempts, mayRead) {
  if (!error) return null;
  const again = status === "queued" ? `Attempt ${n} failed; it is tried again.` : reason(why);
  return h("section", { class: "card error-box", "aria-label": "Error" }, h("div", { class: "card-body" },
    h("div", { class: "error-type text" }, error.type),
    error.message ? h("p", { class: "text" }, error.message) : !mayRead && h("p", { class: "muted" }, "What it says is for the role reader."),
    again && h("p", { class: "small muted text" }, again),
    error.stack_trace && !hasAttempts && trace(error.stack_trace, "Stack trace", true)));
}

function payloads(job) {
  if (job.hidden?.includes("context")) return h("div", { class: "notice" }, h("b", {}, "Context and result are not shown"), "They are for the role reader; ask for a token that has it.");
  const part = (name, value, nothing) => h("div", {}, h("h3", {}, name, value !== null && copier(() => stringify(value, 2), `Copy the ${name.toLowerCase()}`)), value === null ? h("p", { class: "muted" }, nothing) : payload(value));
  return card("Context and result", h("div", { class: "pair" },
    part("Context", job.context, "It was started without one."),
    part("Result", job.has_result ? job.result ?? null : null, job.has_result ? "It returned nothing." : job.status === "completed" ? "It returned nothing." : "There is none yet.")));
}

function facts(job) {
  const link = (id) => h("a", { class: "mono", href: `#/jobs/${encodeURIComponent(id)}` }, id);
  const rows = [
    ["Kind", h("a", { href: `#/jobs?kind=${encodeURIComponent(job.kind)}` }, job.kind)],
    ["Status", job.reason ? `${job.status}: ${reason(job.reason)}` : job.status],
    ["Attempts", `${job.attempts} of ${job.max_attempts}${job.crashes ? `, ${job.crashes} lost` : ""}`],
    ["Created", [moment(job.created_at), " (", since(job.created_at), ")"]],
    job.due_at && !FINAL.has(job.status) && ["Due", [clock(job.due_at), " (", since(job.due_at), ")"]],
    job.started_at && ["Started", moment(job.started_at)],
    job.completed_at && ["Ended", moment(job.completed_at)],
    job.started_at && [FINAL.has(job.status) ? "Took" : "So far", h("span", { data: { took: "" } }, took(job))],
    ["Kept in", place(job)],
    job.timeout_s !== null && job.timeout_s !== undefined && ["Timeout", duration(job.timeout_s)],
    ["Runs in", `${job.isolation}, ${job.resources}`],
    job.retry_policy && ["Retries", `${String(job.retry_policy.strategy).replaceAll("_", " ")}, first after ${duration(job.retry_policy.initial_delay_s)}`],
    job.parent_job_id && ["Parent", link(job.parent_job_id)],
    job.retry_of && ["Runs anew", link(job.retry_of)],
    job.correlation_id && ["Correlation", h("a", { class: "mono", href: `#/jobs?correlation_id=${encodeURIComponent(job.correlation_id)}` }, job.correlation_id)],
  ];
  return h("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

// How values read: instants, durations, numbers, statuses.

import { h } from "./dom.js";

export const STATUSES = ["created", "queued", "running", "completed", "failed", "cancelled"];
export const FINAL = new Set(["completed", "failed", "cancelled"]);
const KNOWN = new Set([...STATUSES, "succeeded"]);

let skewMs = 0; // the server's clock minus ours

/** Take the server's clock for ours where the two are apart. */
export function learnClock(dateHeader) {
  const at = Date.parse(dateHeader ?? "");
  if (Number.isNaN(at)) return;
  const apart = at - Date.now();
  skewMs = Math.abs(apart) > 2_000 ? apart : 0;
}

/** Milliseconds since the epoch, by the server's clock. */
export function now() {
  return Date.now() + skewMs;
}

/** Microseconds of an ISO instant: what rows are ordered by. 0 for none. */
export function microseconds(iso) {
  if (!iso) return 0;
  const fraction = /\.(\d+)/.exec(iso);
  const digits = fraction ? fraction[1].padEnd(6, "0").slice(3, 6) : "000";
  return Date.parse(iso) * 1000 + Number(digits);
}

/** A duration, in at most two units. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.max(0, seconds);
  if (s < 0.001) return s === 0 ? "0 s" : "<1 ms";
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  const units = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => s >= size);
  const [name, size] = units[first];
  const n = Math.floor(s / size);
  const next = units[first + 1];
  const rest = next ? Math.floor((s - n * size) / next[1]) : 0;
  return rest ? `${n} ${name} ${rest} ${next[0]}` : `${n} ${name}`;
}

/** How long ago, or how far ahead. */
export function relative(ms, at = now()) {
  const s = (at - ms) / 1000;
  if (Math.abs(s) < 1.5) return "now";
  const text = Math.abs(s) < 10 ? `${Math.round(Math.abs(s))} s` : coarse(Math.abs(s));
  return s >= 0 ? `${text} ago` : `in ${text}`;
}

function coarse(s) {
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3_600) return `${Math.floor(s / 60)} min`;
  if (s < 86_400) return `${Math.floor(s / 3_600)} h`;
  return `${Math.floor(s / 86_400)} d`;
}

const FULL = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const HOUR = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export function moment(iso) {
  return iso ? FULL.format(new Date(iso)) : "–";
}

export function clock(iso, withSeconds = true) {
  return (withSeconds ? CLOCK : HOUR).format(new Date(iso));
}

/** A `<time>` that says how long ago it was, kept up to date, with the instant as its title. */
export function since(iso) {
  if (!iso) return h("span", { class: "muted" }, "–");
  const element = h("time", { datetime: iso, title: moment(iso), data: { at: Date.parse(iso) } });
  element.textContent = relative(Date.parse(iso));
  return element;
}

/** Point a `<time>` of `since` to another instant. */
export function moveSince(element, iso) {
  const at = String(Date.parse(iso));
  if (element.dataset.at === at) return;
  element.dataset.at = at;
  element.setAttribute("datetime", iso);
  element.title = moment(iso);
  element.textContent = relative(Number(at));
}

setInterval(() => {
  if (document.hidden) return;
  const at = now();
  for (const element of document.querySelectorAll("time[data-at]")) {
    const text = relative(Number(element.dataset.at), at);
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(n) {
  return n === null || n === undefined ? "–" : NUMBER.format(n);
}

export function percent(share, digits = 0) {
  return share === null || share === undefined ? "–" : `${(share * 100).toFixed(digits)} %`;
}

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let place = -1;
  let value = n;
  do { value /= 1024; place += 1; } while (value >= 1024 && place < units.length - 1);
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[place]}`;
}

/** "1 job", "2 jobs". */
export function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

/** A status as a class name: only those that we know, whatever is stored. */
export function statusClass(status) {
  return KNOWN.has(status) ? `is-${status}` : "is-created";
}

/** A status as a dot and a word. */
export function badge(status, text = status) {
  return h("span", { class: `badge ${statusClass(status)}` }, h("span", { class: "dot", "aria-hidden": "true" }), h("span", {}, text));
}

/** What a job is called: its name, or its kind. */
export function title(job) {
  return job.name || job.kind;
}

const REASONS = {
  retry: "waits for its next attempt", delay: "not yet due", lost: "its process was lost; runs again", rescheduled: "put off by itself",
  interrupted: "interrupted; runs again", exhausted: "no attempts left", non_retryable: "not to be retried", poison: "its process died too often",
  timeout: "took too long", deadline: "missed its deadline", result_rejected: "returned what its kind does not declare",
  context_rejected: "its context no longer fits its kind", unknown_kind: "nobody here has its class",
  unwritable: "what it produced cannot be stored",
};

const ENDS = { retry: "tried again", lost: "its process was lost", rescheduled: "put off by itself", interrupted: "stopped by the engine" };

/** Why an attempt ended, in words. */
export function ended(text) {
  return Object.hasOwn(ENDS, text ?? "") ? ENDS[text] : reason(text);
}

/** A reason in words; one that we do not know as it is. */
export function reason(text) {
  return Object.hasOwn(REASONS, text ?? "") ? REASONS[text] : text;
}

// The attempts of a job side by side: how each ended, its error and stack trace, what it cost.

import { h } from "./dom.js";
import { badge, bytes, clock, duration, ended, moment } from "./format.js";
import { copier, plainBlock } from "./payload.js";
import { empty } from "./states.js";

const MOVED = "moved";
const NAMES = {
  node_id: "Node", actor_id: "Actor", pid: "Process", cpu_s: "CPU", cpu_seconds: "CPU", peak_rss: "Peak memory", peak_rss_bytes: "Peak memory",
  queue_wait_s: "Waited", queue_wait: "Waited",
};

/**
 * Cards of all attempts, newest last. `opened`: what the reader has opened or closed, and how far the row was moved, kept from one
 * drawing to the next; the newest is in sight until the reader moves the row.
 */
export function attempts(job, executions, mayRead, opened = new Map()) {
  if (!executions.length) {
    return job.audited || job.source === "memory"
      ? empty("No attempt yet", "The first one is shown as soon as it begins.")
      : empty("Attempts are not kept", "Start jobs of this kind with .audit() to keep a record of each attempt.");
  }
  const row = h("div", { class: "attempts", tabindex: 0, role: "list", "aria-label": "Attempts", on: { scroll: () => remember(row, opened) } },
    executions.map((execution) => card(execution, job, mayRead, opened)));
  requestAnimationFrame(() => { row.scrollLeft = opened.get(MOVED) ?? row.scrollWidth; });
  return row;
}

function remember(row, opened) {
  if (row.scrollLeft >= row.scrollWidth - row.clientWidth - 1) opened.delete(MOVED);
  else opened.set(MOVED, row.scrollLeft);
}

function card(execution, job, mayRead, opened) {
  const { error } = execution;
  const said = execution.reason && execution.reason !== execution.status ? ended(execution.reason) : null;
  return h("article", { class: `attempt is-${/^(running|succeeded|failed|cancelled)$/.test(execution.status) ? execution.status : "created"}`, role: "listitem" },
    h("header", {}, h("h3", {}, `Attempt ${execution.attempt_number}`), badge(execution.status)),
    h("div", { class: "small muted" }, h("span", { title: moment(execution.started_at) }, clock(execution.started_at)),
      execution.completed_at ? ` · ran ${duration(execution.duration_s)}` : " · runs", said && [" · ", h("span", { class: "text" }, said)]),
    error && h("div", {}, h("div", { class: "error-type text" }, error.type),
      error.message ? h("p", { class: "text" }, error.message) : !mayRead && h("p", { class: "muted small" }, "What it says is for the role reader.")),
    error?.stack_trace && trace(error.stack_trace, `Stack trace of attempt ${execution.attempt_number}`, execution.attempt_number === job.attempts, remembering(opened, `trace ${execution.id}`)),
    metrics(execution.metrics, remembering(opened, `metrics ${execution.id}`)));
}

function remembering(opened, key) {
  return { is: opened.get(key), on: { click: (event) => opened.set(key, !event.currentTarget.parentNode.open) } };
}

/** A stack trace that can be opened and copied. */
export function trace(text, label, isOpen = false, kept = {}) {
  return h("details", { class: "trace", open: kept.is ?? isOpen }, h("summary", { on: kept.on }, "Stack trace"),
    h("div", { class: "copied" }, plainBlock(text, label), copier(text, "Copy the stack trace")));
}

function metrics(values, kept) {
  const shown = Object.entries(values ?? {}).filter(([, value]) => value !== null && value !== "" && typeof value !== "object");
  return shown.length > 0 && h("details", { open: kept.is ?? false }, h("summary", { on: kept.on }, "Metrics"),
    h("dl", { class: "facts" }, shown.map(([name, value]) => [h("dt", {}, NAMES[name] ?? name.replaceAll("_", " ")), h("dd", { class: "mono small" }, metric(name, value))])));
}

function metric(name, value) {
  if (typeof value !== "number") return String(value);
  if (/rss|bytes|memory/.test(name)) return bytes(value);
  if (/(_s|seconds|wait)$/.test(name)) return duration(value);
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(4)));
}

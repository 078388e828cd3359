// Which jobs a list shows: filters as part of the address, as a query of the API, and as a test of one job.

import { parse, same, stringify, typeOf } from "./exact.js";
import { microseconds } from "./format.js";

export const MANY = ["status", "kind"];
export const ONE = [
  "text", "name", "correlation_id", "parent_job_id", "source", "partition", "created_after", "created_before", "completed_after",
  "completed_before", "order_by",
];
export const ORDERS = [
  ["-created_at", "Newest first"], ["created_at", "Oldest first"], ["-started_at", "Started last"], ["started_at", "Started first"],
  ["-completed_at", "Ended last"], ["completed_at", "Ended first"], ["-queued_at", "Queued last"], ["queued_at", "Queued first"],
];
const METADATA = "metadata.";
export const DEFAULT_ORDER = "-created_at";
const INSTANT_FIELDS = new Set(ONE.filter((name) => /_(after|before)$/.test(name)));

/** The filters of an address; what is none of them is left out. */
export function fromAddress(query) {
  const filters = { metadata: {} };
  for (const name of MANY) {
    const values = query.getAll(name).filter(Boolean);
    if (values.length) filters[name] = values;
  }
  for (const name of ONE) if (query.get(name)) filters[name] = query.get(name);
  for (const [name, value] of query) if (name.startsWith(METADATA) && name.length > METADATA.length) filters.metadata[name.slice(METADATA.length)] = value;
  return filters;
}

/** The address of a list with these filters. */
export function toAddress(filters, path = "/jobs") {
  const query = new URLSearchParams();
  for (const name of MANY) for (const value of filters[name] ?? []) query.append(name, value);
  for (const name of ONE) if (filters[name]) query.set(name, filters[name]);
  for (const [name, value] of Object.entries(filters.metadata ?? {})) query.set(METADATA + name, value);
  const text = query.toString();
  return `#${path}${text ? `?${text}` : ""}`;
}

/** What the API is asked for. */
export function toQuery(filters) {
  const { metadata, ...rest } = filters;
  const query = { ...rest };
  for (const name of INSTANT_FIELDS) if (query[name]) query[name] = instant(query[name]);
  if (Object.keys(metadata ?? {}).length) query.metadata = stringify(values(metadata));
  return query;
}

/** What a bulk action is asked for: the same, without order. */
export function toBulk(filters) {
  const { metadata, order_by: _, ...rest } = filters;
  const asked = { ...rest };
  for (const name of INSTANT_FIELDS) if (asked[name]) asked[name] = instant(asked[name]);
  if (Object.keys(metadata ?? {}).length) asked.metadata = values(metadata);
  return asked;
}

const UNITS = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };
/** An age as the command line has it, such as 30m or 7d: of an instant that moves with the time, in saved views as well. */
export const AGE = /^(\d{1,6})([smhd])$/;
export const TODAY = "today";

function instant(text) {
  const age = AGE.exec(text);
  const at = age ? new Date(Date.now() - age[1] * UNITS[age[2]]) : text === TODAY ? new Date(new Date().setHours(0, 0, 0, 0)) : new Date(text);
  return Number.isNaN(at.getTime()) ? text : at.toISOString();
}

/** Metadata as typed: a number or true is meant as such, `"7"` in quotes as text. */
function values(metadata) {
  return Object.fromEntries(Object.entries(metadata).map(([name, text]) => [name, value(text)]));
}

export function value(text) {
  try {
    const found = parse(text);
    return ["object", "array"].includes(typeOf(found)) ? text : found;
  } catch {
    return text;
  }
}

/** How many filters are set that are not seen in the bar of a list anyway. */
export function hiddenCount(filters) {
  const shown = new Set(["text", "order_by"]);
  const set = ONE.filter((name) => filters[name] && !shown.has(name)).length;
  return set + (filters.kind?.length ? 1 : 0) + Object.keys(filters.metadata ?? {}).length;
}

/**
 * Return tests whether a job passes, as the API would decide. Archives are shown only when they are asked for. The text of a
 * search may stand in the message of an error, which events do not carry: `hasText` may miss that.
 */
export function tester(filters) {
  const wanted = values(filters.metadata ?? {});
  const sought = filters.text?.toLowerCase();
  const bounds = [...INSTANT_FIELDS].filter((name) => filters[name]).map((name) => [name, microseconds(instant(filters[name]))]);
  const passes = (job) =>
    (!filters.status?.length || filters.status.includes(job.status)) &&
    (!filters.kind?.length || filters.kind.includes(job.kind)) &&
    (!filters.name || job.name === filters.name) &&
    (!filters.correlation_id || job.correlation_id === filters.correlation_id) &&
    (!filters.parent_job_id || job.parent_job_id === filters.parent_job_id) &&
    (!filters.source || job.source === filters.source) &&
    (filters.partition === "*" || (filters.partition ? job.partition === filters.partition : !job.archived)) &&
    Object.entries(wanted).every(([name, value]) => same(job.metadata?.[name], value)) &&
    bounds.every(([name, bound]) => passesBound(job, name, bound));
  const hasText = (job) => !sought || [job.name, job.description, job.kind].some((text) => text?.toLowerCase().includes(sought));
  return { passes, hasText };
}

function passesBound(job, name, bound) {
  const at = microseconds(name.startsWith("created") ? job.created_at : job.completed_at);
  return at > 0 && (name.endsWith("_after") ? at >= bound : at < bound);
}

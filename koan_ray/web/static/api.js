// Calls of the HTTP API. Every failure is a `Problem` with a text that says what to do.

import { parseAnswer, stringify } from "./exact.js";
import { learnClock } from "./format.js";

const BASE = new URL("./", import.meta.url);
const MAX_WAIT_S = 5;
const UNREACHABLE = {
  status: 0, title: "No connection", type: "unreachable", errors: [],
  detail: "The server does not answer. Check that koan-ray is running and that you are online; what you see may be old.",
};

/** An answer that is none: a problem document (RFC 9457), or that nobody answered. */
export class Problem extends Error {
  constructor(document) {
    super(document.detail || document.title || "The request failed");
    this.status = document.status;
    this.title = document.title || "Error";
    this.detail = document.detail || "";
    this.type = document.type || "";
    this.requestId = document.request_id || "";
    this.errors = Array.isArray(document.errors) ? document.errors : [];
  }

  is(slug) {
    return this.type.endsWith(`:${slug}`);
  }
}

/** The one who is signed in: name, roles, and the token that changes need. */
export const session = { name: null, roles: [], csrf: null, version: "" };
const signedOut = new Set();

/** Call a function when the session has ended. */
export function onSignedOut(handler) {
  signedOut.add(handler);
}

/** Tell whether the session covers a role. */
export function may(role) {
  return session.roles.includes(role) || session.roles.includes("admin");
}

/** The address of a route, wherever the API is mounted. */
export function address(path, query) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(query ?? {})) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") url.searchParams.append(name, item);
    }
  }
  return url;
}

/** Call a route and return its JSON; null where it answers without. Throws a `Problem`. */
export async function call(method, path, { body, query, signal } = {}, isAgain = false) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (method !== "GET" && session.csrf) headers["X-Koan-CSRF"] = session.csrf;
  let answer;
  try {
    answer = await fetch(address(path, query), {
      method, headers, signal, credentials: "same-origin", redirect: "error",
      body: body === undefined ? undefined : stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(UNREACHABLE);
  }
  learnClock(answer.headers.get("date"));
  if (answer.ok) return answer.status === 204 ? null : parseAnswer(await answer.text());
  const problem = await problemOf(answer);
  if (!isAgain && await canRepeat(answer, problem)) return call(method, path, { body, query, signal }, true);
  if (problem.status === 401 && path !== "api/session") endSession();
  throw problem;
}

async function problemOf(answer) {
  // Every answer of the API has an id, under which the server's log has more; one without comes from somewhere in between.
  const requestId = answer.headers.get("x-request-id") ?? "";
  const detail = requestId
    ? "The server gave no reason; its log has more under the number of this request."
    : "No reason was given. The answer is not from the server itself; perhaps a proxy in front of it cannot reach it.";
  const plain = { status: answer.status, title: `Error ${answer.status}`, detail, request_id: requestId };
  try {
    const document = await answer.json();
    return new Problem({ ...plain, ...document, status: answer.status });
  } catch {
    return new Problem(plain);
  }
}

/** Wait where the server asks for it, and learn the new token where another tab has signed in anew. */
async function canRepeat(answer, problem) {
  if (problem.status === 429) {
    const wait = Number(answer.headers.get("retry-after") ?? 1);
    if (!(wait <= MAX_WAIT_S)) return false;
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    return true;
  }
  if (problem.status === 403 && problem.is("csrf")) {
    await resume();
    return true;
  }
  return false;
}

export const get = (path, query, signal) => call("GET", path, { query, signal });
export const post = (path, body) => call("POST", path, { body });
export const remove = (path) => call("DELETE", path);

/** Go on with the session of the cookie. Throws a `Problem` with status 401 if there is none. */
export async function resume() {
  Object.assign(session, await call("GET", "api/session"));
}

/** See whether the session still holds; it ends here if it does not. */
export async function check() {
  try {
    await resume();
  } catch (problem) {
    if (problem.status === 401) endSession();
    throw problem;
  }
}

function endSession() {
  Object.assign(session, { name: null, roles: [], csrf: null });
  for (const handler of signedOut) handler();
}

export async function signIn(token) {
  Object.assign(session, await call("POST", "api/session", { body: { token } }));
}

export async function signOut() {
  try {
    await call("DELETE", "api/session");
  } finally {
    endSession();
  }
}

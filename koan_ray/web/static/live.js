// What changes, as it changes: one stream for the whole page, from which each part takes what it shows.
//
// A hidden page lets go of its stream after a while: browsers open six connections to one server over all tabs, and a
// stream holds one. When it comes back, or a connection was lost, everybody is told of a gap and reads anew.

import { address, check } from "./api.js";
import { parseAnswer } from "./exact.js";

const WAITS_MS = [300, 1_000, 2_000, 4_000, 8_000];
const HIDDEN_MS = 20_000;
const READY_MS = 700;
const EVENTS = ["job", "progress", "removed", "gap"];

const listeners = new Map(EVENTS.concat("state").map((name) => [name, new Set()]));
let source = null;
let state = "off";
let failures = 0;
let hasBeenAwaited = false; // pages have been read: what changed before the stream was open is missing in them
let timer = null;
let hiding = null;
let wanted = false;

/** Call a function with each event of a name, in order; returns how to stop that. */
export function on(name, handler) {
  listeners.get(name).add(handler);
  return () => listeners.get(name).delete(handler);
}

/** Several at once; returns how to stop all of them. */
export function listen(handlers) {
  const stops = Object.entries(handlers).map(([name, handler]) => on(name, handler));
  return () => stops.forEach((stop) => stop());
}

function tell(name, value) {
  for (const handler of [...listeners.get(name)]) {
    try {
      handler(value);
    } catch (error) {
      console.error(`a listener of ${name} failed`, error);
    }
  }
}

function become(next) {
  if (state === next) return;
  state = next;
  tell("state", next);
}

/** `off`, `connecting`, `open` or `lost`. */
export function currentState() {
  return state;
}

/** Connect; resolves when changes are listened to, or when that takes so long that pages should not wait for it. */
export async function start() {
  wanted = true;
  failures = 0;
  connect();
  await new Promise((resolve) => {
    const done = () => { clearTimeout(late); forget(); resolve(); };
    const late = setTimeout(done, READY_MS);
    const forget = on("state", (now) => now === "connecting" || done());
  });
  hasBeenAwaited = true;
}

export function stop() {
  wanted = false;
  hasBeenAwaited = false;
  disconnect();
  become("off");
}

function disconnect() {
  clearTimeout(timer);
  source?.close();
  source = null;
}

function connect() {
  disconnect();
  if (!wanted) return;
  if (state !== "lost") become("connecting");
  const opening = new EventSource(address("api/events"));
  source = opening;
  opening.addEventListener("open", (event) => {
    // The server says so itself when it listens to the engine: what is read from then on misses nothing.
    if (source !== opening || !(event instanceof MessageEvent)) return;
    failures = 0;
    become("open");
    if (hasBeenAwaited) tell("gap", { n_lost: null });
    hasBeenAwaited = true;
  });
  for (const name of EVENTS) {
    opening.addEventListener(name, (event) => {
      if (source === opening) tell(name, parseAnswer(event.data));
    });
  }
  opening.addEventListener("error", () => {
    if (source === opening) lost();
  });
}

function lost() {
  disconnect();
  become("lost");
  const wait = WAITS_MS[Math.min(failures, WAITS_MS.length - 1)];
  failures += 1;
  timer = setTimeout(again, wait * (0.75 + Math.random() / 2));
}

async function again() {
  // An event source does not say why it failed. If the session has ended, this call does.
  try {
    await check();
  } catch (problem) {
    if (problem.status === 401) return;
  }
  connect();
}

window.addEventListener("online", () => wanted && !source && connect());
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => wanted && disconnect(), HIDDEN_MS);
  else if (wanted && !source) connect();
});

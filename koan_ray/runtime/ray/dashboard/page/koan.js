// Shows jobs and how far they are. Reads only; text of jobs is put into the page as text nodes and never as markup.
"use strict";

const EVERY_MS = 2000;
const STATUSES = ["queued", "running", "completed", "failed", "cancelled"];
const byId = (id) => document.getElementById(id);
const state = { status: "", cursor: "", cursors: [], selected: "", turn: 0 };

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === false) continue;
    if (key in made && key !== "list") made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function span(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${String(whole % 60).padStart(2, "0")} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} m`;
  return `${Math.floor(whole / 86400)} d`;
}

const since = (instant) => (instant ? Math.max(0, (Date.now() - Date.parse(instant)) / 1000) : null);
const took = (job) => job.duration_s ?? (job.status === "running" ? since(job.started_at) : null);
const moment = (instant) => (instant ? `${new Date(instant).toLocaleString()} (${span(since(instant))} ago)` : "");

function what(job) {
  if (job.last_error && job.status !== "completed") return job.last_error;
  if (job.status === "running" && job.progress_message) return job.progress_message;
  if (["queued", "cancelled"].includes(job.status) && job.reason) return job.reason;
  return job.status === "completed" ? "" : job.description || "";
}

function bar(job) {
  if (!job.progress && job.status !== "running") return document.createTextNode("");
  const percent = `${Math.floor(job.progress * 100)} %`;
  const drawn = element("progress", { value: job.progress, max: 1, ariaLabel: percent, className: job.status });
  return element("span", {}, drawn, percent);
}

// Numbers in metadata are shown as they are written: a double would show 9007199254740993 as …992. What one reads otherwise is
// marked with what nobody could have put into a text. All other numbers are the engine's own, and plain.
const MARK = `${[...crypto.getRandomValues(new Uint32Array(4))].join("")}:`;
const TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

function parse(text) {
  const marked = text.replace(TOKEN, (token) => (token[0] === '"' || String(Number(token)) === token ? token : `"${MARK}${token}"`));
  return plain(JSON.parse(marked));
}

function plain(value) {
  if (typeof value === "string" && value.startsWith(MARK)) return Number(value.slice(MARK.length));
  if (value === null || typeof value !== "object") return value;
  for (const name of Object.keys(value)) if (name !== "metadata") value[name] = plain(value[name]);
  return value;
}

function written(value) {
  const text = JSON.stringify(value).replaceAll(new RegExp(`"${MARK}([^"]*)"`, "g"), "$1");
  return typeof value === "string" && !value.startsWith(MARK) ? value : text;
}

async function ask(path) {
  const answer = await fetch(path, { headers: { Accept: "application/json" }, cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) throw new Error("Sign in to the Ray dashboard first.");
  const found = await answer.text().then(parse).catch(() => ({ title: `${answer.status} ${answer.statusText}` }));
  if (!answer.ok) throw new Error(found.title || answer.statusText);
  return found;
}

function say(text, isBad) {
  const line = byId("state");
  if (line.textContent !== text) line.textContent = text;
  line.className = isBad ? "bad" : "";
}

function drawCounts(counts) {
  byId("counts").replaceChildren(...STATUSES.map((status) => {
    const button = element("button", { type: "button", ariaPressed: String(state.status === status) },
      element("b", {}, (counts[status] ?? 0).toLocaleString()), element("span", { className: status }, status));
    button.title = ["queued", "running"].includes(status) ? "now" : "since the engine has started";
    button.addEventListener("click", () => {
      state.status = state.status === status ? "" : status;
      fromTheTop();
    });
    return element("li", {}, button);
  }));
}

function drawRows(jobs) {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.id : "";
  byId("rows").replaceChildren(...jobs.map((job) => {
    const row = element("tr", { tabIndex: 0 },
      element("td", {}, element("span", { className: `status ${job.status}` }, job.status)),
      element("td", { className: "kind" }, job.kind, job.name ? element("small", {}, job.name) : ""),
      element("td", { className: "bar" }, bar(job)),
      element("td", { className: "what", title: what(job) }, what(job)),
      element("td", { className: "number" }, span(since(job.created_at))),
      element("td", { className: "number" }, span(took(job))),
      element("td", { className: "id" }, job.id));
    row.dataset.id = job.id;
    row.addEventListener("click", () => select(job.id));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") select(job.id); });
    return row;
  }));
  if (focused) [...byId("rows").children].find((row) => row.dataset.id === focused)?.focus();
  byId("nothing").hidden = jobs.length > 0;
}

function facts(job) {
  const steps = job.total_steps ? ` (${job.current_step} of ${job.total_steps})` : "";
  const pairs = {
    Progress: job.progress || job.status === "running" ? `${Math.floor(job.progress * 100)} %${steps}` : "",
    Message: job.progress_message, Why: job.reason, Attempts: job.attempts || "", Created: moment(job.created_at),
    Started: moment(job.started_at), Ended: moment(job.completed_at), Took: span(took(job)),
    Parent: job.parent_job_id, Correlation: job.correlation_id,
    Metadata: Object.entries(job.metadata).map(([key, value]) => `${key}=${written(value)}`).join(", "),
  };
  const list = element("dl");
  for (const [name, value] of Object.entries(pairs)) {
    if (value !== null && value !== undefined && value !== "") list.append(element("dt", {}, name), element("dd", {}, String(value)));
  }
  return list;
}

function drawDetail(job) {
  const parts = [
    element("h2", {}, job.name ? `${job.kind}: ${job.name}` : job.kind),
    element("span", { className: `status ${job.status}` }, job.status), " ",
    element("span", { className: "mono" }, job.id),
    facts(job),
  ];
  if (job.error && job.status !== "completed") {
    parts.push(element("h3", {}, "Last error"), element("pre", {}, job.error.stack_trace || job.last_error));
  }
  if (job.executions.length) {
    parts.push(element("h3", {}, "Executions"), element("table", {}, element("tbody", {}, ...job.executions.map((one) =>
      element("tr", {},
        element("td", { className: "number" }, String(one.attempt_number)),
        element("td", {}, element("span", { className: `status ${one.status}` }, one.status)),
        element("td", {}, one.reason || ""),
        element("td", { className: "number" }, span(one.duration_s)),
        element("td", { className: "what", title: one.error_message || "" }, one.error_type || ""))))));
  }
  byId("about").replaceChildren(...parts);
  byId("detail").hidden = false;
}

async function select(id) {
  state.selected = id;
  await refresh();
}

function fromTheTop() {
  state.cursor = "";
  state.cursors = [];
  refresh();
}

async function engines() {
  const found = (await ask("/api/koan/engines")).engines;
  const chosen = byId("engine").value || new URLSearchParams(location.search).get("engine");
  const known = [...byId("engine").options].map((option) => option.value);
  if (JSON.stringify(known) !== JSON.stringify(found)) {
    byId("engine").replaceChildren(...found.map((name) => element("option", { value: name, selected: name === chosen }, name)));
  }
  return found.length > 0;
}

async function refresh() {
  const turn = ++state.turn;
  try {
    if (!(await engines())) {
      say("No engine runs on this cluster; it starts with the first job.");
      return;
    }
    const engine = byId("engine").value;
    const query = new URLSearchParams({ engine, limit: "50" });
    for (const name of ["status", "cursor"]) if (state[name]) query.set(name, state[name]);
    for (const name of ["text", "kind"]) if (byId(name).value.trim()) query.set(name, byId(name).value.trim());
    const found = await ask(`/api/koan/jobs?${query}`);
    const job = state.selected ? await ask(`/api/koan/jobs/${encodeURIComponent(state.selected)}?${new URLSearchParams({ engine })}`) : null;
    if (turn !== state.turn) return;  // a newer question is on its way
    drawCounts(found.counts);
    drawRows(found.jobs);
    if (job) drawDetail(job);
    byId("older").hidden = found.cursor === null;
    byId("older").dataset.cursor = found.cursor || "";
    byId("newest").hidden = !state.cursor;
    say(`as of ${new Date().toLocaleTimeString()}`);
  } catch (error) {
    if (turn === state.turn) say(error.message, true);
  }
}

async function live() {
  if (byId("live").checked && !document.hidden) await refresh();
  setTimeout(live, EVERY_MS);
}

byId("engine").addEventListener("change", () => { state.selected = ""; byId("detail").hidden = true; fromTheTop(); });
byId("filters").addEventListener("submit", (event) => event.preventDefault());
for (const name of ["text", "kind"]) byId(name).addEventListener("input", fromTheTop);
byId("older").addEventListener("click", () => { state.cursor = byId("older").dataset.cursor; refresh(); });
byId("newest").addEventListener("click", fromTheTop);
byId("close").addEventListener("click", () => { state.selected = ""; byId("detail").hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") byId("close").click(); });
state.status = new URLSearchParams(location.search).get("status") || "";
state.selected = new URLSearchParams(location.search).get("job") || "";
live();

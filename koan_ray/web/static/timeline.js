// When a job waited and when it ran: one line of time, a bar for each attempt.

import { h, svg } from "./dom.js";
import { FINAL, clock, duration, now, statusClass } from "./format.js";

const HEIGHT = 26;
const LEFT = 84;
const MOST = 30;

/** Return a `<figure>` of the job's time, drawn to the width it gets. */
export function timeline(job, executions) {
  const begin = Date.parse(job.created_at);
  const end = Math.max(begin + 1, job.completed_at ? Date.parse(job.completed_at) : now(), job.due_at && job.status === "queued" ? Date.parse(job.due_at) : 0);
  const shown = executions.slice(-MOST);
  const lines = spans(job, shown, end);
  const place = h("div", {});
  const draw = (width) => place.replaceChildren(drawing(lines, begin, end, Math.max(width, 260)));
  const resizing = new ResizeObserver(([entry]) => draw(entry.contentRect.width));
  resizing.observe(place);
  return h("figure", {}, place, h("figcaption", { class: "unseen" }, lines.map((line) => `${line.name}: ${line.says}. `)));
}

function spans(job, executions, end) {
  const lines = [];
  let from = Date.parse(job.created_at);
  const attempts = executions.length ? executions : job.started_at ? [{ attempt_number: job.attempts || 1, started_at: job.started_at, completed_at: job.completed_at, status: job.status, reason: null }] : [];
  for (const attempt of attempts) {
    const start = Date.parse(attempt.started_at);
    const stop = attempt.completed_at ? Date.parse(attempt.completed_at) : end;
    lines.push({
      name: `Attempt ${attempt.attempt_number}`, wait: [from, start], run: [start, stop], status: attempt.status,
      says: `${attempt.status} after ${duration((stop - start) / 1000)}`,
      text: `waited ${duration((start - from) / 1000)}, ${attempt.completed_at ? "ran" : "runs for"} ${duration((stop - start) / 1000)}`,
    });
    from = stop;
  }
  if (!FINAL.has(job.status) && job.status !== "running") {
    const text = job.due_at ? `until ${clock(job.due_at)}` : `for ${duration((now() - from) / 1000)}`;
    lines.push({ name: "Waiting", wait: [from, end], run: null, status: job.status, says: `waits ${text}`, text: `waits ${text}` });
  }
  return lines;
}

function drawing(lines, begin, end, width) {
  const x = (at) => LEFT + ((at - begin) / (end - begin)) * (width - LEFT - 4);
  const height = lines.length * HEIGHT + 22;
  const picture = svg("svg", { class: "timeline", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const ticks = width > 520 ? 5 : 3;
  for (let place = 0; place < ticks; place += 1) {
    const at = begin + ((end - begin) * place) / (ticks - 1);
    const anchor = place === 0 ? "start" : place === ticks - 1 ? "end" : "middle";
    picture.append(svg("line", { class: "tick", x1: x(at), x2: x(at), y1: 0, y2: height - 18 }),
      svg("text", { x: x(at), y: height - 4, "text-anchor": anchor }, place === 0 ? clock(new Date(begin)) : `+${duration((at - begin) / 1000)}`));
  }
  lines.forEach((line, row) => {
    const y = row * HEIGHT + 6;
    picture.append(svg("text", { class: "strong", x: 0, y: y + 11 }, line.name));
    const [from, to] = line.wait;
    if (to > from) picture.append(svg("rect", { class: "wait", x: x(from), y: y + 5, width: Math.max(1, x(to) - x(from)), height: 4, rx: 2 }));
    if (line.run) picture.append(svg("rect", { class: `run ${statusClass(line.status)}`, x: x(line.run[0]), y, width: Math.max(3, x(line.run[1]) - x(line.run[0])), height: 14, rx: 3 }));
    picture.append(svg("title", {}, `${line.name}: ${line.text}`));
  });
  return picture;
}

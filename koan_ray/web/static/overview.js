// The overview: how the engine does, what runs, what has failed.

import { get, may } from "./api.js";
import { durationChart, endedChart } from "./charts.js";
import { h, icon, mark, put, write } from "./dom.js";
import { count, duration, percent, plural, statusClass } from "./format.js";
import { Lines } from "./lines.js";
import { empty, failed, loading } from "./states.js";
import { keep, recall } from "./stored.js";
import { WatchedJobs } from "./watched.js";

const EVERY_MS = 2_000;
const WINDOWS = [["5m", "5 min"], ["1h", "1 h"], ["24h", "24 h"]];
const N_RUNNING = 8;
const N_FAILED = 6;

export function overviewPage() {
  return new Overview();
}

class Overview {
  constructor() {
    this.title = "Overview";
    this.window = WINDOWS.some(([name]) => name === recall("window", "1h")) ? recall("window", "1h") : "1h";
    this.figures = Object.fromEntries([
      ["queued", "Queued", "#/jobs?status=queued", "queued"], ["running", "Running", "#/jobs?status=running", "running"],
      ["oldest", "Oldest queued", "#/jobs?status=queued&order_by=created_at", null], ["throughput", "Throughput", null, null],
      ["failures", "Failure rate", "#/jobs?status=failed&order_by=-completed_at", "failed"], ["took", "Median duration", null, null],
    ].map(([name, ...rest]) => [name, figure(...rest)]));
    this.ended = endedChart();
    this.durations = durationChart();
    this.choice = h("div", { class: "segments", role: "group", "aria-label": "Window of time" }, WINDOWS.map(([name, text]) =>
      h("button", { type: "button", data: { window: name }, on: { click: () => { this.window = name; keep("window", name); this.draw(); } } }, text)));
    this.running = new Lines({ nothing: () => empty("Nothing runs", "Jobs are shown here while they run.", may("submitter") && h("a", { class: "button", href: "#/kinds" }, icon("play"), "Start a job")) });
    this.failures = new Lines({ right: "ended", nothing: () => empty("Nothing has failed", "The jobs that failed last are shown here.") });
    this.trouble = h("div", { class: "card", hidden: true });
    this.sources = h("div", {});
    this.sample = h("span", { class: "small muted" });
    put(this.running.over, loading());
    put(this.failures.over, loading());
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("h1", { tabindex: -1, class: "grow" }, "Overview"), this.sample, this.choice),
      this.trouble,
      h("div", { class: "figures" }, Object.values(this.figures).map((item) => item.element)),
      h("div", { class: "two" }, card("Ended", this.ended.element), card("Durations", this.durations.element)),
      h("div", { class: "two" }, card("Running", this.running.element, "#/jobs?status=running"), card("Failed last", this.failures.element, "#/jobs?status=failed&order_by=-completed_at")),
      this.sources);
    this.watched = [
      new WatchedJobs({ filters: { status: ["running"], order_by: "-started_at", metadata: {} }, limit: N_RUNNING, show: (jobs) => this.running.show(jobs), trouble: (problem) => put(this.running.over, failed(problem)) }),
      new WatchedJobs({ filters: { status: ["failed"], order_by: "-completed_at", metadata: {} }, limit: N_FAILED, show: (jobs) => this.failures.show(jobs), trouble: (problem) => put(this.failures.over, failed(problem)) }),
    ];
    this.ticking = setInterval(() => this.watched.forEach((watched) => watched.isRead && watched.later()), 1_000);
    this.abort = new AbortController();
    this.read();
  }

  async read() {
    clearTimeout(this.timer);
    try {
      if (!document.hidden) {
        this.seen = await get("api/overview", {}, this.abort.signal);
        this.trouble.hidden = true;
        this.draw();
      }
    } catch (problem) {
      if (this.abort.signal.aborted) return;
      this.trouble.hidden = false;
      put(this.trouble, failed(problem, () => this.read()));
    }
    if (!this.abort.signal.aborted) this.timer = setTimeout(() => this.read(), EVERY_MS);
  }

  draw() {
    for (const button of this.choice.children) mark(button, "aria-pressed", String(button.dataset.window === this.window));
    const { seen } = this;
    if (!seen) return;
    const found = seen.windows.find((item) => item.name === this.window) ?? seen.windows[0];
    const span = WINDOWS.find(([name]) => name === found.name)?.[1] ?? found.name;
    const { figures } = this;
    figures.queued.show(counted(seen.counts.queued, seen.queued), seen.waiting ? `${count(seen.waiting)} not yet due` : "ready to run");
    figures.running.show(counted(seen.counts.running, seen.running), seen.max_actors && seen.actors <= seen.max_actors ? `${plural(seen.actors, "actor")} of ${count(seen.max_actors)}` : plural(seen.actors, "actor"));
    figures.oldest.show(seen.oldest_queued_s === null ? "–" : duration(seen.oldest_queued_s), seen.oldest_queued_s === null ? "the queue is empty" : "the longest wait");
    figures.throughput.show(rate(found.throughput_per_s), `${found.sampled ? "at least " : ""}${count(found.n)} in ${span}`);
    figures.failures.show(percent(found.failure_rate, 1), found.failure_rate === null ? "nothing ended" : `in ${span}`, found.failure_rate >= 0.2);
    figures.took.show(duration(found.p50_s), found.p95_s === null ? "" : `95 % within ${duration(found.p95_s)}`);
    write(this.sample, found.sampled ? `Estimated from the last ${count(found.n)} that ended` : "");
    this.ended.show(found.buckets);
    this.durations.show(found.buckets);
    this.showSources(seen.sources);
  }

  showSources(sources) {
    const key = JSON.stringify(sources);
    if (key === this.sourcesKey) return;
    this.sourcesKey = key;
    put(this.sources, card("Sources", h("div", { class: "scroll" }, h("table", { class: "plain-table" },
      h("caption", { class: "unseen" }, "Where jobs are kept"),
      h("thead", {}, h("tr", {}, ["Source", "State", "Partitions"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, sources.map((source) => h("tr", {},
        h("th", { scope: "row", class: "text" }, source.name),
        h("td", {}, h("span", { class: `badge ${source.problem ? "is-failed" : "is-completed"}` }, h("span", { class: "dot", "aria-hidden": "true" }), h("span", { class: "text" }, source.state)), source.problem && h("p", { class: "small text" }, source.problem)),
        h("td", {}, h("div", { class: "tags" }, source.partitions.map((name) => h("a", { class: "tag", href: `#/jobs?source=${encodeURIComponent(source.name)}${name ? `&partition=${encodeURIComponent(name)}` : ""}` }, name || "default")))))))))));
  }

  close() {
    clearTimeout(this.timer);
    clearInterval(this.ticking);
    this.abort.abort();
    this.watched.forEach((watched) => watched.close());
    this.ended.close();
    this.durations.close();
  }
}

function counted(found, live) {
  return found?.more ? `${count(found.n)}+` : count(Math.max(found?.n ?? 0, 0) || live);
}

function rate(perSecond) {
  if (!perSecond) return "0";
  if (perSecond >= 1) return `${perSecond >= 10 ? count(Math.round(perSecond)) : perSecond.toFixed(1)} /s`;
  return perSecond * 60 >= 1 ? `${(perSecond * 60).toFixed(1)} /min` : `${(perSecond * 3600).toFixed(1)} /h`;
}

function figure(name, href, status) {
  const value = h("span", { class: "value" }, "–");
  const said = h("span", { class: "note" });
  const element = h(href ? "a" : "div", { class: `card figure ${status ? statusClass(status) : ""}`, href },
    h("span", { class: "name" }, status && h("span", { class: "dot", "aria-hidden": "true" }), name), value, said);
  return {
    element,
    show(text, more, isAlarming = false) {
      write(value, text);
      write(said, more);
      value.classList.toggle("alarming", isAlarming);
    },
  };
}

function card(headline, body, more) {
  const isList = Boolean(more) || headline === "Sources";
  return h("section", { class: `card ${isList ? "plain" : ""}`, "aria-label": headline },
    h("div", { class: "card-head" }, h("h2", { class: "grow" }, headline), more && h("a", { class: "small", href: more, "aria-label": `${headline}: all` }, "All")),
    h("div", { class: "card-body" }, body));
}

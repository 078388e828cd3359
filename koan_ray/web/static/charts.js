// Charts of our own: bars of what ended, lines of how long it took. Each follows the pointer and the arrow keys, and can be
// read as a table.

import { h, newId, put, svg } from "./dom.js";
import { clock, count, duration } from "./format.js";

const HEIGHT = 190;
const TOP = 8;
const BOTTOM = 22;
const RIGHT = 6;

/** A chart of `series` over buckets. render(plot, buckets): draws into it; legend: [class, name, value(bucket)]. */
class Chart {
  constructor({ label, legend, top, axis, render }) {
    Object.assign(this, { label, legend, top, axis, render, buckets: [] });
    this.picture = svg("svg", { class: "chart", role: "img", tabindex: 0, "aria-label": label });
    this.readout = h("div", { class: "legend", id: newId("legend"), "aria-live": "polite" });
    this.rows = h("tbody", {});
    this.element = h("div", {}, this.readout, this.picture,
      h("details", { class: "as-table" }, h("summary", {}, "As a table"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${label}, as a table` },
        h("table", { class: "plain-table" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "From"), legend.map(([, name]) => h("th", { scope: "col", class: "number" }, name)))), this.rows))));
    this.at = null;
    this.picture.addEventListener("pointermove", (event) => this.point(this.placeOf(event)));
    this.picture.addEventListener("pointerleave", () => this.point(null));
    this.picture.addEventListener("blur", () => this.point(null));
    this.picture.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      this.point(Math.max(0, Math.min(this.buckets.length - 1, (this.at ?? (by > 0 ? -1 : this.buckets.length)) + by)));
    });
    this.resizing = new ResizeObserver(([entry]) => { this.width = entry.contentRect.width; this.draw(); });
    this.resizing.observe(this.picture);
  }

  show(buckets) {
    this.buckets = buckets;
    this.draw();
    put(this.rows, buckets.filter((bucket) => this.legend.some(([, , value]) => value(bucket) !== "–" && value(bucket) !== "0")).map((bucket) =>
      h("tr", {}, h("th", { scope: "row" }, clock(bucket.at)), this.legend.map(([, , value]) => h("td", { class: "number" }, value(bucket))))));
    this.point(this.at);
  }

  placeOf(event) {
    const { left } = this.picture.getBoundingClientRect();
    const place = Math.floor(((event.clientX - left - this.left) / (this.width - this.left - RIGHT)) * this.buckets.length);
    return place >= 0 && place < this.buckets.length ? place : null;
  }

  draw() {
    if (!this.width || !this.buckets.length) return;
    const most = nice(Math.max(...this.buckets.map(this.top), 0));
    const labels = [0, most / 2, most].map((value) => this.axis(value));
    this.left = Math.max(...labels.map((text) => text.length)) * 6.4 + 12;
    const inner = this.width - this.left - RIGHT;
    const plot = {
      width: inner / this.buckets.length,
      x: (place) => this.left + (place * inner) / this.buckets.length,
      y: (value) => HEIGHT - BOTTOM - (most ? value / most : 0) * (HEIGHT - TOP - BOTTOM),
    };
    this.cursor = svg("rect", { class: "cursor", y: TOP, height: HEIGHT - TOP - BOTTOM, width: plot.width, visibility: "hidden" });
    this.plot = plot;
    const grid = [0, most / 2, most].map((value, place) => [
      svg("line", { class: "grid", x1: this.left, x2: this.width - RIGHT, y1: plot.y(value), y2: plot.y(value) }),
      (most > 0 || place === 0) && svg("text", { x: this.left - 8, y: plot.y(value) + 4, "text-anchor": "end" }, labels[place])]);
    const n = this.buckets.length;
    const step = Math.ceil(n / Math.max(2, Math.floor(inner / 110)));
    const seconds = Date.parse(this.buckets.at(-1).at) - Date.parse(this.buckets[0].at) < 900_000;
    const times = this.buckets.map((bucket, place) => (place % step === 0 && place < n - step / 2 ? svg("text", { x: plot.x(place), y: HEIGHT - 4, "text-anchor": place ? "middle" : "start" }, clock(bucket.at, seconds)) : null));
    const now = svg("text", { x: this.width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "now");
    put(this.picture, grid.map((pair) => pair.filter(Boolean)), this.cursor, this.render(plot, this.buckets), times.filter(Boolean), now);
    this.picture.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
  }

  point(place) {
    this.at = place;
    const bucket = place === null ? null : this.buckets[place];
    if (this.cursor && this.plot) {
      this.cursor.setAttribute("visibility", bucket ? "visible" : "hidden");
      if (bucket) this.cursor.setAttribute("x", this.plot.x(place));
    }
    const key = bucket ? JSON.stringify([bucket, place]) : "";
    if (key === this.told) return;
    this.told = key;
    put(this.readout, this.legend.map(([name, text, value]) => h("span", {}, h("i", { class: name }), text, bucket && h("b", {}, value(bucket)))), bucket && h("span", {}, `from ${clock(bucket.at)}`));
  }

  close() {
    this.resizing.disconnect();
  }
}

/** The next round number. */
function nice(value) {
  if (value <= 0) return 0;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((step) => step * size).find((step) => step >= value);
}

/** Jobs that ended, stacked by how. */
export function endedChart() {
  const series = ["completed", "cancelled", "failed"];
  return new Chart({
    label: "Jobs that ended, over time",
    legend: [["completed", "completed", (b) => count(b.completed)], ["failed", "failed", (b) => count(b.failed)], ["cancelled", "cancelled", (b) => count(b.cancelled)]],
    top: (b) => b.completed + b.failed + b.cancelled,
    axis: (value) => (Number.isInteger(value) ? count(value) : ""),
    render: (plot, buckets) => buckets.flatMap((bucket, place) => {
      let sum = 0;
      return series.filter((name) => bucket[name] > 0).map((name) => {
        const from = plot.y(sum);
        sum += bucket[name];
        const gap = Math.min(3, plot.width * 0.2);
        return svg("rect", { class: name, x: plot.x(place) + gap / 2, width: Math.max(1, plot.width - gap), y: plot.y(sum), height: Math.max(1, from - plot.y(sum)), rx: 1.5 });
      });
    }),
  });
}

/** How long jobs took: the median, and what one in twenty exceeds. */
export function durationChart() {
  const line = (plot, buckets, name, field) => {
    const points = buckets.map((bucket, place) => (bucket[field] === null ? null : [plot.x(place) + plot.width / 2, plot.y(bucket[field])]));
    const path = points.map((point, place) => (point ? `${place && points[place - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}` : "")).join("");
    const dots = points.filter((point, place) => point && (!points[place - 1] || !points[place + 1]));
    return [svg("path", { class: `line ${name}`, d: path || "M0 0" }), dots.map(([cx, cy]) => svg("circle", { class: name, cx, cy, r: 2.5 }))];
  };
  return new Chart({
    label: "Durations, over time",
    legend: [["p50", "median", (b) => duration(b.p50_s)], ["p95", "95th percentile", (b) => duration(b.p95_s)]],
    top: (b) => Math.max(b.p50_s ?? 0, b.p95_s ?? 0),
    axis: (value) => duration(value),
    render: (plot, buckets) => [line(plot, buckets, "p95", "p95_s"), line(plot, buckets, "p50", "p50_s")].flat(Infinity),
  });
}

// The archive: jobs that ended some time ago, in the partitions that the archivist moves them to.

import { get, may, post } from "./api.js";
import { forSelected, selectionButtons } from "./bulk.js";
import { confirm } from "./dialog.js";
import { h, put } from "./dom.js";
import { FilterBar } from "./filterbar.js";
import { fromAddress, hiddenCount, toAddress } from "./filters.js";
import { plural } from "./format.js";
import { JobList } from "./joblist.js";
import { tellDone } from "./messages.js";
import { empty, failed, loading } from "./states.js";

const PLAIN = "archive";
const ARCHIVE = /^archive(-|$)/;

export function archivePage(query) {
  return new Archive(query);
}

class Archive {
  constructor(query) {
    this.title = "Archive";
    this.canBeKept = true;
    this.scrollTop = 0;
    this.filters = { partition: PLAIN, ...fromAddress(query) };
    this.tools = h("div", { class: "list-tools" });
    this.selection = h("div", { class: "selection-bar", role: "group", "aria-label": "Selected jobs", hidden: true });
    this.place = h("div", { class: "table-frame" }, loading("Looking for archives"));
    this.element = h("div", { class: "page fills list-page" },
      h("div", { class: "page-head" }, h("h1", { tabindex: -1, class: "grow" }, "Archive"),
        may("admin") && h("button", { class: "button", type: "button", on: { click: () => this.run() } }, "Archive what is due …")),
      this.tools, this.place);
    this.read();
  }

  async read() {
    try {
      const { items } = await get("api/sources");
      if (this.isClosed) return;
      this.places = items.flatMap((source) => source.partitions.filter((name) => ARCHIVE.test(name)).map((name) => [source.name, name]));
      this.build();
    } catch (problem) {
      if (!this.isClosed) put(this.place, failed(problem, () => this.read()));
    }
  }

  build() {
    if (!this.places.some(([, name]) => name === this.filters.partition) && this.places.length && !this.filters.source) [[, this.filters.partition]] = this.places;
    this.bar = new FilterBar({ filters: this.filters, isArchive: true, change: (filters) => this.become(filters) });
    put(this.tools, this.choice(), this.bar.elements.slice(1));
    this.list = new JobList({
      filters: this.filters, label: "Archived jobs", keeps: (job) => job.archived, onPick: (n) => this.showSelection(n),
      nothing: () => (hiddenCount({ ...this.filters, partition: null, source: null }) || this.filters.text || this.filters.status
        ? empty("No archived job matches", "Nothing in this archive fits these filters.")
        : empty("The archive is empty", "Jobs that are kept as documents move here when they ended some time ago: 30 days unless [archival] in the settings says otherwise. Until then they are among the other jobs.",
          h("a", { class: "button", href: toAddress({ status: ["completed", "failed", "cancelled"], order_by: "-completed_at" }) }, "Ended jobs that are not archived"))),
    });
    put(this.place, this.selection, this.list.scroll, h("div", { class: "table-foot" }, this.list.said));
  }

  /** Which archive, where there are several. */
  choice() {
    if (this.places.length < 2) return null;
    return h("div", { class: "chip-set slides", role: "group", "aria-label": "Archives" }, this.places.map(([source, name]) => {
      const isHere = this.filters.partition === name && (!this.filters.source || this.filters.source === source);
      return h("a", { class: "chip", href: toAddress({ source, partition: name, metadata: {} }, "/archive"), "aria-current": isHere ? "true" : null }, `${source} / ${name}`);
    }));
  }

  become(filters) {
    this.filters = filters;
    const hash = toAddress(filters, "/archive");
    this.hash = hash;
    history.replaceState(null, "", hash);
    this.list.restart(filters);
  }

  showSelection(n) {
    this.selection.hidden = n === 0;
    if (!n) return;
    put(this.selection, h("b", {}, `${plural(n, "job")} selected`), selectionButtons(["restore", "remove"], async (name) => {
      const jobs = [...this.list.picked].map((id) => this.list.jobs.get(id)).filter(Boolean);
      if (await forSelected(name, jobs)) this.list.restart(this.filters);
    }), h("button", { class: "link-button", type: "button", on: { click: () => this.list.unpickAll() } }, "Clear selection"));
  }

  /** Count what the policies would move, and move it when that is confirmed. */
  async run() {
    const total = (answer) => Object.values(answer.policies).reduce((sum, policy) => sum + (policy.due ?? policy.moved ?? 0), 0);
    const done = await confirm({
      headline: "Archive what is due?", text: "The archival policies are applied now instead of at their next time: jobs that ended long enough ago move to the archive. The next step only counts them.",
      verb: "Count them", act: () => post("api/archive/run", { dry_run: true }),
    });
    if (!done) return;
    const due = total(done);
    if (!due) {
      tellDone("Nothing is due", "No job has ended long enough ago.");
      return;
    }
    const moved = await confirm({ headline: `Archive ${plural(due, "job")}?`, text: `${plural(due, "job")} will move to the archive. They can be restored from here.`, verb: `Archive ${plural(due, "job")}`, act: () => post("api/archive/run", { dry_run: false }) });
    if (!moved) return;
    tellDone("Archived", plural(Object.values(moved.policies).reduce((sum, policy) => sum + (policy.moved ?? 0), 0), "job"));
    this.list?.restart(this.filters);
  }

  leave() {
    if (!this.list) return;
    this.scrollTop = this.list.scroll.scrollTop;
    this.list.detach();
    this.bar.detach();
  }

  back() {
    if (!this.list) return;
    this.bar.attach();
    this.list.attach();
    this.list.rows.later();
    this.list.scroll.scrollTop = this.scrollTop;
  }

  close() {
    this.isClosed = true;
    this.list?.close();
    this.bar?.close();
  }
}

// The page of jobs: a list with search, filters, saved views, selection and bulk actions.

import { may } from "./api.js";
import { forAll, forSelected, selectionButtons } from "./bulk.js";
import { h, put } from "./dom.js";
import { FilterBar } from "./filterbar.js";
import { fromAddress, hiddenCount, toAddress } from "./filters.js";
import { plural } from "./format.js";
import { JobList } from "./joblist.js";
import { empty } from "./states.js";

export function jobsPage(query) {
  let filters = fromAddress(query);
  let scrollTop = 0;

  const page = {
    title: "Jobs",
    canBeKept: true,
    /** Take over an address of this page without being opened anew. */
    takes(hash) {
      if (!/^#\/jobs(\?|$)/.test(hash) || !page.element.isConnected) return false;
      if (hash === page.hash) return true;
      page.hash = hash;
      const wanted = fromAddress(new URLSearchParams(hash.split("?")[1] ?? ""));
      if (toAddress(wanted) !== toAddress(filters)) reopen(wanted);
      return true;
    },
    leave() {
      scrollTop = list.scroll.scrollTop;
      list.detach();
      bar.detach();
    },
    back() {
      bar.attach();
      list.attach();
      list.rows.later();
      list.scroll.scrollTop = scrollTop;
    },
    close() {
      list.close();
      bar.close();
    },
  };

  function change(next) {
    filters = next;
    const hash = toAddress(filters);
    page.hash = hash;
    history.replaceState(null, "", hash);
    list.restart(filters);
  }

  function reopen(wanted) {
    bar.close();
    filters = wanted;
    bar = makeBar();
    put(tools, bar.elements);
    list.restart(filters);
  }

  const makeBar = () => new FilterBar({ filters, change });
  const nothing = () => (hiddenCount(filters) || filters.text || filters.status?.length
    ? empty("No job matches", "Nothing fits these filters. Archived jobs are found under Archive.", h("a", { class: "button", href: "#/jobs" }, "Show all jobs"))
    : empty("No jobs yet", "Jobs appear here as soon as one is started: from your code, from the command line, or here.",
      may("submitter") && h("a", { class: "button primary", href: "#/kinds" }, "Start a job")));

  let bar = makeBar();
  const tools = h("div", { class: "list-tools" }, bar.elements);
  const selection = h("div", { class: "selection-bar", role: "group", "aria-label": "Selected jobs", hidden: true });
  const list = new JobList({ filters, nothing, onPick: (n) => showSelection(n) });
  const wholeList = may("operator")
    ? [h("button", { class: "link-button", type: "button", on: { click: () => forAll("retry", filters) } }, "Retry all …"),
      h("button", { class: "link-button", type: "button", on: { click: () => forAll("cancel", filters) } }, "Cancel all …")]
    : [];

  function showSelection(n) {
    selection.hidden = n === 0;
    if (!n) return;
    put(selection, h("b", {}, `${plural(n, "job")} selected`), selectionButtons(["cancel", "retry", "remove"], async (name) => {
      const jobs = [...list.picked].map((id) => list.jobs.get(id)).filter(Boolean);
      if (await forSelected(name, jobs)) list.unpickAll();
    }), h("button", { class: "link-button", type: "button", on: { click: () => list.unpickAll() } }, "Clear selection"));
  }

  page.element = h("div", { class: "page fills list-page" },
    h("div", { class: "page-head" }, h("h1", { tabindex: -1, class: "grow" }, "Jobs"),
      h("div", { class: "actions" }, may("submitter") && h("a", { class: "button primary", href: "#/kinds" }, "Start a job"))),
    tools,
    h("div", { class: "table-frame" }, selection, list.scroll, h("div", { class: "table-foot" }, list.said, h("span", { class: "grow" }), wholeList)));
  return page;
}

// Cancel, retry, restore or delete many jobs: those selected one by one, or all that match, after the count was confirmed.

import { call, may, post, remove } from "./api.js";
import { confirm, dialog } from "./dialog.js";
import { h } from "./dom.js";
import { toBulk } from "./filters.js";
import { count, plural } from "./format.js";
import { tellDone, tellProblem } from "./messages.js";

const AT_ONCE = 4;

export const DEEDS = {
  cancel: { verb: "Cancel", done: "cancelled", role: "operator", fits: (job) => !["completed", "failed", "cancelled"].includes(job.status), act: (id, reason) => post(`api/jobs/${id}/cancel`, { reason }), danger: true },
  retry: { verb: "Retry", done: "started anew", role: "operator", fits: (job) => ["failed", "cancelled"].includes(job.status), act: (id) => call("POST", `api/jobs/${id}/retry`) },
  restore: { verb: "Restore", done: "restored", role: "admin", fits: (job) => job.archived, act: (id) => call("POST", `api/jobs/${id}/restore`) },
  remove: { verb: "Delete", done: "deleted", role: "admin", fits: (job) => ["completed", "failed", "cancelled"].includes(job.status), act: (id) => remove(`api/jobs/${id}`), danger: true },
};

/** Do something with the selected jobs, a few at a time; tells what came of it. */
export async function forSelected(name, jobs) {
  const deed = DEEDS[name];
  const fitting = jobs.filter(deed.fits);
  if (!fitting.length) {
    tellProblem({ title: `Nothing to ${deed.verb.toLowerCase()}`, detail: `None of the ${plural(jobs.length, "selected job")} is in a state in which that is possible.` });
    return false;
  }
  const left = jobs.length - fitting.length;
  const others = left ? ` The other ${count(left)} of the selection ${left === 1 ? "is" : "are"} left alone.` : "";
  return confirm({
    headline: `${deed.verb} ${plural(fitting.length, "job")}?`,
    text: `${plural(fitting.length, "selected job")} will be ${deed.done}.${others}`,
    verb: `${deed.verb} ${plural(fitting.length, "job")}`, danger: deed.danger, reason: name === "cancel",
    act: async (reason) => {
      const problems = await each(fitting, (job) => deed.act(encodeURIComponent(job.id), reason));
      const n = fitting.length - problems.length;
      if (n) tellDone(`${plural(n, "job")} ${deed.done}`);
      if (problems.length) tellProblem({ title: `${plural(problems.length, "job")} could not be ${deed.done}`, detail: problems[0].detail });
      return true;
    },
  });
}

async function each(jobs, act) {
  const waiting = [...jobs];
  const problems = [];
  const work = async () => {
    for (let job = waiting.shift(); job; job = waiting.shift()) {
      try {
        await act(job);
      } catch (problem) {
        problems.push(problem);
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  return problems;
}

/** Do something with all jobs that match: counts first, and does it only if the count still holds. */
export async function forAll(name, filters) {
  const deed = DEEDS[name];
  const asked = toBulk(filters);
  let counted;
  try {
    counted = (await post(`api/jobs/${name}`, { filters: asked })).counted;
  } catch (problem) {
    tellProblem(problem, `${deed.verb} all`);
    return false;
  }
  if (!counted) {
    await dialog(`Nothing to ${deed.verb.toLowerCase()}`, (close) => [
      h("p", {}, name === "retry" ? "No failed or cancelled job matches these filters." : "No job that matches these filters is still going."),
      h("div", { class: "actions" }, h("button", { class: "button primary", type: "button", on: { click: () => close(null) } }, "Close")),
    ]);
    return false;
  }
  return confirm({
    headline: `${deed.verb} ${plural(counted, "job")}?`,
    text: `${plural(counted, "job")} ${counted === 1 ? "matches" : "match"} the filters of this list, ${counted === 1 ? "it" : "all of them"} will be ${deed.done}. If the number changes before, nothing happens.`,
    verb: `${deed.verb} ${plural(counted, "job")}`, danger: deed.danger, reason: name === "cancel",
    act: async (reason) => {
      const answer = await post(`api/jobs/${name}`, { filters: asked, expected: counted, reason });
      const rest = answer.skipped ? `${plural(answer.skipped, "job")} had changed meanwhile.` : "";
      if (answer.failed) tellProblem({ title: `${plural(answer.failed, "job")} could not be ${deed.done}`, detail: answer.errors[0]?.message ?? "" });
      tellDone(`${plural(answer.done, "job")} ${deed.done}`, rest);
      return true;
    },
  });
}

/** Buttons for what may be done with the selection. */
export function selectionButtons(names, act) {
  return names.filter((name) => may(DEEDS[name].role))
    .map((name) => h("button", { class: `button ${DEEDS[name].danger ? "danger" : ""}`, type: "button", on: { click: () => act(name) } }, DEEDS[name].verb));
}

// Begins: signs in, draws the frame, and opens the page that the address names.

import { archivePage } from "./archive.js";
import { onSignedOut, resume, signIn } from "./api.js";
import { batchesPage } from "./batches.js";
import { put } from "./dom.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { kindsPage } from "./kinds.js";
import * as live from "./live.js";
import { frame } from "./shell.js";
import { forgetAll } from "./messages.js";
import { overviewPage } from "./overview.js";
import { signInPage, tokenOfAddress } from "./signin.js";
import { startPage } from "./start.js";
import { empty, failed, loading } from "./states.js";
import { h } from "./dom.js";

const ROUTES = [
  [/^\/$/, "overview", overviewPage],
  [/^\/jobs$/, "jobs", jobsPage],
  [/^\/jobs\/([^/]+)$/, "jobs", jobPage],
  [/^\/batches$/, "batches", batchesPage],
  [/^\/kinds$/, "kinds", kindsPage],
  [/^\/kinds\/([^/]+)\/start$/, "kinds", startPage],
  [/^\/archive$/, "archive", archivePage],
];

const root = document.getElementById("app");
let shell = null;
let page = null;
let kept = null; // the list that a job was opened from: going back finds it as it was left
let isFirst = true;

function route() {
  const [path, search = ""] = (location.hash.slice(1) || "/").split("?", 2);
  for (const [pattern, place, open] of ROUTES) {
    const found = pattern.exec(path);
    if (found) return { place, open, args: found.slice(1).map(decoded), query: new URLSearchParams(search) };
  }
  return { place: null, open: nowherePage, args: [], query: new URLSearchParams() };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function nowherePage() {
  return { title: "Nowhere", element: h("div", { class: "page" }, h("h1", { tabindex: -1 }, "Nowhere"), empty("There is no such page", "The address may be mistyped.")) };
}

function show() {
  if (!shell || live.currentState() === "off") return;
  const { place, open, args, query } = route();
  if (page?.takes?.(location.hash)) return; // the page has changed its own address
  const leaving = page;
  const isBack = kept && kept.hash === location.hash;
  if (leaving?.canBeKept && open === jobPage) {
    if (kept !== leaving) kept?.close?.();
    kept = leaving;
    kept.leave();
  } else if (leaving) {
    leaving.close?.();
    if (leaving === kept) kept = null;
  }
  if (open !== jobPage && kept && !isBack) {
    kept.close?.();
    kept = null;
  }
  page = isBack ? kept : open(...args, query);
  page.hash = location.hash;
  put(shell.main, page.element);
  shell.main.scrollTop = 0;
  shell.at(place);
  document.title = `${page.title} · koan_ray`;
  if (isBack) page.back();
  else if (!isFirst) page.element.querySelector("h1")?.focus();
  isFirst = false;
}

/** The form that had the focus is gone: the page gets it. */
function enterByHand() {
  isFirst = false;
  return enter();
}

async function enter() {
  leave();
  const opened = shell = frame(root);
  put(shell.main, loading());
  await live.start();
  if (shell === opened) show();
}

function leave() {
  live.stop();
  page?.close?.();
  if (kept !== page) kept?.close?.();
  page = kept = null;
  shell?.close();
  shell = null;
}

async function begin() {
  put(root, h("div", { class: "alone-frame" }, loading()));
  const token = tokenOfAddress();
  try {
    await (token ? signIn(token) : resume());
    await enter();
  } catch (problem) {
    if (problem.status === 401) signInPage(root, enterByHand, token ? problem : null);
    else put(root, h("main", { class: "alone-frame", id: "main" }, failed(problem, begin)));
  }
}

onSignedOut(() => {
  if (!shell) return; // several calls may find out at once
  for (const open of document.querySelectorAll("dialog[open]")) open.close();
  leave();
  forgetAll();
  signInPage(root, enterByHand);
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main")?.focus();
});
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) begin();
  else show();
});
begin();

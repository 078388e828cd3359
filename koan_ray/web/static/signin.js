// Exchanging a token for a cookie that scripts cannot read. The token itself is kept nowhere.

import { signIn } from "./api.js";
import { h, newId, put } from "./dom.js";
import { brand } from "./shell.js";
import { notice } from "./states.js";

/** Draw the sign-in page; `done` is called when somebody has signed in. */
export function signInPage(place, done, problem = null) {
  const id = newId("token");
  const trouble = h("div", {}, problem && notice(problem));
  const input = h("input", { class: "input", id, type: "password", required: true, maxlength: 500, autocomplete: "current-password", spellcheck: "false", "aria-describedby": `${id}-hint` });
  const go = h("button", { class: "button primary", type: "submit" }, "Sign in");
  const form = h("form", { class: "form", on: { submit: async (event) => {
    event.preventDefault();
    go.disabled = true;
    put(trouble);
    try {
      await signIn(input.value.trim());
      done();
    } catch (error) {
      put(trouble, notice(error.status === 401 ? { title: "That is not a valid token", detail: "Check that it is complete, has not expired, and belongs to this server." } : error));
      go.disabled = false;
      input.select();
    }
  } } },
  h("input", { type: "text", autocomplete: "username", value: "koan_ray", hidden: true, "aria-hidden": "true", tabindex: -1 }),
  h("div", { class: "field" }, h("label", { for: id }, "Token"), input,
    h("p", { class: "hint", id: `${id}-hint` }, "koan-ray prints one when it starts; others are set under [web] tokens in koan.toml.")),
  trouble, go);
  document.title = "Sign in · koan_ray"; // the last one may have named a job
  put(place, h("main", { class: "alone-frame", id: "main", tabindex: -1 }, h("div", { class: "alone card" }, brand(), h("h1", {}, "Sign in"), form)));
  input.focus();
}

/** The token of an address like `/#token=…`, which koan-ray prints; it is taken out of the address at once. */
export function tokenOfAddress() {
  const found = /^#token=([^&]+)$/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", "#/");
  try {
    return decodeURIComponent(found[1]);
  } catch {
    return null;
  }
}

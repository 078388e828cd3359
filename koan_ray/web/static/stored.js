// What this browser remembers: theme, saved views, whether single keys are shortcuts. Never a token.

/** Return what was kept under a name; `otherwise` if nothing usable was. */
export function recall(name, otherwise) {
  try {
    const text = localStorage.getItem(`koan.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(`koan.${name}`, JSON.stringify(value));
  } catch {
    // Full or forbidden: it holds until the page is closed.
  }
}

/** The theme is kept as plain text: theme.js reads it before any module is loaded. */
export function theme() {
  return document.documentElement.dataset.theme ?? "system";
}

export function setTheme(wanted) {
  if (wanted === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = wanted;
  try {
    localStorage.setItem("koan.theme", wanted);
  } catch {
    // As above.
  }
}

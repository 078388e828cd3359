// Elements made of data. Text becomes text nodes; there is no way to give markup, style attributes or handlers as text.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "indeterminate", "readOnly", "multiple"]);
const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null) continue;
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    } else if (name === "data") {
      for (const [key, item] of Object.entries(value)) if (item !== null && item !== undefined) element.dataset[key] = item;
    } else if (PROPERTIES.has(name)) {
      element[name] = value;
    } else if (name === "href" && !String(value).startsWith("#")) {
      throw new TypeError("links of the dashboard lead to its own pages");
    } else if (name === "style" || name === "srcdoc" || name.startsWith("on")) {
      throw new TypeError(`${name} is not set this way`);
    } else if (value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));
}

/** An HTML element. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** An SVG element. */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** Put these in place of what an element holds. */
export function put(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

/** Replace what a page holds, and leave the focus on its heading if it was within. */
export function putPage(element, ...children) {
  const hadFocus = element.contains(document.activeElement);
  put(element, ...children);
  if (hadFocus) element.querySelector("h1")?.focus();
  return element;
}

/** Write a text, if it is another one than is there. */
export function write(element, text) {
  const wanted = text ?? "";
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Set or take away an attribute, if that changes anything. */
export function mark(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Call `render` with a place only when what it depends on has changed, so that focus and selection stay. */
export function section(place, render) {
  let before;
  return (...inputs) => {
    const key = JSON.stringify(inputs);
    if (key === before) return;
    before = key;
    put(place, render(...inputs));
  };
}

let last = 0;
/** A new id for labels. */
export function newId(prefix = "x") {
  last += 1;
  return `${prefix}-${last}`;
}

const ICONS = {
  overview: "M3 13h7V3H3zM14 21h7V11h-7zM3 21h7v-4H3zM14 7h7V3h-7z",
  jobs: "M4 6h16M4 12h16M4 18h16",
  batches: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  kinds: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM12 12l8-4.5M12 12v9M12 12L4 7.5",
  archive: "M3 4h18v4H3zM5 8v12h14V8M10 12h4",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M4.9 4.9l1.4 1.4M17.7 17.7l1.4 1.4M2 12h2M20 12h2M4.9 19.1l1.4-1.4M17.7 6.3l1.4-1.4",
  moon: "M20 14.5A8.5 8.5 0 019.5 4 8.5 8.5 0 1020 14.5z",
  system: "M3 5h18v11H3zM8 20h8M12 16v4",
  search: "M10.5 4a6.5 6.5 0 100 13 6.5 6.5 0 000-13zM15.5 15.5L21 21",
  help: "M9 9a3 3 0 116 0c0 2-3 2.5-3 4.5M12 17.5v.5",
  out: "M14 4H5v16h9M10 12h11M17 8l4 4-4 4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  filter: "M3 5h18l-7 8v6l-4 2v-8z",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  play: "M7 4l13 8-13 8z",
};

/** One of our line drawings; it says nothing to a screen reader. */
export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round" }));
}

// A form made of a JSON Schema. Each input has `element`, `read()` (undefined: left out), `write(value)` and `fault(path,
// message)`, which shows what is wrong at the input that the path leads to and tells whether there was one.

import { h, icon, mark, newId, put } from "./dom.js";
import { numberOf, parse, same, stringify, typeOf, wholeOf } from "./exact.js";
import { alternatives, labelOf, limitsOf, nameOf, resolved, shapeOf } from "./schema.js";

const DEEPEST = 12;
const INPUT_TYPES = { "date-time": "datetime-local", date: "date", time: "time", email: "email", uri: "url", password: "password" };

/** A value that cannot be read from an input, such as text where a number should be. */
export class Unreadable extends Error {}

/** Return the input for a schema. `name` labels it; `isRequired`: it cannot be left out. */
export function inputFor(schema, { root = schema, name = "", isRequired = true, depth = 0 } = {}) {
  const found = resolved(schema, root);
  const options = { root, name, isRequired, depth };
  if (depth > DEEPEST) return new JsonInput(found, options);
  const choice = alternatives(found, root);
  if (choice) {
    if (choice.some.length === 1) return choice.nullable ? new Optional(found, choice.some[0], options) : inputFor({ ...choice.some[0], ...beside(found) }, options);
    return choice.some.length ? new Union(found, choice, options) : new JsonInput(found, options);
  }
  const shape = shapeOf(found);
  const made = { object: ObjectInput, array: ListInput, tuple: TupleInput, map: MapInput, boolean: BooleanInput, enum: EnumInput, const: ConstInput, null: NullInput, json: JsonInput };
  return new (made[shape] ?? TextInput)(found, options);
}

function beside(schema) {
  const { anyOf: _a, oneOf: _o, discriminator: _d, ...rest } = schema;
  return rest;
}

/** A labelled input with a hint and a place for what is wrong with it. */
class Field {
  constructor(schema, options) {
    Object.assign(this, { schema, ...options, id: newId("field") });
    this.wrong = h("p", { class: "wrong", id: `${this.id}-wrong`, hidden: true });
  }

  label() {
    return labelOf(this.schema, this.name);
  }

  required() {
    return this.isRequired && h("span", { class: "required", title: "required", "aria-hidden": "true" }, "*");
  }

  hint() {
    const limits = limitsOf(this.schema);
    const text = [this.schema.description, limits && limits.charAt(0).toUpperCase() + limits.slice(1)].filter(Boolean).join("\n");
    return text && h("p", { class: "hint", id: `${this.id}-hint` }, text);
  }

  frame(input) {
    this.input = input;
    input.id = this.id;
    const hint = this.hint();
    mark(input, "aria-describedby", [hint && hint.id, this.wrong.id].filter(Boolean).join(" "));
    mark(input, "aria-required", this.isRequired ? "true" : null);
    return h("div", { class: "field" }, h("label", { for: this.id }, this.label(), this.required()), input, hint, this.wrong);
  }

  fault(_path, message) {
    this.wrong.hidden = false;
    this.wrong.textContent = this.wrong.textContent ? `${this.wrong.textContent}; ${message}` : message;
    if (this.input) mark(this.input, "aria-invalid", "true");
    return this;
  }

  clear() {
    this.wrong.hidden = true;
    this.wrong.textContent = "";
    if (this.input) mark(this.input, "aria-invalid", null);
  }

  focus() {
    this.input?.focus();
  }
}

class TextInput extends Field {
  constructor(schema, options) {
    super(schema, options);
    this.shape = shapeOf(schema);
    const isLong = this.shape === "string" && (schema.maxLength > 300 || /body|text|message|query|script|content/i.test(this.name)) && !schema.format;
    const type = schema.writeOnly ? "password" : INPUT_TYPES[schema.format] ?? "text";
    const input = isLong ? h("textarea", { class: "input", rows: 4 }) : h("input", {
      class: "input", type, autocomplete: "off", spellcheck: "false", step: type === "datetime-local" || type === "time" ? "any" : null,
      inputmode: this.shape === "integer" ? "numeric" : this.shape === "number" ? "decimal" : null, maxlength: schema.maxLength,
      placeholder: schema.examples?.length ? String(schema.examples[0]) : null,
    });
    this.element = this.frame(input);
    this.write(schema.default);
  }

  read() {
    const text = this.input.value;
    if (text === "" && (this.shape !== "string" || !this.isRequired || this.schema.format)) {
      if (this.shape === "string" && this.schema.default !== undefined && this.schema.default !== "") return "";
      return undefined;
    }
    if (this.shape === "string") return this.input.type === "datetime-local" ? local(text) : text;
    const number = numberOf(text);
    if (number === null) throw this.unreadable(`expected a number, got “${text}”`);
    if (this.shape !== "integer") return number;
    const whole = wholeOf(number);
    if (whole === null) throw this.unreadable(`expected a whole number, got ${text}`);
    return whole;
  }

  unreadable(message) {
    this.fault([], message);
    return new Unreadable(message);
  }

  write(value) {
    if (value === undefined || value === null) this.input.value = "";
    else if (this.input.type === "datetime-local") this.input.value = wall(value);
    else this.input.value = String(value);
  }
}

/** A local wall clock as an instant, and back. */
function local(text) {
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? text : at.toISOString();
}

function wall(iso) {
  const at = new Date(iso);
  return Number.isNaN(at.getTime()) ? "" : new Date(at.getTime() - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 19);
}

class BooleanInput extends Field {
  constructor(schema, options) {
    super(schema, options);
    this.input = h("input", { type: "checkbox", id: this.id, checked: schema.default === true });
    const hint = this.hint();
    mark(this.input, "aria-describedby", [hint && hint.id, this.wrong.id].filter(Boolean).join(" "));
    this.element = h("div", { class: "field" }, h("label", { class: "check", for: this.id }, this.input, this.label()), hint, this.wrong);
  }

  read() {
    return this.input.checked;
  }

  write(value) {
    this.input.checked = value === true;
  }
}

class EnumInput extends Field {
  constructor(schema, options) {
    super(schema, options);
    const none = schema.default === undefined;
    this.element = this.frame(h("select", { class: "input" }, none && h("option", { value: "" }, this.isRequired ? "choose …" : "none"),
      schema.enum.map((value, place) => h("option", { value: place }, String(value)))));
    this.write(schema.default);
  }

  read() {
    return this.input.value === "" ? undefined : this.schema.enum[Number(this.input.value)];
  }

  write(value) {
    const place = this.schema.enum.findIndex((each) => same(each, value));
    this.input.value = place < 0 ? "" : String(place);
  }
}

class ConstInput extends Field {
  constructor(schema, options) {
    super(schema, options);
    this.element = h("div", { hidden: true });
  }

  read() {
    return this.schema.const;
  }

  write() {}
}

class NullInput extends ConstInput {
  read() {
    return null;
  }
}

class JsonInput extends Field {
  constructor(schema, options) {
    super(schema, options);
    this.element = this.frame(h("textarea", { class: "input", rows: 3, spellcheck: "false", placeholder: "JSON" }));
    this.write(schema.default);
  }

  read() {
    const text = this.input.value.trim();
    if (text === "") return this.isRequired && this.schema.type === "object" ? {} : this.isRequired && this.schema.type === "array" ? [] : undefined;
    try {
      return parse(text);
    } catch (error) {
      this.fault([], `is not JSON: ${error.message}`);
      throw new Unreadable("is not JSON");
    }
  }

  write(value) {
    this.input.value = value === undefined || value === null ? "" : stringify(value, 2);
  }
}

/** Inputs under one heading. Subclasses say which, and where a path leads. */
class Group extends Field {
  group(...children) {
    const hint = this.hint();
    return h("fieldset", { class: "group", "aria-describedby": this.wrong.id }, h("legend", {}, this.label(), this.required()), hint, children, this.wrong);
  }

  fault(path, message) {
    const inner = this.inner(path[0]);
    return inner ? inner.fault(path.slice(1), message) : super.fault(path, message);
  }

  clear() {
    super.clear();
    for (const input of this.all()) input.clear();
  }

  focus() {
    this.all()[0]?.focus();
  }
}

class ObjectInput extends Group {
  constructor(schema, options) {
    super(schema, options);
    const required = new Set(schema.required ?? []);
    this.inputs = new Map(Object.entries(schema.properties).map(([name, property]) =>
      [name, inputFor(property, { root: this.root, name, isRequired: required.has(name), depth: this.depth + 1 })]));
    const elements = this.all().map((input) => input.element);
    this.element = this.depth === 0 ? h("div", { class: "form" }, elements, this.wrong) : this.group(elements);
    if (schema.default) this.write(schema.default);
  }

  all() {
    return [...this.inputs.values()];
  }

  inner(name) {
    return this.inputs.get(name);
  }

  read() {
    return collected([...this.inputs].map(([name, input]) => [name, input]));
  }

  write(value) {
    for (const [name, input] of this.inputs) if (value && Object.hasOwn(value, name)) input.write(value[name]);
  }
}

/** Read several inputs, so that each of them can say what is wrong with it. */
function collected(pairs) {
  const found = [];
  let trouble = null;
  for (const [name, input] of pairs) {
    try {
      const value = input.read();
      if (value !== undefined) found.push([name, value]);
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      trouble ??= error;
    }
  }
  if (trouble) throw trouble;
  return Object.fromEntries(found);
}

class ListInput extends Group {
  constructor(schema, options) {
    super(schema, options);
    this.items = [];
    this.place = h("div", { class: "form" });
    this.adder = h("button", { class: "button", type: "button", on: { click: () => { this.add(); this.items.at(-1).focus(); } } }, icon("plus"), "Add");
    this.element = this.group(this.place, h("div", { class: "actions" }, this.adder));
    this.write(schema.default ?? []);
    while (this.items.length < (schema.minItems ?? 0)) this.add();
  }

  all() {
    return this.items;
  }

  inner(name) {
    return this.items[Number(name)];
  }

  add(value) {
    const name = `${this.label()} ${this.items.length + 1}`;
    const schema = resolved(this.schema.items, this.root);
    const input = inputFor({ ...schema, title: name }, { root: this.root, name, isRequired: true, depth: this.depth + 1 });
    if (value !== undefined) input.write(value);
    this.items.push(input);
    const row = h("div", { class: "list-item" }, input.element, h("button", { class: "icon-button", type: "button", "aria-label": `Remove ${name}`, on: { click: () => {
      this.items.splice(this.items.indexOf(input), 1);
      row.remove();
      this.limit();
      this.adder.focus();
    } } }, icon("close")));
    this.place.append(row);
    this.limit();
  }

  limit() {
    this.adder.disabled = this.items.length >= (this.schema.maxItems ?? Infinity);
  }

  read() {
    const found = collected(this.items.map((input, place) => [place, input]));
    if (!this.items.length && !this.isRequired && this.schema.default === undefined) return undefined;
    return Object.values(found);
  }

  write(value) {
    this.items = [];
    put(this.place);
    for (const item of Array.isArray(value) ? value : []) this.add(item);
    this.limit();
  }
}

class TupleInput extends Group {
  constructor(schema, options) {
    super(schema, options);
    this.items = schema.prefixItems.map((item, place) => inputFor(item, { root: this.root, name: `${this.label()} ${place + 1}`, isRequired: true, depth: this.depth + 1 }));
    this.element = this.group(this.items.map((input) => input.element));
    this.write(schema.default);
  }

  all() {
    return this.items;
  }

  inner(name) {
    return this.items[Number(name)];
  }

  read() {
    const found = collected(this.items.map((input, place) => [place, input]));
    if (!Object.keys(found).length && !this.isRequired) return undefined;
    return this.items.map((_, place) => found[place] ?? null);
  }

  write(value) {
    if (Array.isArray(value)) this.items.forEach((input, place) => input.write(value[place]));
  }
}

class MapInput extends Group {
  constructor(schema, options) {
    super(schema, options);
    this.pairs = [];
    this.place = h("div", { class: "form" });
    this.element = this.group(this.place, h("div", { class: "actions" }, h("button", { class: "button", type: "button", on: { click: () => { this.add("", undefined); this.pairs.at(-1).key.focus(); } } }, icon("plus"), "Add")));
    this.write(schema.default);
  }

  all() {
    return this.pairs.map((pair) => pair.input);
  }

  inner(name) {
    return this.pairs.find((pair) => pair.key.value === name)?.input;
  }

  add(key, value) {
    const keyInput = h("input", { class: "input", value: key, placeholder: "key", "aria-label": `${this.label()}: key`, autocomplete: "off" });
    const input = inputFor({ ...resolved(this.schema.additionalProperties, this.root), title: "Value" }, { root: this.root, name: "Value", isRequired: true, depth: this.depth + 1 });
    if (value !== undefined) input.write(value);
    const pair = { key: keyInput, input };
    this.pairs.push(pair);
    const row = h("div", { class: "map-item" }, h("div", { class: "field" }, h("span", { class: "label", "aria-hidden": "true" }, "Key"), keyInput), input.element,
      h("button", { class: "icon-button", type: "button", "aria-label": "Remove this entry", on: { click: () => { this.pairs.splice(this.pairs.indexOf(pair), 1); row.remove(); } } }, icon("close")));
    this.place.append(row);
  }

  read() {
    const named = this.pairs.filter((pair) => pair.key.value !== "");
    const found = collected(named.map((pair) => [pair.key.value, pair.input]));
    return !named.length && !this.isRequired && this.schema.default === undefined ? undefined : found;
  }

  write(value) {
    this.pairs = [];
    put(this.place);
    for (const [key, item] of Object.entries(value ?? {})) this.add(key, item);
  }
}

/** A value or none: simple inputs are none when empty, others have a box to tick. */
class Optional extends Field {
  constructor(schema, inner, options) {
    super(schema, options);
    this.within = resolved({ ...inner, ...beside(schema), title: schema.title ?? labelOf({}, this.name), default: schema.default ?? undefined }, this.root);
    this.isSimple = !["object", "array", "tuple", "map", "boolean"].includes(shapeOf(this.within)) && !alternatives(this.within, this.root);
    this.place = h("div", {});
    if (this.isSimple) {
      this.make();
      this.element = this.inner.element;
      return;
    }
    this.box = h("input", { type: "checkbox", id: this.id, on: { change: () => this.show() } });
    this.element = h("div", { class: "field" }, h("label", { class: "check", for: this.id }, this.box, `Set ${this.label()}`), this.place, this.wrong);
    this.write(schema.default);
  }

  make() {
    this.inner = inputFor(this.within, { root: this.root, name: this.name, isRequired: !this.isSimple, depth: this.depth + 1 });
  }

  /** Made only when it is wanted: a type may contain itself. */
  show() {
    if (this.box.checked && !this.inner) this.make();
    put(this.place, this.box.checked && this.inner.element);
  }

  read() {
    if (this.isSimple) return this.inner.read() ?? (this.isRequired || this.schema.default !== null && this.schema.default !== undefined ? null : undefined);
    return this.box.checked ? this.inner.read() : this.isRequired || (this.schema.default !== null && this.schema.default !== undefined) ? null : undefined;
  }

  write(value) {
    if (!this.isSimple) {
      this.box.checked = value !== undefined && value !== null;
      this.show();
      if (!this.box.checked) return;
    }
    this.inner.write(value);
  }

  fault(path, message) {
    return this.inner && (this.isSimple || this.box.checked) ? this.inner.fault(path, message) : super.fault(path, message);
  }

  clear() {
    super.clear();
    this.inner?.clear();
  }

  focus() {
    if (this.isSimple) this.inner.focus();
    else this.box.focus();
  }
}

/** One of several shapes, chosen from a list. */
class Union extends Field {
  constructor(schema, { some, nullable }, options) {
    super(schema, options);
    this.choices = some.map((item, place) => ({ name: nameOf(item, place), schema: item, input: null }));
    if (nullable || !this.isRequired) this.choices.unshift({ name: "none", schema: null, input: null });
    this.place = h("div", {});
    this.isNullable = nullable;
    this.input = h("select", { class: "input", "aria-label": `${this.label()}: which` , on: { change: () => this.show() } }, this.choices.map((choice, place) => h("option", { value: place }, choice.name)));
    this.input.id = this.id;
    this.element = h("fieldset", { class: "group" }, h("legend", {}, this.label(), this.required()), this.hint(), this.input, this.place, this.wrong);
    this.write(schema.default);
  }

  get chosen() {
    return this.choices[Number(this.input.value)];
  }

  show() {
    const { chosen } = this;
    if (chosen.schema && !chosen.input) {
      const isPlain = !["object", "array", "map", "tuple"].includes(shapeOf(chosen.schema));
      chosen.input = inputFor({ ...chosen.schema, title: isPlain ? "Value" : chosen.schema.title ?? this.label(), default: undefined }, { root: this.root, name: this.name, isRequired: true, depth: this.depth + 1 });
    }
    put(this.place, chosen.input?.element);
  }

  read() {
    return this.chosen.input ? this.chosen.input.read() : this.isNullable ? null : undefined;
  }

  write(value) {
    const place = value === undefined || value === null ? 0 : this.choices.findIndex(({ schema }) => schema && fits(value, schema, this.root));
    this.input.value = String(Math.max(0, place));
    this.show();
    if (value !== undefined && value !== null) this.chosen.input?.write(value);
  }

  /** pydantic puts the name of the alternative into the path; ours may be shown or not. */
  fault(path, message) {
    const { input } = this.chosen;
    if (!input) return super.fault(path, message);
    const isNamed = path.length > 0 && !input.inner?.(path[0]);
    return input.fault(isNamed ? path.slice(1) : path, message);
  }

  clear() {
    super.clear();
    this.chosen.input?.clear();
  }
}

/** Tell whether a value looks like a schema's, as far as one must know to choose. */
function fits(value, schema, root) {
  const type = typeOf(value);
  if (Object.hasOwn(schema, "const")) return same(schema.const, value);
  if (schema.enum) return schema.enum.some((each) => same(each, value));
  if (schema.type === "integer") return type === "number" && wholeOf(value) !== null;
  if (schema.type !== type) return false;
  return type !== "object" || Object.entries(schema.properties ?? {}).every(([name, property]) => {
    const inner = resolved(property, root);
    return Object.hasOwn(value, name) ? !Object.hasOwn(inner, "const") || same(inner.const, value[name]) : !(schema.required ?? []).includes(name);
  });
}

// JSON whose numbers stay as they are written. JavaScript has one kind of number, a double: it would show 9007199254740993 as
// …992, 1.0 as 1 and 1e400 as null, and send that back. What users' values hold is kept as digits where a double reads otherwise.

const TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
const LITERAL = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;
const WHOLE = /^-?(?:0|[1-9]\d*)$/;
// Members of answers that hold what users have given or returned; all others are the API's own, and plain numbers.
const USERS = new Set(["context", "result", "value", "metadata", "item", "context_schema", "result_schema"]);

/** A number that no double reads as it is written. */
export class Exact {
  constructor(text) {
    this.text = text;
  }

  toString() {
    return this.text;
  }

  valueOf() {
    return Number(this.text);
  }

  /** For keys that are compared, such as those of what was drawn; JSON itself is written by `stringify`. */
  toJSON() {
    return this.text;
  }
}

/** Read JSON of a user's own: every number stays as it is written. Throws a SyntaxError like JSON.parse. */
export function parse(text) {
  return read(text, true);
}

/** Read an answer of the API: the users' values in it stay as they are written. */
export function parseAnswer(text) {
  return read(text, false);
}

function read(text, isUsers) {
  if (isUsers) JSON.parse(text); // what is none must not become some: `01` is two tokens, of which the marks would make one
  const tag = newTag();
  let n = 0;
  const marked = text.replace(TOKEN, (token) => {
    if (token[0] === '"' || String(Number(token)) === token) return token;
    n += 1;
    return `"${tag}${token}"`;
  });
  return n ? unmarked(JSON.parse(marked), tag, isUsers) : JSON.parse(text);
}

function unmarked(value, tag, isUsers) {
  if (typeof value === "string") {
    if (!value.startsWith(tag)) return value;
    const digits = value.slice(tag.length);
    return isUsers ? new Exact(digits) : Number(digits);
  }
  if (value === null || typeof value !== "object") return value;
  for (const [name, inner] of Object.entries(value)) {
    const found = unmarked(inner, tag, isUsers || (!Array.isArray(value) && USERS.has(name)));
    if (found !== inner) Object.defineProperty(value, name, { value: found, writable: true, enumerable: true, configurable: true });
  }
  return value;
}

/** Write JSON, with the digits of exact numbers. */
export function stringify(value, indent) {
  const tag = newTag();
  let n = 0;
  const marked = JSON.stringify(value, function mark(name, given) {
    const real = this[name]; // `given` has been through toJSON
    if (!(real instanceof Exact)) return given;
    n += 1;
    return tag + real.text;
  }, indent);
  return n ? marked.replaceAll(new RegExp(`"${tag}([-+.0-9eE]+)"`, "g"), "$1") : marked;
}

/** What nobody could have put into a text. */
function newTag() {
  return `${[...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("")}:`;
}

/** Return the number that a text says: exact where a double would change it, null where it says none. */
export function numberOf(text) {
  const trimmed = text.trim();
  const plain = trimmed.replace(/^\+(?=\d)/, "").replace(/^(-?)0+(?=\d)/, "$1");
  if (LITERAL.test(plain)) return String(Number(plain)) === plain ? Number(plain) : new Exact(plain);
  const number = Number(trimmed);
  return trimmed !== "" && Number.isFinite(number) ? number : null;
}

/** Return a number as one that stands for a whole: `5` of 5.0 and 5e0; null where it is none. */
export function wholeOf(number) {
  if (number instanceof Exact && WHOLE.test(number.text)) return number;
  return Number.isInteger(Number(number)) ? Number(number) : null;
}

/** As `typeof`, for JSON. */
export function typeOf(value) {
  if (value === null) return "null";
  return Array.isArray(value) ? "array" : value instanceof Exact ? "number" : typeof value;
}

/** Tell whether two single values are equal: numbers by what they stand for. */
export function same(one, other) {
  if (typeOf(one) !== "number" || typeOf(other) !== "number") return one === other;
  const [a, b] = [String(one), String(other)];
  return a === b || (WHOLE.test(a) && WHOLE.test(b) ? BigInt(a) === BigInt(b) : Number(a) === Number(b));
}

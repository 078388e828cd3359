// JSON Schema as it comes from pydantic: references, alternatives, what is optional, and what a value begins as.

const MOST_HOPS = 20;

/** Follow references; what stands beside a reference holds as well. */
export function resolved(schema, root) {
  let found = schema ?? {};
  for (let hop = 0; hop < MOST_HOPS && (found.$ref || found.allOf?.length === 1); hop += 1) {
    const { $ref, allOf, ...beside } = found;
    const target = $ref ? lookup($ref, root) : allOf[0];
    found = { ...target, ...beside };
  }
  return found;
}

function lookup(reference, root) {
  let found = root;
  for (const part of reference.replace(/^#\//, "").split("/")) {
    const name = part.replaceAll("~1", "/").replaceAll("~0", "~");
    found = Object.hasOwn(found ?? {}, name) ? found[name] : {};
  }
  return found ?? {};
}

/** The alternatives of a schema; one of them may be that there is nothing. */
export function alternatives(schema, root) {
  const listed = schema.anyOf ?? schema.oneOf ?? (Array.isArray(schema.type) ? schema.type.map((type) => ({ ...schema, type })) : null);
  if (!listed) return null;
  const each = listed.map((item) => resolved(item, root));
  return { some: each.filter((item) => item.type !== "null"), nullable: each.some((item) => item.type === "null") };
}

/** What kind of input a schema asks for. */
export function shapeOf(schema) {
  if (Object.hasOwn(schema, "const")) return "const";
  if (Array.isArray(schema.enum)) return "enum";
  if (schema.type === "object" || schema.properties) {
    if (schema.properties) return "object";
    return typeof schema.additionalProperties === "object" ? "map" : "json";
  }
  if (schema.type === "array") return schema.prefixItems ? "tuple" : schema.items ? "array" : "json";
  return { string: "string", integer: "integer", number: "number", boolean: "boolean", null: "null" }[schema.type] ?? "json";
}

/** What an alternative is called. */
export function nameOf(schema, place) {
  const words = { string: "text", integer: "whole number", number: "number", boolean: "yes or no", array: "list", object: "object" };
  if (Object.hasOwn(schema, "const")) return String(schema.const);
  return schema.title ?? words[schema.type] ?? `alternative ${place + 1}`;
}

/** A name as a label: `max_size` reads "Max size"; a title is what the author wrote. */
export function labelOf(schema, name) {
  if (schema.title) return schema.title;
  const words = String(name).replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** What an input tells about what it takes. */
export function limitsOf(schema) {
  const told = [];
  if (schema.minimum !== undefined) told.push(`at least ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined) told.push(`more than ${schema.exclusiveMinimum}`);
  if (schema.maximum !== undefined) told.push(`at most ${schema.maximum}`);
  if (schema.exclusiveMaximum !== undefined) told.push(`less than ${schema.exclusiveMaximum}`);
  if (schema.multipleOf !== undefined) told.push(`a multiple of ${schema.multipleOf}`);
  if (schema.minLength > 1) told.push(`at least ${schema.minLength} characters`);
  if (schema.maxLength !== undefined) told.push(`at most ${schema.maxLength} characters`);
  if (schema.pattern) told.push(`as in ${schema.pattern}`);
  if (schema.minItems > 1) told.push(`at least ${schema.minItems} of them`);
  if (schema.maxItems !== undefined) told.push(`at most ${schema.maxItems} of them`);
  return told.join(", ");
}

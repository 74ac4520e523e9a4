/** The config's JSON schema as forms need it: fields with help, range, default and the options that there are. Pure. */
import { getIn, shown } from "./tree.js";

/** @import * as T from "./types.js" */

const BOUNDS = [
  ["minimum", "≥"],
  ["exclusiveMinimum", ">"],
  ["maximum", "≤"],
  ["exclusiveMaximum", "<"],
];

const KINDS = /** @type {Record<string, T.FormField["kind"]>} */ ({
  boolean: "switch",
  integer: "number",
  number: "number",
  string: "text",
});

/**
 * @param {T.Schema} root
 * @param {T.SchemaNode | undefined} node
 * @returns {T.SchemaNode}
 */
function resolve(root, node) {
  if (!node?.$ref) return node || {};
  return resolve(root, { ...root.$defs[node.$ref.split("/").at(-1) ?? ""], ...without(node, "$ref") });
}

/**
 * @param {T.SchemaNode} node
 * @param {string} key
 * @returns {T.SchemaNode}
 */
function without(node, key) {
  const { [key]: _, ...rest } = node;
  return rest;
}

/**
 * [the node itself or its only part that is not null, whether null is allowed]
 * @param {T.Schema} root
 * @param {T.SchemaNode} node
 * @returns {[T.SchemaNode, boolean]}
 */
function nonNull(root, node) {
  const parts = (node.anyOf || []).map((part) => resolve(root, part));
  const real = parts.filter((part) => part.type !== "null");
  if (!parts.length) return [node, false];
  const outer = without(node, "anyOf");
  return [real.length === 1 ? { ...real[0], ...outer } : { ...outer, union: real }, real.length < parts.length];
}

/**
 * {type: section} of a node that is discriminated by `type`; null for any other.
 * @param {T.Schema} root
 * @param {T.SchemaNode} given
 * @returns {Record<string, T.SchemaNode> | null}
 */
export function kinds(root, given) {
  const node = resolve(root, given);
  if (node.discriminator) {
    return Object.fromEntries(
      Object.entries(node.discriminator.mapping).map(([tag, ref]) => [tag, resolve(root, { $ref: ref })]),
    );
  }
  const type = node.properties?.type;
  const tags = type && (type.enum || (type.const !== undefined ? [type.const] : null));
  return tags ? Object.fromEntries(tags.map((tag) => [tag, node])) : null;
}

/**
 * What a leaf's enum offers; [] for any other.
 * @param {T.Schema} root
 * @param {string} path
 * @returns {unknown[]}
 */
export function options(root, path) {
  let node = /** @type {T.SchemaNode} */ (root);
  for (const part of path.split("."))
    node = nonNull(root, resolve(root, resolve(root, node).properties?.[part] || {}))[0];
  return node.enum || (node.const !== undefined ? [node.const] : []);
}

/**
 * The fields of the section at `path` (nested sections flattened), for the types that `tree` has chosen.
 * @param {T.Schema} root
 * @param {string} path
 * @param {T.Tree} tree
 */
export function fields(root, path, tree) {
  return walk(root, root.properties[path], path, tree, true);
}

/**
 * The fields of one reward of the list.
 * @param {T.Schema} root
 * @param {number} index
 * @param {T.Tree} tree
 */
export function rewardFields(root, index, tree) {
  return walk(root, root.properties.rewards.items, `rewards.${index}`, tree, true);
}

/**
 * @param {T.Schema} root
 * @param {T.SchemaNode | undefined} given
 * @param {string} path
 * @param {T.Tree} tree
 * @param {boolean} required
 * @returns {T.FormField[]}
 */
function walk(root, given, path, tree, required) {
  const [node, nullable] = nonNull(root, resolve(root, given || {}));
  const byType = kinds(root, node);
  const chosen = byType ? byType[getIn(tree, `${path}.type`)] || Object.values(byType)[0] : node;
  if (chosen.properties) {
    /** @type {T.FormField[]} */
    const head = nullable ? [{ path, kind: "section", help: oneLine(node.description), node, nullable }] : [];
    if (nullable && !getIn(tree, path)) return head;
    const needs = chosen.required || [];
    return head.concat(
      Object.entries(chosen.properties).flatMap(([key, child]) =>
        byType && key === "type" ? [] : walk(root, child, `${path}.${key}`, tree, needs.includes(key)),
      ),
    );
  }
  if (node.type === "array" && kinds(root, node.items || {})) return [];
  return [leaf(node, path, nullable, required)];
}

/**
 * @param {T.SchemaNode} node
 * @param {string} path
 * @param {boolean} nullable
 * @param {boolean} required
 * @returns {T.FormField}
 */
function leaf(node, path, nullable, required) {
  const choices = node.enum || (node.const !== undefined ? [node.const] : null);
  return {
    path,
    kind: choices ? "choice" : (KINDS[node.type ?? ""] ?? "value"),
    choices,
    nullable,
    node,
    help: oneLine(node.description),
    default: node.default,
    required: required && !("default" in node),
    range: range(node, nullable),
    recommended: node.recommended,
  };
}

/**
 * @param {T.SchemaNode} node
 * @param {boolean} nullable
 */
function range(node, nullable) {
  const given = BOUNDS.filter(([key]) => Math.abs(Number(node[key])) < 1e9);
  const bounds = given.map(([key, sign]) => `${sign} ${node[key]}`);
  const kind = node.type === "integer" ? "integer" : node.type === "number" ? "number" : "";
  return kind ? [kind, bounds.join(", ")].filter(Boolean).join(" ") + (nullable ? ", or empty" : "") : "";
}

/** @param {string | undefined} text */
function oneLine(text) {
  return (text || "").replace(/\s+/g, " ").trim();
}

/**
 * What was typed, as the config's value: undefined (the default) for an empty field; what does not parse stays text,
 * which the plan then refuses by name.
 * @param {T.FormField} field
 * @param {string} text
 * @returns {unknown}
 */
export function parse(field, text) {
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  if (field.kind === "number") return Number.isFinite(Number(trimmed)) ? Number(trimmed) : trimmed;
  if (field.kind === "text") return text;
  try {
    return JSON.parse(trimmed);
  } catch {
    /* not JSON: a list of words, or text */
  }
  return field.node.type === "array" ? trimmed.split(",").map((part) => part.trim()) : text;
}

/** @param {T.FormField} field */
export function defaultText(field) {
  if (field.required) return "required";
  return field.default === null || field.default === undefined ? "" : shown(field.default);
}

/** The config's tree: read and changed by dotted paths, without changing the old one. Pure. */

/** @import * as T from "./types.js" */

/**
 * @param {any} tree
 * @param {string} path
 * @returns {any}
 */
export function getIn(tree, path) {
  return path.split(".").reduce((node, part) => (node === null || node === undefined ? undefined : node[part]), tree);
}

/**
 * The tree with `value` at `path`; `undefined` takes the key out, and sections that became empty with it.
 * @param {any} tree
 * @param {string} path
 * @param {unknown} value
 * @returns {any}
 */
export function setIn(tree, path, value) {
  const [head, ...rest] = path.split(".");
  const copy = Array.isArray(tree) ? [...tree] : { ...tree };
  if (rest.length) {
    const inner = setIn(copy[head] ?? (/^\d+$/.test(rest[0]) ? [] : {}), rest.join("."), value);
    if (value === undefined && !Array.isArray(inner) && Object.keys(inner).length === 0) delete copy[head];
    else copy[head] = inner;
  } else if (value === undefined && !Array.isArray(copy)) {
    delete copy[head];
  } else {
    copy[head] = value;
  }
  return copy;
}

/**
 * Every [dotted path, value] of a tree's leaves.
 * @param {unknown} tree
 * @returns {[string, unknown][]}
 */
export function leaves(tree, prefix = "") {
  if (tree !== null && typeof tree === "object" && Object.keys(tree).length) {
    return Object.entries(tree).flatMap(([key, value]) => leaves(value, prefix ? `${prefix}.${key}` : key));
  }
  return [[prefix, tree]];
}

/**
 * @param {unknown} node
 * @returns {node is T.Tree}
 */
function isSection(node) {
  return node !== null && typeof node === "object" && !Array.isArray(node);
}

/**
 * {dotted path: value} that turns `before` into `after`. A path cannot remove anything, so a section or list that lost
 * something is given in full; `fallback(key)` is what a value at the top becomes when it is removed.
 * @param {T.Tree} before
 * @param {T.Tree} after
 * @param {(key: string) => unknown} fallback
 * @returns {T.Tree}
 */
export function changesBetween(before, after, fallback) {
  const keys = [...new Set([...Object.keys(before), ...Object.keys(after)])];
  return Object.assign(
    {},
    ...keys.map((key) => {
      const now = after[key] === undefined ? (isSection(before[key]) ? {} : (fallback(key) ?? null)) : after[key];
      return changesAt(key, before[key], now);
    }),
  );
}

/**
 * @param {string} path
 * @param {any} before
 * @param {any} after
 * @returns {T.Tree}
 */
function changesAt(path, before, after) {
  if (JSON.stringify(before) === JSON.stringify(after)) return {};
  if (!comparable(before, after)) return { [path]: after };
  return Object.assign({}, ...Object.keys(after).map((key) => changesAt(`${path}.${key}`, before[key], after[key])));
}

/**
 * Whether a change can be given part by part: nothing was removed.
 * @param {unknown} before
 * @param {unknown} after
 */
function comparable(before, after) {
  if (isSection(before) && isSection(after)) return Object.keys(before).every((key) => after[key] !== undefined);
  return Array.isArray(before) && Array.isArray(after) && before.length === after.length;
}

/**
 * @param {unknown} value
 * @returns {string}
 */
export function shown(value) {
  if (value === undefined) return "";
  if (typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3)
    return value.toExponential().replace("e+", "e");
  return typeof value === "string" ? value : JSON.stringify(value);
}

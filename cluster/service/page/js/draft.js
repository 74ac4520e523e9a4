/** The draft of a new run, kept for the session: its config, or a run's config with what is to change of it. */
import { newKey } from "./api.js";
import { changesBetween } from "./tree.js";

/** @import * as T from "./types.js" */

export const DRAFT = "rlhf-draft";

/**
 * `seen`: the steps that were visited; `key` makes a repeated start harmless; `began` identifies the draft.
 * @returns {T.Draft}
 */
export function emptyDraft() {
  return {
    tree: { algorithm: { type: "grpo" } },
    dataset: null,
    clone: null,
    seen: ["model"],
    key: newKey(),
    began: newKey(),
  };
}

/**
 * Whether something would be lost with it.
 * @param {T.Draft} draft
 */
export function isBegun(draft) {
  return Boolean(draft.clone) || JSON.stringify(draft.tree) !== JSON.stringify(emptyDraft().tree);
}

/** @returns {T.Draft} */
export function storedDraft() {
  try {
    return { ...emptyDraft(), ...JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}") };
  } catch {
    return emptyDraft();
  }
}

/**
 * Keeps a draft that begins with the config of a run and `tree`, what has been changed of it already.
 * @param {T.Run} run
 * @param {T.Tree} config
 * @param {T.Tree} tree
 */
export function storeClone(run, config, tree) {
  const draft = {
    ...emptyDraft(),
    tree,
    clone: { id: run.id, name: run.name, config },
    seen: ["model", "data", "settings"],
  };
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify(draft));
  } catch {
    /* the form opens empty */
  }
}

/**
 * Where a draft is planned and started, and with what. A clone is sent as changes to its run: the page has seen that
 * run's config with *** in place of secrets, and only the service knows which paths its run was allowed.
 * @param {Pick<T.Draft, "clone" | "tree">} draft
 * @param {T.Schema | null} schema
 * @returns {T.Ask}
 */
export function asked(draft, schema) {
  if (!draft.clone) return { plan: "/plan", start: "/runs", body: draft.tree };
  const at = `/runs/${encodeURIComponent(draft.clone.id)}/clone`;
  const { name, ...tree } = draft.tree;
  const { name: _, ...config } = draft.clone.config;
  return {
    plan: `${at}/plan`,
    start: at,
    body: {
      changes: changesBetween(config, tree, (key) => schema?.properties[key]?.default),
      ...(name ? { name } : {}),
    },
  };
}

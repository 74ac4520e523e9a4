/** What is wrong with a draft, in words for users who have never seen a config. Pure. */
import { getIn } from "./tree.js";

/** @import * as T from "./types.js" */

const MISSING = /^required, but missing(?:; expected (.*))?$/;
const MODEL = "Choose the model to train.";
const PROMPTS = "Choose a prompt file.";
const REWARD = "Choose a reward model or a reward function.";
const TEACHER = "Choose the teacher: a stronger model to distill from.";
/** What must be chosen on a step: by the path that the plan names, the path where it is chosen and the words. */
const WANTED = /** @type {Record<string, [string, string]>} */ ({
  policy: ["policy.model", MODEL],
  "policy.model": ["policy.model", MODEL],
  data: ["data.prompts", PROMPTS],
  "data.prompts": ["data.prompts", PROMPTS],
  rewards: ["rewards", REWARD],
  "algorithm.teacher": ["algorithm.teacher.model", TEACHER],
  "algorithm.teacher.model": ["algorithm.teacher.model", TEACHER],
  algorithm: ["algorithm.type", "Choose an algorithm."],
});

/**
 * The plan's problems as they are shown: {path, message, missing}; what the draft has by now is not missing. The plan
 * checks rewards only once model and prompts are there, so missing rewards are reported here.
 * @param {T.Detail[]} problems
 * @param {T.Tree} tree
 * @returns {T.Problem[]}
 */
export function plainly(problems, tree) {
  const found = problems.map(plain);
  const learnsFromScores = tree.algorithm?.type !== "gkd";
  if (learnsFromScores && !found.some((p) => p.path === "rewards")) found.push(wanted("rewards"));
  return found.filter((p) => !p.missing || isEmpty(getIn(tree, p.path)));
}

/**
 * @param {T.Detail} problem
 * @returns {T.Problem}
 */
function plain({ path, message }) {
  const missing = MISSING.exec(message);
  if (WANTED[path] && (missing || (path === "rewards" && message.startsWith("is empty")))) return wanted(path);
  if (!missing) return { path, message };
  if (/^rewards\.\d+\.(model|path|url)$/.test(path)) return { path, message: "Required.", missing: true };
  const kind = (missing[1] || "").split(" ")[0];
  return {
    path,
    message: kind && kind !== "section" ? `Required: ${missing[1]}.` : "Required.",
    missing: true,
  };
}

/**
 * @param {string} path
 * @returns {T.Problem}
 */
function wanted(path) {
  const [at, message] = WANTED[path];
  return { path: at, message, missing: true };
}

/** @param {any} value */
function isEmpty(value) {
  return value === undefined || value === null || value === "" || value.length === 0;
}

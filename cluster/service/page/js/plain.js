/** What is wrong with a draft, in words for somebody who has never seen a config. Pure. */
import { getIn } from "./tree.js";

const MISSING = /^required, but missing(?:; expected (.*))?$/;
const WANTED = {
  // what must be chosen on a step, by the path that the plan names or the one where it is chosen
  policy: ["policy.model", "Choose the model to train."],
  "policy.model": ["policy.model", "Choose the model to train."],
  data: ["data.prompts", "Choose a file of prompts."],
  "data.prompts": ["data.prompts", "Choose a file of prompts."],
  rewards: ["rewards", "Choose a reward model or a function: something must score the answers."],
  "algorithm.teacher": [
    "algorithm.teacher.model",
    "Choose the teacher: a model that already does what this one is to learn.",
  ],
  "algorithm.teacher.model": [
    "algorithm.teacher.model",
    "Choose the teacher: a model that already does what this one is to learn.",
  ],
  algorithm: ["algorithm.type", "Choose an algorithm."],
};

/**
 * The plan's problems as they are shown: {path, message, missing}; what the draft has by now is not missing. The plan
 * checks rewards only once model and prompts are there, so missing rewards are reported here.
 */
export function plainly(problems, tree) {
  const found = problems.map(plain);
  const learnsFromScores = tree.algorithm?.type !== "gkd";
  if (learnsFromScores && !found.some((p) => p.path === "rewards")) found.push(wanted("rewards"));
  return found.filter((p) => !p.missing || isEmpty(getIn(tree, p.path)));
}

function plain({ path, message }) {
  const missing = MISSING.exec(message);
  if (WANTED[path] && (missing || (path === "rewards" && message.startsWith("is empty")))) return wanted(path);
  if (!missing) return { path, message };
  if (/^rewards\.\d+\.(model|path|url)$/.test(path)) return { path, message: "Say which one.", missing: true };
  const kind = (missing[1] || "").split(" ")[0];
  return {
    path,
    message: kind && kind !== "section" ? `A value is needed here: ${missing[1]}.` : "A value is needed here.",
    missing: true,
  };
}

function wanted(path) {
  const [at, message] = WANTED[path];
  return { path: at, message, missing: true };
}

function isEmpty(value) {
  return value === undefined || value === null || value === "" || value.length === 0;
}

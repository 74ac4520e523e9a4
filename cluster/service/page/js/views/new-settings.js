/** Step 3: how to train. The main settings first; the rest, from the schema, folded. */
import { Field, problemsAt, problemsOf, Wrong } from "../field.js";
import { count } from "../format.js";
import { html } from "../html.js";
import { fields, kinds, options, rewardFields } from "../schema.js";
import { getIn } from "../tree.js";
import { Failure, Loading, Notice } from "../ui.js";
import { Picker, useModels } from "./model-picker.js";
import { Foot, stepOf } from "./new-steps.js";

/** @import * as T from "../types.js" */

/** @typedef {Record<string, [string, string]>} Known title and help by value */
/**
 * @typedef {object} OptionsProps
 * @property {string} title
 * @property {string} name
 * @property {Known} known
 * @property {string[]} available
 * @property {string} value
 * @property {(value: string) => void} onPick
 * @property {T.Problem[]} problems
 */
/**
 * @typedef {object} FoldedProps
 * @property {string} title
 * @property {T.FormField[]} fields
 * @property {(field: T.FormField) => object} show
 * @property {T.Problem[]} problems
 * @property {T.Detail[]} warnings
 * @property {T.Tree} tree
 * @property {T.Tree} before the config of the run that is cloned
 */

/** @type {Known} */
const ALGORITHMS = {
  grpo: ["GRPO", "Compares the completions of a prompt with each other. Stable; needs no critic."],
  ppo: ["PPO", "Trains a critic that estimates the value of each token. General; needs more memory."],
  gkd: ["GKD", "Distills a teacher on the model's own completions."],
};
/** @type {Known} */
const TRAIN_TYPES = {
  full: ["Full", "All weights. Most memory."],
  lora: ["LoRA", "Low-rank adapters on frozen weights."],
  qlora: ["QLoRA", "LoRA on 4-bit weights. Least memory."],
  adalora: ["AdaLoRA", "LoRA with an adaptive rank per layer."],
};
const FIRST = [
  "algorithm.kl.coef",
  "train.learning_rate",
  "train.steps",
  "train.prompts_per_step",
  "sampling.n",
  "sampling.max_tokens",
  "sampling.temperature",
  "data.max_prompt_tokens",
  "policy.lora.r",
  "policy.lora.alpha",
];
const TEACHER = "algorithm.teacher.model";
/** What is set on other steps, or above. */
const ELSEWHERE = [TEACHER, "policy.model", "policy.train_type", "data.prompts", "name", "root"];
const TITLES = /** @type {Record<string, string>} */ ({
  policy: "Model",
  data: "Prompts",
  algorithm: "Algorithm",
  sampling: "Sampling",
  train: "Training",
  generators: "Generators (vLLM)",
  learners: "Learners (DeepSpeed)",
  sync: "Weight sync",
  checkpoint: "Checkpoints",
  eval: "Evaluation",
  logging: "Logging",
  timeouts: "Timeouts",
});

/** @param {T.StepProps} props */
export function SettingsStep({ draft, setDraft, change, problems, warnings, late, plan, schema }) {
  const tree = draft.tree;
  const before = draft.clone?.config || {};
  const rewards = /** @type {T.Tree[]} */ (tree.rewards || []);
  const algorithm = tree.algorithm?.type || "grpo";
  const trainType = tree.policy?.train_type || "full";
  const algorithms = Object.keys(kinds(schema, schema.properties.algorithm) || {});
  const names = Object.keys(schema.properties);
  const every = names.filter((name) => name !== "rewards").flatMap((name) => fields(schema, name, tree));
  const all = every.filter((f) => !ELSEWHERE.includes(f.path));
  const teacher = every.find((f) => f.path === TEACHER);
  const main = FIRST.filter((path) => !path.startsWith("policy.lora") || trainType !== "full");
  const first = main.flatMap((path) => all.find((f) => f.path === path) ?? []);
  const needed = all.filter((f) => f.required && !first.includes(f));
  const top = [...needed, ...first];
  const rest = all.filter((f) => !top.includes(f));
  const own = problems.filter((p) => stepOf(p.path) === "settings");
  /** @param {string} type */
  const setAlgorithm = (type) =>
    setDraft((old) => ({
      ...old,
      tree: { ...old.tree, algorithm: { type, ...shared(schema, type, old.tree.algorithm) } },
    }));
  /** @param {T.FormField} f */
  const show = (f) =>
    html`<${Field} key=${f.path} field=${f} tree=${tree} problems=${own} warnings=${warnings} onChange=${change}
      big=${top.includes(f)} />`;
  const orphans = own.filter(
    (p) =>
      ![...all, ...(teacher ? [teacher] : []), { path: "algorithm.type" }, { path: "policy.train_type" }].some(
        (f) => problemsOf([p], f).length,
      ),
  );
  return html`<div class="stack wide">
    <section class="card stack wide">
      <div class="field">
        <span class="label">Training method</span>
        <div class="choices">
          <label class="choice">
            <input type="radio" name="method" checked readonly />
            <span>
              <span class="name">Online RLHF</span>
              <span class="small muted">
                Selected automatically: the model generates completions while it trains, so prompts are enough.
              </span>
            </span>
          </label>
        </div>
      </div>
      <${Options} title="Algorithm" name="algorithm" known=${ALGORITHMS} available=${algorithms} value=${algorithm}
        onPick=${setAlgorithm} problems=${problemsAt(own, "algorithm.type")} />
      <${Options} title="Trained weights" name="train-type" known=${TRAIN_TYPES}
        available=${options(schema, "policy.train_type")} value=${trainType}
        onPick=${(value) => change("policy.train_type", value === "full" ? undefined : value)}
        problems=${problemsAt(own, "policy.train_type")} />
    </section>
    ${
      teacher &&
      html`<${Teacher} value=${getIn(tree, TEACHER)} wrong=${problemsOf(own, teacher)} late=${late}
        onPick=${(path) => change(TEACHER, path || undefined)} />`
    }
    <section class="card stack wide">
      <h2>Main settings</h2>
      <div class="settings">${top.map(show)}</div>
      ${
        plan.data &&
        plan.data.arithmetic.length > 0 &&
        html`<ul class="words muted small" aria-live="polite">
          ${plan.data.arithmetic.slice(0, 2).map((line) => html`<li>${line}</li>`)}
        </ul>`
      }
    </section>
    ${plan.error && html`<${Failure} error=${plan.error} again=${plan.reload} />`}
    ${
      orphans.length > 0 &&
      html`<${Notice} kind="bad" alert>
        <ul>${orphans.map((p) => html`<li><span class="mono">${p.path}</span>: ${p.message}</li>`)}</ul>
      <//>`
    }
    <section class="card stack tight">
      <h2>Advanced settings</h2>
      <p class="muted">The defaults are a good start.</p>
      <div class="folds">
        <${Folded} title="Run" fields=${rest.filter((f) => !f.path.includes("."))} show=${show} problems=${own}
          warnings=${warnings} tree=${tree} before=${before} />
        ${names
          .filter((name) => TITLES[name] || rest.some((f) => f.path.startsWith(`${name}.`)))
          .map(
            (name) => html`<${Folded} key=${name} title=${TITLES[name] || name}
              fields=${rest.filter((f) => f.path.startsWith(`${name}.`))} show=${show} problems=${own}
              warnings=${warnings} tree=${tree} before=${before} />`,
          )}
        ${rewards.map(
          (reward, index) => html`<${Folded} key=${`reward${index}`}
            title="Reward: ${reward.name || (reward.model || reward.path || reward.url || "").split(/[/:]/).pop()}"
            fields=${rewardFields(schema, index, tree).filter((f) => !/\.(model|path|url)$/.test(f.path))}
            show=${show} problems=${own} warnings=${warnings} tree=${tree} before=${before} />`,
        )}
      </div>
    </section>
    <${Foot} back="data" next="review" title="Review" />
  </div>`;
}

/** @param {{ value: string; wrong: T.Problem[]; late: boolean; onPick: (path: string | null) => void }} props */
function Teacher({ value, wrong, late, onPick }) {
  const models = useModels();
  if (models.error) return html`<${Failure} error=${models.error} again=${models.reload} />`;
  if (!models.data) return html`<${Loading} lines=${3} height=${64} />`;
  return html`<${Picker} name="teacher" title="Teacher"
    help="It gives its next-token probabilities for the model's own completions. It needs the same vocabulary."
    models=${models.data.models.filter((m) => m.role === "policy")} value=${value} onPick=${onPick} wrong=${wrong}
    late=${late} roots=${models.data.roots} />`;
}

/**
 * What another algorithm keeps from the one before: the KL term, if it has one.
 * @param {T.Schema} schema
 * @param {string} type
 * @param {T.Tree | undefined} old
 */
function shared(schema, type, old) {
  const has = kinds(schema, schema.properties.algorithm)?.[type]?.properties?.kl;
  return has && old?.kl ? { kl: old.kl } : {};
}

/** @param {OptionsProps} props */
function Options({ title, name, known, available, value, onPick, problems }) {
  const names = [...new Set([...Object.keys(known), ...available])];
  return html`<fieldset class="field">
    <legend class="legend">${title}</legend>
    <div class="choices across">
      ${names.map((one) => {
        const off = !available.includes(one);
        const [label, help] = known[one] || [one, ""];
        return html`<label class="choice ${off ? "off" : ""}">
          <input type="radio" name=${name} checked=${one === value} disabled=${off} onChange=${() => onPick(one)} />
          <span>
            <span class="name">${label}</span>
            <span class="small muted">${help}</span>
            ${off && html`<span class="tag">not available</span>`}
          </span>
        </label>`;
      })}
    </div>
    <${Wrong} problems=${problems} />
  </fieldset>`;
}

/** @param {FoldedProps} props */
function Folded({ title, fields: inside, show, problems, warnings, tree, before }) {
  if (!inside.length) return null;
  const wrong = inside.flatMap((f) => problemsOf(problems, f)).length;
  const unusual = inside.flatMap((f) => problemsAt(warnings, f.path)).length;
  const set = inside.filter(
    (f) => JSON.stringify(getIn(tree, f.path)) !== JSON.stringify(getIn(before, f.path)),
  ).length;
  return html`<details>
    <summary>
      ${title}
      ${wrong > 0 && html`<span class="state failed">${count(wrong, "problem")}</span>`}
      ${unusual > 0 && html`<span class="state info">${count(unusual, "note")}</span>`}
      ${set > 0 && html`<span class="tag">${set} changed</span>`}
    </summary>
    <div class="settings">${inside.map(show)}</div>
  </details>`;
}

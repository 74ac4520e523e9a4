/** Step 1: the model to train, and its rewards. */
import { problemsAt, Wrong } from "../field.js";
import { html } from "../html.js";
import { Failure, Loading, Notice } from "../ui.js";
import { Picker, useModels } from "./model-picker.js";
import { Foot } from "./new-steps.js";

/** @import * as T from "../types.js" */
/** @typedef {{ rewards: T.Tree[]; problems: T.Problem[]; onChange: (next: T.Tree[]) => void }} RewardsProps */

const USES = { off: "off", watched: "monitor only", trained: "train on" };

/** @param {T.StepProps} props */
export function ModelStep({ draft, change, problems, late, service }) {
  const models = useModels();
  const found = models.data?.models || [];
  const rewards = /** @type {T.Tree[]} */ (draft.tree.rewards || []);
  const rewardModel = rewards.find((reward) => reward.type === "model");
  const wrongRewardModel = rewardModel ? problemsAt(problems, `rewards.${rewards.indexOf(rewardModel)}`) : [];
  /** @param {string | null} path */
  const setRewardModel = (path) => {
    const next =
      path && !rewardModel
        ? [{ type: "model", model: path }, ...rewards]
        : replaced(rewards, rewardModel, path ? { ...rewardModel, model: path } : null);
    change("rewards", next.length ? next : undefined);
  };
  return html`<div class="stack wide">
    ${models.error && html`<${Failure} error=${models.error} again=${models.reload} />`}
    ${models.loading && !models.data && html`<${Loading} lines=${4} height=${64} />`}
    ${
      models.data &&
      html`
        <${Picker} name="policy" title="The model to train"
          help="An instruction-tuned (SFT) model, or an adapter on one. It generates and learns from the scores."
          models=${found.filter((m) => m.role === "policy")} value=${draft.tree.policy?.model}
          onPick=${(path) => change("policy.model", path || undefined)}
          wrong=${problemsAt(problems, "policy.model")} late=${late} roots=${models.data.roots} />
        <${Picker} name="reward" title="The reward model"
          help="It scores every completion. A sequence classifier with one label, trained on your preferences."
          models=${found.filter((m) => m.role === "reward")} value=${rewardModel?.model} onPick=${setRewardModel}
          optional wrong=${[...problems.filter((p) => p.path === "rewards"), ...wrongRewardModel]}
          late=${late} roots=${models.data.roots} />
        <${MoreRewards} service=${service} rewards=${rewards} problems=${problems}
          onChange=${(next) => change("rewards", next.length ? next : undefined)} />
        ${models.data.truncated && html`<${Notice}>Not all models are listed; enter the path of a missing one.<//>`}
        ${models.data.problems?.map((problem) => html`<${Notice} key=${problem}>${problem}<//>`)}
      `
    }
    <${Foot} next="data" />
  </div>`;
}

/**
 * The list with `made` in place of `old`, or without it.
 * @param {T.Tree[]} rewards
 * @param {T.Tree | undefined} old
 * @param {T.Tree | null} made
 */
function replaced(rewards, old, made) {
  return rewards.flatMap((reward) => (reward !== old ? [reward] : made ? [made] : []));
}

/** @param {RewardsProps & { service: T.ServiceInfo }} props */
function MoreRewards({ service, rewards, problems, onChange }) {
  const allowed = service.reward_functions || [];
  const listed = allowed.map((one) => one.path);
  const kept = rewards.filter(({ type, path }) => type === "function" && !listed.includes(path)); // of a clone
  const offered = [...allowed, ...kept.map(({ path }) => ({ path, name: path.split(":").pop(), doc: path }))];
  /** @param {string} path */
  const of = (path) => rewards.find((reward) => reward.path === path);
  /** @param {string} path */
  const role = (path) => (!of(path) ? "off" : of(path)?.weight === 0 ? "watched" : "trained");
  /** @type {(path: string, next: string) => void} */
  const set = (path, next) => {
    const { weight: _, ...rest } = /** @type {T.Tree} */ ({ type: "function", ...of(path), path });
    const made = next === "watched" ? { ...rest, weight: 0 } : rest;
    if (next === "off") onChange(replaced(rewards, of(path), null));
    else onChange(of(path) ? replaced(rewards, of(path), made) : [...rewards, made]);
  };
  return html`<fieldset class="card stack">
    <legend class="hidden-text">More rewards</legend>
    <div>
      <h2>More rewards</h2>
      <p class="muted">
        In addition to the reward model, or instead of it. A reward that is only monitored shows reward hacking.
      </p>
    </div>
    ${
      offered.length > 0 &&
      html`<div class="stack tight">
        ${offered.map(
          (one) => html`<div class="row between">
            <div class="grow"><span class="mono">${one.name}</span><div class="small muted">${one.doc}</div></div>
            <select class="inline" aria-label="Use of ${one.name}" onChange=${(e) => set(one.path, e.target.value)}>
              ${Object.entries(USES).map(
                ([use, words]) => html`<option value=${use} selected=${role(one.path) === use}>${words}</option>`,
              )}
            </select>
          </div>`,
        )}
      </div>`
    }
    ${
      offered.length === 0 &&
      html`<p class="small muted">
        Python functions are listed here if the server allows their files:${" "}
        <code>rlhf serve --reward-files DIR</code>.
      </p>`
    }
    <${HttpReward} rewards=${rewards} problems=${problems} onChange=${onChange} />
  </fieldset>`;
}

/** @param {RewardsProps} props */
function HttpReward({ rewards, problems, onChange }) {
  const index = rewards.findIndex((reward) => reward.type === "http");
  const given = rewards[index];
  const wrong = given ? problemsAt(problems, `rewards.${index}`) : [];
  /** @param {string} url */
  const set = (url) => {
    const made = url ? { ...given, type: "http", url } : null;
    onChange(made && !given ? [...rewards, made] : replaced(rewards, given, made));
  };
  return html`<details open=${Boolean(given)}>
    <summary>HTTP reward server</summary>
    <div class="field">
      <label for="reward-url">URL</label>
      <input id="reward-url" type="text" inputmode="url" autocomplete="off" spellcheck=${false}
        placeholder="http://judge:8000/score" value=${given?.url || ""}
        onInput=${(e) => set(e.target.value.trim())} aria-invalid=${wrong.length ? "true" : undefined}
        aria-describedby="reward-url-hint${wrong.length ? " reward-url-error" : ""}" />
      <span id="reward-url-hint" class="hint">
        Receives a POST with prompts, completions and columns; responds with one number per completion.
      </span>
      <${Wrong} problems=${wrong} id="reward-url-error" />
    </div>
  </details>`;
}

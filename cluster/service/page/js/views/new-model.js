/** Step 1: the model that is trained, and what judges its answers. */
import { problemsAt, Wrong } from "../field.js";
import { html } from "../html.js";
import { Failure, Loading, Notice } from "../ui.js";
import { Picker, useModels } from "./model-picker.js";
import { Foot } from "./new-steps.js";

export function ModelStep({ draft, change, problems, late, service }) {
  const models = useModels();
  const found = models.data?.models || [];
  const rewards = draft.tree.rewards || [];
  const judge = rewards.find((reward) => reward.type === "model");
  const wrongJudge = judge ? problemsAt(problems, `rewards.${rewards.indexOf(judge)}`) : [];
  const setJudge = (path) => {
    const next =
      path && !judge
        ? [{ type: "model", model: path }, ...rewards]
        : replaced(rewards, judge, path && { ...judge, model: path });
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
          help="It scores every answer; train it on preferences of your own. A sequence classifier with one label."
          models=${found.filter((m) => m.role === "reward")} value=${judge?.model} onPick=${setJudge}
          optional
          wrong=${[...problems.filter((p) => p.path === "rewards"), ...wrongJudge]}
          late=${late} roots=${models.data.roots} />
        <${OtherJudges} service=${service} rewards=${rewards} problems=${problems}
          onChange=${(next) => change("rewards", next.length ? next : undefined)} />
        ${
          models.data.truncated &&
          html`<${Notice}>There are more models than are listed; give the path of one that is missing.<//>`
        }
        ${models.data.problems?.map((problem) => html`<${Notice} key=${problem}>${problem}<//>`)}
      `
    }
    <${Foot} next="data" />
  </div>`;
}

/** The list with another one in its place, or without it. */
function replaced(rewards, old, made) {
  return rewards.flatMap((reward) => (reward !== old ? [reward] : made ? [made] : []));
}

function OtherJudges({ service, rewards, problems, onChange }) {
  const allowed = service.reward_functions || [];
  const kept = rewards.filter(
    (reward) => reward.type === "function" && !allowed.some((one) => one.path === reward.path),
  ); // of a clone
  const offered = [...allowed, ...kept.map(({ path }) => ({ path, name: path.split(":").pop(), doc: path }))];
  const of = (path) => rewards.find((reward) => reward.path === path);
  const role = (path) => (!of(path) ? "off" : of(path).weight === 0 ? "watched" : "trained");
  const set = (path, next) => {
    const { weight: _, ...made } = { type: "function", ...of(path), path };
    if (next === "watched") made.weight = 0;
    if (next === "off") onChange(replaced(rewards, of(path), null));
    else onChange(of(path) ? replaced(rewards, of(path), made) : [...rewards, made]);
  };
  return html`<fieldset class="card stack">
    <legend class="hidden-text">Further rewards</legend>
    <div>
      <h2>Further rewards</h2>
      <p class="muted">
        Beside the reward model, or instead of it. Watching one that is not trained on shows whether the
        reward is being exploited.
      </p>
    </div>
    ${
      offered.length > 0 &&
      html`<div class="stack tight">
        ${offered.map(
          (one) => html`<div class="row between">
            <div class="grow"><span class="mono">${one.name}</span><div class="small muted">${one.doc}</div></div>
            <select class="inline" aria-label="Use of ${one.name}" onChange=${(e) => set(one.path, e.target.value)}>
              ${["off", "watched", "trained"].map(
                (option) => html`<option value=${option} selected=${role(one.path) === option}>
                  ${{ off: "not used", watched: "watched", trained: "trained on" }[option]}
                </option>`,
              )}
            </select>
          </div>`,
        )}
      </div>`
    }
    ${
      offered.length === 0 &&
      html`<p class="small muted">
        Functions in Python are offered here when the server allows their files (
        <code>rlhf serve --reward-files DIR</code>).
      </p>`
    }
    <${HttpJudge} rewards=${rewards} problems=${problems} onChange=${onChange} />
  </fieldset>`;
}

function HttpJudge({ rewards, problems, onChange }) {
  const index = rewards.findIndex((reward) => reward.type === "http");
  const given = rewards[index];
  const wrong = given ? problemsAt(problems, `rewards.${index}`) : [];
  const set = (url) => {
    onChange(url && !given ? [...rewards, { type: "http", url }] : replaced(rewards, given, url && { ...given, url }));
  };
  return html`<details open=${Boolean(given)}>
    <summary>A server that scores over HTTP</summary>
    <div class="field">
      <label for="judge-url">Its address</label>
      <input id="judge-url" type="text" inputmode="url" autocomplete="off" spellcheck=${false}
        placeholder="http://judge:8000/score" value=${given?.url || ""}
        onInput=${(e) => set(e.target.value.trim())} aria-invalid=${wrong.length ? "true" : undefined}
        aria-describedby="judge-url-hint${wrong.length ? " judge-url-error" : ""}" />
      <span id="judge-url-hint" class="hint">
        POST with prompts, completions and columns; the answer holds a number for each.
      </span>
      <${Wrong} problems=${wrong} id="judge-url-error" />
    </div>
  </details>`;
}

/** Step 1: the model that is trained, and what judges its answers. */
import { request } from "../api.js";
import { bytes, number, parameters } from "../format.js";
import { html, useState } from "../html.js";
import { useResource } from "../hooks.js";
import { Failure, Loading, Notice } from "../ui.js";
import { problemsAt } from "../field.js";
import { Foot } from "./new.js";

const SHOWN = 8;

export function ModelStep({ draft, change, problems, service }) {
  const models = useResource((signal) => request("/models", { signal }), []);
  const found = models.data?.models || [];
  const rewards = draft.tree.rewards || [];
  const judge = rewards.find((reward) => reward.type === "model");
  const setJudge = (path) => {
    const others = rewards.filter((reward) => reward !== judge);
    const next = path ? [{ ...(judge || {}), type: "model", model: path }, ...others] : others;
    change("rewards", next.length ? next : undefined);
  };
  return html`<div class="stack wide">
    ${models.error && html`<${Failure} error=${models.error} again=${models.reload} />`}
    ${models.loading && !models.data && html`<${Loading} lines=${4} height=${64} />`}
    ${models.data && html`
      <${Picker} name="policy" title="The model to train" help="An instruction-tuned model (SFT), or an adapter on one. It writes the answers and learns from their scores."
        models=${found.filter((m) => m.role === "policy")} value=${draft.tree.policy?.model} onPick=${(path) => change("policy.model", path || undefined)}
        wrong=${draft.tree.policy?.model ? problemsAt(problems, "policy.model") : []} roots=${models.data.roots} />
      <${Picker} name="reward" title="The reward model" help="It scores every answer; train it on preferences of your own. A sequence classifier with one label."
        models=${found.filter((m) => m.role === "reward")} value=${judge?.model} onPick=${setJudge} optional
        wrong=${judge ? rewards.flatMap((r, i) => (r === judge ? problemsAt(problems, `rewards.${i}`) : [])) : []} roots=${models.data.roots} />
      <${OtherJudges} service=${service} rewards=${rewards} problems=${problems} onChange=${(next) => change("rewards", next.length ? next : undefined)} />
      ${models.data.truncated && html`<${Notice}>There are more models than are listed; give the path of one that is missing.<//>`}
      ${models.data.problems?.map((problem) => html`<${Notice} key=${problem}>${problem}<//>`)}`}
    <${Foot} next="data" />
  </div>`;
}

function Picker({ name, title, help, models, value, onPick, wrong, roots, optional }) {
  const listed = models.some((model) => model.path === value);
  const [typed, setTyped] = useState(value && !listed ? value : "");
  const [text, setText] = useState("");
  const fitting = models.filter((m) => `${m.name} ${m.path}`.toLowerCase().includes(text.toLowerCase()));
  const chosenFirst = fitting.filter((m) => m.path === value).concat(fitting.filter((m) => m.path !== value));
  const errorId = `${name}-error`;
  return html`<fieldset class="card stack" aria-describedby=${wrong.length ? errorId : undefined}>
    <legend class="hidden-text">${title}</legend>
    <div><h2>${title}</h2><p class="muted">${help}</p></div>
    ${models.length > SHOWN && html`<input type="search" placeholder="Search ${models.length} models" aria-label="Search: ${title}" value=${text} onInput=${(e) => setText(e.target.value)} />`}
    <div class="choices">
      ${chosenFirst.slice(0, SHOWN).map((model) => html`<${Choice} key=${model.path} name=${name} model=${model} checked=${model.path === value}
        onPick=${() => { setTyped(""); onPick(model.path); }} />`)}
      ${optional && html`<label class="choice"><input type="radio" name=${name} checked=${!value} onChange=${() => { setTyped(""); onPick(null); }} />
        <span><span class="name">None</span><span class="small muted">Reward functions alone judge, or a teacher does.</span></span></label>`}
    </div>
    ${fitting.length > SHOWN && html`<p class="small muted">${number(fitting.length - SHOWN)} more; search for them by name.</p>`}
    ${models.length === 0 && html`<p class="muted">None was found ${roots.length ? html`under ${roots.map((root) => html`<code>${root}</code> `)}` : html`: the server was started without <code>--models DIR</code>`}. A path or a hub id can be given.</p>`}
    <div class="field"><label for="${name}-path">Or a path, an address or a hub id</label>
      <input id="${name}-path" type="text" autocomplete="off" spellcheck=${false} placeholder="organisation/model" value=${typed}
        aria-invalid=${typed && wrong.length ? "true" : undefined} aria-describedby=${wrong.length ? errorId : undefined}
        onInput=${(e) => { setTyped(e.target.value); onPick(e.target.value.trim()); }} />
      ${wrong.length > 0 && html`<span class="error" id=${errorId} role="alert">${wrong.map((p) => p.message).join("; ")}</span>`}</div>
  </fieldset>`;
}

function Choice({ name, model, checked, onPick }) {
  const facts = [parameters(model.parameters), model.architecture, model.dtype, model.bytes ? bytes(model.bytes) : null,
    name === "policy" && model.chat_template === false ? "no chat template: prompts go in as they are" : null,
    model.kind === "adapter" ? `on ${model.base}` : null, model.run ? `made by run ${model.run}` : null].filter(Boolean);
  return html`<label class="choice ${model.usable ? "" : "off"}">
    <input type="radio" name=${name} checked=${checked} disabled=${!model.usable} onChange=${onPick} />
    <span><span class="name">${model.name}</span><span class="small muted">${facts.join(" · ")}</span><span class="small muted mono">${model.path}</span>
    ${!model.usable && html`<span class="small error-text">${model.problem}</span>`}</span></label>`;
}

function OtherJudges({ service, rewards, problems, onChange }) {
  const offered = service.reward_functions || [];
  const role = (path) => {
    const found = rewards.find((reward) => reward.path === path);
    return !found ? "off" : found.weight === 0 ? "watched" : "trained";
  };
  const set = (path, next) => {
    const others = rewards.filter((reward) => reward.path !== path);
    onChange(next === "off" ? others : [...others, { type: "function", path, ...(next === "watched" ? { weight: 0 } : {}) }]);
  };
  return html`<fieldset class="card stack"><legend class="hidden-text">Further rewards</legend>
    <div><h2>Further rewards</h2><p class="muted">Beside the reward model, or instead of it. Watching one that is not trained on shows whether the reward is being exploited.</p></div>
    ${offered.length > 0 && html`<div class="stack tight">${offered.map((one) => html`<div class="row between"><div class="grow"><span class="mono">${one.name}</span><div class="small muted">${one.doc}</div></div>
      <select class="inline" aria-label="Use of ${one.name}" onChange=${(e) => set(one.path, e.target.value)}>
        ${["off", "watched", "trained"].map((option) => html`<option value=${option} selected=${role(one.path) === option}>${{ off: "not used", watched: "watched", trained: "trained on" }[option]}</option>`)}
      </select></div>`)}</div>`}
    ${offered.length === 0 && html`<p class="small muted">Functions in Python are offered here when the server allows their files (<code>rlhf serve --reward-files DIR</code>).</p>`}
    <${HttpJudge} rewards=${rewards} problems=${problems} onChange=${onChange} />
  </fieldset>`;
}

function HttpJudge({ rewards, problems, onChange }) {
  const index = rewards.findIndex((reward) => reward.type === "http");
  const given = rewards[index];
  const wrong = given ? problemsAt(problems, `rewards.${index}`) : [];
  const set = (url) => {
    const others = rewards.filter((reward) => reward !== given);
    onChange(url ? [...others, { ...(given || {}), type: "http", url }] : others);
  };
  return html`<details open=${Boolean(given)}><summary>A server that scores over HTTP</summary><div class="field"><label for="judge-url">Its address</label>
    <input id="judge-url" type="text" inputmode="url" autocomplete="off" spellcheck=${false} placeholder="http://judge:8000/score" value=${given?.url || ""} onInput=${(e) => set(e.target.value.trim())}
      aria-invalid=${wrong.length ? "true" : undefined} aria-describedby="judge-url-hint" />
    <span id="judge-url-hint" class="hint">POST with prompts, completions and columns; the answer holds a number for each.</span>
    ${wrong.length > 0 && html`<span class="error" role="alert">${wrong.map((p) => p.message).join("; ")}</span>`}</div></details>`;
}

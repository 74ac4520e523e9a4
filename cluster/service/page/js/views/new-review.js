/** Step 4: the plan, its resources, what is wrong with it, its YAML and command; start. */
import { ApiError, newKey } from "../api.js";
import { emptyDraft } from "../draft.js";
import { start as startRun } from "../endpoints.js";
import { bytes, count } from "../format.js";
import { html, useState } from "../html.js";
import { Button, Code, Failure, Loading, Notice, Words } from "../ui.js";
import { Foot, stepOf } from "./new-steps.js";
import { Changes } from "./run-clone.js";

/** @import * as T from "../types.js" */

const STEP_TITLES = /** @type {Record<string, string>} */ ({ model: "Model", data: "Dataset", settings: "Settings" });

/** @param {T.StepProps} props */
export function ReviewStep({ draft, setDraft, change, plan, ask, current, problems, warnings, right }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const data = plan.data;
  const start = async () => {
    setBusy(true);
    setError(null);
    try {
      const { run } = await startRun(ask.start, ask.body, draft.key);
      setDraft(emptyDraft());
      location.hash = `#/runs/${encodeURIComponent(run.id)}`;
    } catch (caught) {
      const problem = ApiError.of(caught);
      if (problem.code === "conflict") setDraft((old) => ({ ...old, key: newKey() }));
      setError(problem);
      setBusy(false);
    }
  };
  const ready = data && problems.length === 0 && current;
  const toFix = ["model", "data", "settings"].filter((name) => !right(name)).map((name) => STEP_TITLES[name]);
  const rewards = /** @type {T.Tree[]} */ (draft.tree.rewards || []);
  const rewardNames = rewards.map((r) => (r.model || r.path || r.url || "") + (r.weight === 0 ? " (monitored)" : ""));
  return html`<div class="stack wide">
    <section class="card stack">
      <div class="field">
        <label for="run-name">Run name</label>
        <input id="run-name" type="text" placeholder=${draft.clone?.name || "run"} maxlength="64"
          value=${draft.tree.name || ""} onInput=${(e) => change("name", e.target.value || undefined)} />
        <span class="hint">The run id starts with the date and contains this name.</span>
      </div>
    </section>
    ${plan.error && html`<${Failure} error=${plan.error} again=${plan.reload} />`}
    ${!data && !plan.error && html`<${Loading} lines=${5} />`}
    ${data && problems.length > 0 && html`<${Problems} problems=${problems} />`}
    ${
      warnings.length > 0 &&
      html`<${Notice} title="Worth a look">
        <ul class="words">
          ${warnings.map((one) => html`<li><${Where} path=${one.path} /> <${Words} text=${one.message} /></li>`)}
        </ul>
      <//>`
    }
    ${
      data?.changes &&
      data.changes.length > 0 &&
      html`<section class="card stack"><h2>Changes</h2><${Changes} changes=${data.changes} /></section>`
    }
    ${
      data &&
      data.arithmetic.length > 0 &&
      html`<section class="card stack">
        <h2>Plan</h2>
        <dl class="facts">
          <dt>Model</dt>
          <dd>${draft.tree.policy?.model || "–"}</dd>
          <dt>Rewards</dt>
          <dd>${rewardNames.join(", ") || "–"}</dd>
        </dl>
        <ul class="words">${data.arithmetic.map((line) => html`<li>${line}</li>`)}</ul>
      </section>`
    }
    ${
      data &&
      data.roles.length > 0 &&
      html`<section class="card stack">
        <h2>Resources</h2>
        <${Roles} roles=${data.roles} memory=${data.memory} gpus=${data.gpus} />
      </section>`
    }
    ${
      data?.yaml &&
      html`<section class="card stack">
        <h2>Run it from the command line</h2>
        <p class="muted">
          Save this as <code>config.yaml</code>; settings that are not in it have their defaults.
          ${data.yaml.includes("***") ? " Secrets are shown as ***: fill them in." : ""}
        </p>
        <${Code} text=${data.yaml} label="config.yaml" />
        <${Code} text=${data.command} label="command that trains" wrap />
        <${Code} text=${data.command.replace(/^rlhf train/, "rlhf submit")} label="command that submits to a cluster"
          wrap />
      </section>`
    }
    ${error && html`<${Failure} error=${error} />`}
    <${Foot} back="settings">
      <${Button} kind="primary" busy=${busy} disabled=${!ready || busy} onClick=${start}>
        ${busy ? "Starting" : "Start training"}
      <//>
    <//>
    ${!current && !plan.error && html`<p class="small muted" role="status">Checking…</p>`}
    ${
      data &&
      !ready &&
      current &&
      html`<p class="small muted" role="status">
        ${toFix.length ? `Fix ${toFix.join(" and ")} to start.` : "Fix the problems above to start."}
      </p>`
    }
  </div>`;
}

/**
 * The step of a setting, and its path.
 * @param {{ path: string; bare?: boolean }} props
 */
function Where({ path, bare }) {
  return html`
    <a href="#/new/${stepOf(path)}">${STEP_TITLES[stepOf(path)]}</a>:
    ${!bare && html` <span class="mono">${path}</span>`}
  `;
}

/** @param {{ problems: T.Problem[] }} props */
function Problems({ problems }) {
  return html`<${Notice} kind="bad" title="${count(problems.length, "problem")} to fix" alert>
    <ul class="words">
      ${problems.map(
        (p) => html`<li><${Where} path=${p.path} bare=${p.missing} /> <${Words} text=${p.message} /></li>`,
      )}
    </ul>
  <//>`;
}

/** @param {{ roles: T.Role[]; memory: T.RoleMemory[]; gpus: boolean | null }} props */
function Roles({ roles, memory, gpus }) {
  /** @param {Record<string, number>} parts */
  const sum = (parts) => Object.values(parts || {}).reduce((a, b) => a + b, 0);
  /** @param {Record<string, number>} parts */
  const words = (parts) =>
    Object.entries(parts)
      .map(([name, size]) => `${name.replaceAll("_", " ")} ${bytes(size)}`)
      .join(", ");
  /** @type {(role: string, where: string, parts: Record<string, number>) => object | string} */
  const part = (role, where, parts) =>
    sum(parts)
      ? html`<div>
          <dt><strong>${role}</strong>, ${where}: ${bytes(sum(parts))}</dt>
          <dd class="small muted">${words(parts)}</dd>
        </div>`
      : "";
  return html`
    <div class="scroll">
      <table class="cards">
        <thead>
          <tr>
            <th scope="col">role</th>
            <th scope="col" class="number">count</th>
            <th scope="col" class="number">GPUs each</th>
            <th scope="col" class="number">CPUs each</th>
          </tr>
        </thead>
        <tbody>
          ${roles.map(
            (role) => html`<tr>
              <td data-label="role">${role.name}</td>
              <td class="number" data-label="count">${role.count}</td>
              <td class="number" data-label="GPUs each">${role.gpus}</td>
              <td class="number" data-label="CPUs each">${role.cpus}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      memory.length > 0 &&
      html`
        <h3>Estimated memory per process</h3>
        <dl class="stack tight">
          ${memory.map(({ role, device, host }) => [
            part(role, gpus ? "GPU" : "CPU", device),
            part(role, "host", host),
          ])}
        </dl>
      `
    }
  `;
}

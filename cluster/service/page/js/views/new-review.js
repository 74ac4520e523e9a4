/** Step 4: the plan in words, what it needs, what is wrong; the same as YAML and as a command; start. */
import { newKey, request } from "../api.js";
import { emptyDraft } from "../draft.js";
import { bytes, count } from "../format.js";
import { html, useState } from "../html.js";
import { Button, Code, Failure, Loading, Notice, Words } from "../ui.js";
import { Foot, stepOf } from "./new-steps.js";
import { Changes } from "./run-clone.js";

const STEP_TITLES = { model: "Model", data: "Dataset", settings: "Settings" };

export function ReviewStep({ draft, setDraft, change, plan, ask, current, problems, warnings, right }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const data = plan.data;
  const start = async () => {
    setBusy(true);
    setError(null);
    try {
      const { run } = await request(ask.start, {
        method: "POST",
        body: ask.body,
        extra: { "Idempotency-Key": draft.key },
      });
      setDraft(emptyDraft());
      location.hash = `#/runs/${encodeURIComponent(run.id)}`;
    } catch (problem) {
      if (problem.code === "conflict") setDraft((old) => ({ ...old, key: newKey() }));
      setError(problem);
      setBusy(false);
    }
  };
  const ready = data && problems.length === 0 && current;
  return html`<div class="stack wide">
    <section class="card stack">
      <div class="field">
        <label for="run-name">What is the run called?</label>
        <input id="run-name" type="text" placeholder=${draft.clone?.name || "run"} maxlength="64"
          value=${draft.tree.name || ""} onInput=${(e) => change("name", e.target.value || undefined)} />
        <span class="hint">Its id begins with the date and this name.</span>
      </div>
    </section>
    ${plan.error && html`<${Failure} error=${plan.error} again=${plan.reload} />`}
    ${!data && !plan.error && html`<${Loading} lines=${5} />`}
    ${data && problems.length > 0 && html`<${Problems} problems=${problems} />`}
    ${
      warnings.length > 0 &&
      html`<${Notice} title="Unusual, but it can start">
        <ul class="words">
          ${warnings.map((one) => html`<li><${Where} path=${one.path} /> <${Words} text=${one.message} /></li>`)}
        </ul>
      <//>`
    }
    ${
      data?.changes?.length > 0 &&
      html`<section class="card stack"><h2>What changes</h2><${Changes} changes=${data.changes} /></section>`
    }
    ${
      data &&
      data.arithmetic.length > 0 &&
      html`<section class="card stack">
        <h2>What will happen</h2>
        <dl class="facts">
          <dt>Model</dt>
          <dd>${draft.tree.policy?.model || "–"}</dd>
          <dt>Judged by</dt>
          <dd>
            ${
              (draft.tree.rewards || [])
                .map((r) => (r.model || r.path || r.url || "") + (r.weight === 0 ? " (watched)" : ""))
                .join(", ") || "–"
            }
          </dd>
        </dl>
        <ul class="words">${data.arithmetic.map((line) => html`<li>${line}</li>`)}</ul>
      </section>`
    }
    ${
      data &&
      data.roles.length > 0 &&
      html`<section class="card stack">
        <h2>What it takes</h2><${Roles} roles=${data.roles} memory=${data.memory} gpus=${data.gpus} />
      </section>`
    }
    ${
      data?.yaml &&
      html`<section class="card stack">
        <h2>The same without this page</h2>
        <p class="muted">
          Save this as <code>config.yaml</code>; what is not in it has its default.
          ${data.yaml.includes("***") ? " Passwords are shown as ***: write them in." : ""}
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
        It can start when these steps are right: ${
          ["model", "data", "settings"]
            .filter((name) => !right(name))
            .map((name) => STEP_TITLES[name].toLowerCase())
            .join(", ") || "all"
        }
        .
      </p>`
    }
  </div>`;
}

/** The step on which a setting is, and its path. */
function Where({ path, bare }) {
  return html`
    <a href="#/new/${stepOf(path)}">${STEP_TITLES[stepOf(path)]}</a>:
    ${!bare && html` <span class="mono">${path}</span>`}
  `;
}

function Problems({ problems }) {
  return html`<${Notice} kind="bad" title="${count(problems.length, "problem")} to mend first" alert>
    <ul class="words">
      ${problems.map(
        (p) => html`<li><${Where} path=${p.path} bare=${p.missing} /> <${Words} text=${p.message} /></li>`,
      )}
    </ul>
  <//>`;
}

function Roles({ roles, memory, gpus }) {
  const sum = (parts) => Object.values(parts || {}).reduce((a, b) => a + b, 0);
  const words = (parts) =>
    Object.entries(parts)
      .map(([name, size]) => `${name.replaceAll("_", " ")} ${bytes(size)}`)
      .join(", ");
  const device = gpus ? "GPU" : "CPU";
  return html`
    <div class="scroll">
      <table class="cards">
        <thead>
          <tr>
            <th scope="col">role</th>
            <th scope="col" class="number">count</th>
            <th scope="col" class="number">GPUs of each</th>
            <th scope="col" class="number">CPUs of each</th>
          </tr>
        </thead>
        <tbody>
          ${roles.map(
            (role) => html`<tr>
              <td data-label="role">${role.name}</td>
              <td class="number" data-label="count">${role.count}</td>
              <td class="number" data-label="GPUs of each">${role.gpus}</td>
              <td class="number" data-label="CPUs of each">${role.cpus}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      memory.length > 0 &&
      html`
        <h3>Memory of one, estimated</h3>
        <dl class="stack tight">
          ${memory.flatMap((one) =>
            [
              [`${device}`, one.device],
              ["host", one.host],
            ]
              .filter(([, parts]) => sum(parts))
              .map(
                ([where, parts]) => html`<div>
                  <dt><strong>${one.role}</strong> on the ${where}: ${bytes(sum(parts))}</dt>
                  <dd class="small muted">${words(parts)}</dd>
                </div>`,
              ),
          )}
        </dl>
      `
    }
  `;
}

/** Cloning a run: what changes, what is wrong with it, start; or edit everything in the form first. */
import { ApiError, newKey } from "../api.js";
import { isBegun, storeClone, storedDraft } from "../draft.js";
import { plan as planRun, runAt, start as startRun } from "../endpoints.js";
import { useResource } from "../hooks.js";
import { html, useMemo, useState } from "../html.js";
import { setIn, shown } from "../tree.js";
import { Button, Dialog, Failure, Loading, Notice } from "../ui.js";

/** @import * as T from "../types.js" */

/** @param {{ details: T.RunDetails; changes: T.Tree; onClose: () => void }} props */
export function CloneDialog({ details, changes, onClose }) {
  const at = `${runAt(details.run.id)}/clone`;
  const [name, setName] = useState(details.run.name);
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const [busy, setBusy] = useState(false);
  const [replacing, setReplacing] = useState(false); // a draft, as the page has warned
  const plan = useResource((signal) => planRun(`${at}/plan`, { changes }, signal), [at, changes]);
  const problems = plan.data?.problems || [];
  const key = useMemo(newKey, [at, changes, name]); // sent twice, it makes one run
  const start = async () => {
    setBusy(true);
    setError(null);
    try {
      const { run } = await startRun(at, { changes, name }, key);
      onClose();
      location.hash = `#/runs/${encodeURIComponent(run.id)}`;
    } catch (problem) {
      setError(ApiError.of(problem));
      setBusy(false);
    }
  };
  const edit = () => {
    if (!replacing && isBegun(storedDraft())) {
      setReplacing(true);
      return;
    }
    const { root: _, ...config } = details.config ?? {};
    storeClone(
      details.run,
      config,
      Object.entries(changes).reduce((old, [path, value]) => setIn(old, path, value), { ...config, name }),
    );
    onClose();
    location.hash = "#/new/settings";
  };
  return html`<${Dialog} title="Clone ${details.run.name}" onClose=${onClose}>
    <p class="muted">
      A new run from step 0 with the same settings${Object.keys(changes).length ? " except these" : ""}. The original
      run is kept.
    </p>
    ${plan.loading && html`<${Loading} lines=${2} height=${24} />`}
    ${plan.data?.changes?.length ? html`<${Changes} changes=${plan.data.changes} />` : ""}
    <div class="field">
      <label for="clone-name">Name</label>
      <input id="clone-name" type="text" maxlength="64" value=${name} onInput=${(e) => setName(e.target.value)} />
    </div>
    ${
      problems.length > 0 &&
      html`<${Notice} kind="bad" alert>
        <ul>${problems.map((p) => html`<li><span class="mono">${p.path}</span>: ${p.message}</li>`)}</ul>
      <//>`
    }
    ${(error || plan.error) && html`<${Failure} error=${error || plan.error} />`}
    ${
      replacing &&
      html`<${Notice} kind="warn" alert>
        You have a draft of a new run. Editing this clone replaces it.${" "}
        <a href="#/new">Open the draft</a>
      <//>`
    }
    <div class="actions">
      <${Button} kind="quiet" onClick=${onClose}>Cancel<//>
      ${details.config && html`<${Button} onClick=${edit}>${replacing ? "Replace draft" : "Edit settings first"}<//>`}
      <${Button} kind="primary" disabled=${busy || !plan.data || problems.length > 0 || !name.trim()} onClick=${start}>
        Start clone
      <//>
    </div>
  <//>`;
}

/**
 * Where a clone differs from its run.
 * @param {{ changes: T.Change[] }} props
 */
export function Changes({ changes }) {
  return html`<table class="changes">
    <thead>
      <tr>
        <th scope="col">setting</th><th scope="col" class="number">from</th><th scope="col" class="number">to</th>
      </tr>
    </thead>
    <tbody>
      ${changes.map(
        (c) => html`<tr>
          <th scope="row" class="mono">${c.path}</th>
          <td class="mono">${shown(c.from)}</td>
          <td class="mono"><strong>${shown(c.to)}</strong></td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

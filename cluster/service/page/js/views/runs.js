/** All runs: table, states, main metrics, selection for a comparison. */
import { getRuns } from "../endpoints.js";
import { ago, clock, duration, number, took } from "../format.js";
import { useResource, useSettled, useTitle } from "../hooks.js";
import { html, useEffect, useState } from "../html.js";
import { Button, Empty, Failure, Loading, Meter, State } from "../ui.js";

/** @import * as T from "../types.js" */

/**
 * @typedef {object} FiltersProps
 * @property {Record<string, number>} counts
 * @property {string} state
 * @property {(state: string) => void} setState
 * @property {string} text
 * @property {(text: string) => void} setText
 */

const STATES = ["running", "queued", "paused", "succeeded", "failed", "stopped"];
const PAGE = 50;
const MOST_COMPARED = 6;

export function Runs() {
  useTitle("Runs");
  const [state, setState] = useState("");
  const [text, setText] = useState("");
  /** `after` of each page up to the one shown */
  const [pages, setPages] = useState(/** @type {(string | null)[]} */ ([null]));
  const [picked, setPicked] = useState(/** @type {string[]} */ ([]));
  const q = useSettled(text);
  useEffect(() => setPages([null]), [state, q]);
  const after = pages.at(-1);
  const { data, error, loading, reload } = useResource(
    (signal) => getRuns({ limit: PAGE, after, state, q }, signal),
    [after, state, q],
    { poll: 4000 },
  );
  const all = data ? Object.values(data.counts).reduce((sum, n) => sum + n, 0) : 0;
  /** @param {string} id */
  const pick = (id) =>
    setPicked((old) => (old.includes(id) ? old.filter((one) => one !== id) : [...old, id].slice(-MOST_COMPARED)));
  return html`<div class="stack wide">
    <div class="row between"><h1>Runs</h1><a class="button primary" href="#/new">New run</a></div>
    ${error && html`<${Failure} error=${error} again=${reload} />`}
    ${
      (all > 0 || state || text) &&
      html`<${Filters} counts=${data?.counts || {}} state=${state} setState=${setState} text=${text}
        setText=${setText} />`
    }
    ${loading && !data && html`<${Loading} lines=${6} />`}
    ${
      data &&
      data.runs.length === 0 &&
      (all === 0
        ? html`<${First} />`
        : html`<${Empty} title="No matches">
          <p>No run has this state and name.</p>
          <${Button} onClick=${() => {
            setState("");
            setText("");
          }}>
            Show all runs
          <//>
        <//>`)
    }
    ${
      data &&
      data.runs.length > 0 &&
      html`
        <${Table} runs=${data.runs} picked=${picked} pick=${pick} />
        <${Pager} data=${data} pages=${pages} setPages=${setPages} />
      `
    }
    ${
      picked.length > 0 &&
      html`<div class="dock" role="status">
        <span>${picked.length === 1 ? "Pick another run to compare" : `${picked.length} runs picked`}</span>
        <span class="row">
          <${Button} kind="quiet" slim onClick=${() => setPicked([])}>Clear<//>
          ${
            picked.length > 1 &&
            html`<a class="button slim" href="#/compare?ids=${picked.map(encodeURIComponent).join(",")}">Compare</a>`
          }
        </span>
      </div>`
    }
  </div>`;
}

function First() {
  return html`<${Empty} title="No runs yet">
    <p>
      Choose a model and a reward model, upload a prompt file, and start. The model generates completions while it
      trains.
    </p>
    <a class="button primary" href="#/new">Start your first run</a>
    <p class="small">Runs started by <code>rlhf train</code> in the same folder appear here too.</p>
  <//>`;
}

/** @param {FiltersProps} props */
function Filters({ counts, state, setState, text, setText }) {
  return html`<div class="filters">
    <input type="search" class="inline" placeholder="Search names" aria-label="Search names" value=${text}
      onInput=${(e) => setText(e.target.value)} />
    <div class="chips" role="group" aria-label="State">
      <button type="button" class="chip" aria-pressed=${state === ""} onClick=${() => setState("")}>All</button>
      ${STATES.filter((one) => counts[one] || one === state).map(
        (one) => html`<button type="button" class="chip" aria-pressed=${state === one} onClick=${() => setState(one)}>
          ${one} ${counts[one] || 0}
        </button>`,
      )}
    </div>
  </div>`;
}

/** @param {{ runs: T.Run[]; picked: string[]; pick: (id: string) => void }} props */
function Table({ runs, picked, pick }) {
  return html`<div class="card flush">
    <table class="runs cards">
      <thead>
        <tr>
          <th scope="col"><span class="hidden-text">Compare</span></th>
          <th scope="col">Run</th>
          <th scope="col">State</th>
          <th scope="col">Progress</th>
          <th scope="col" class="number">Reward</th>
          <th scope="col" class="number">KL</th>
          <th scope="col" class="number">Duration</th>
          <th scope="col" class="number">Created</th>
        </tr>
      </thead>
      <tbody>
        ${runs.map((run) => html`<${Row} key=${run.id} run=${run} picked=${picked.includes(run.id)} pick=${pick} />`)}
      </tbody>
    </table>
  </div>`;
}

/** @param {{ run: T.Run; picked: boolean; pick: (id: string) => void }} props */
function Row({ run, picked, pick }) {
  if (run.state === "unreadable") {
    return html`<tr>
      <td class="pick" data-label=""></td>
      <th scope="row" class="bare">${run.id}<div class="small muted">${run.unreadable}</div></th>
      <td data-label="State"><${State} state="unreadable" /></td>
      <td colspan="5" data-label=""></td>
    </tr>`;
  }
  const head = run.headline || {};
  const why = run.queue?.reason || (run.error && `${run.error.type}: ${run.error.message}`);
  return html`<tr>
    <td class="pick" data-label="">
      <input type="checkbox" checked=${picked} onChange=${() => pick(run.id)}
        aria-label="Compare ${run.name}, ${run.id}" />
    </td>
    <td class="bare" data-label="">
      <div>
        <a class="run-name" href="#/runs/${encodeURIComponent(run.id)}">${run.name}</a>
        <div class="small muted">${run.id}</div>
        ${why && html`<div class="small ${run.error ? "error-text" : "muted"}">${why.slice(0, 140)}</div>`}
      </div>
    </td>
    <td data-label="State"><${State} state=${run.state} /></td>
    <td data-label="Progress">
      <div class="progress">
        <${Meter} value=${run.step} of=${run.steps} state=${run.state} label="Steps of ${run.name}" />
        <span class="small muted">${number(run.step)} of ${number(run.steps)} steps</span>
      </div>
    </td>
    <td class="number ${"reward/mean" in head ? "" : "nothing"}" data-label="Reward">${number(head["reward/mean"])}</td>
    <td class="number ${"kl/mean" in head ? "" : "nothing"}" data-label="KL">${number(head["kl/mean"])}</td>
    <td class="number ${run.started ? "" : "nothing"}" data-label="Duration">${duration(took(run))}</td>
    <td class="number" data-label="Created" title=${clock(run.created)}>${ago(run.created)}</td>
  </tr>`;
}

/** @param {{ data: T.RunList; pages: (string | null)[]; setPages: (pages: (string | null)[]) => void }} props */
function Pager({ data, pages, setPages }) {
  if (!data.next && pages.length === 1) return null;
  return html`<nav class="row between" aria-label="Pages">
    <${Button} slim disabled=${pages.length === 1} onClick=${() => setPages(pages.slice(0, -1))}>Newer<//>
    <span class="small muted">page ${pages.length} of ${Math.ceil(data.total / PAGE)}, ${number(data.total)} runs</span>
    <${Button} slim disabled=${!data.next} onClick=${() => setPages([...pages, data.next])}>Older<//>
  </nav>`;
}

/** Step 2: the prompts. Upload, verdict, first rows, lengths, problems by line. */
import { ApiError } from "../api.js";
import { deleteDataset, getDataset, getDatasets, getLengths } from "../endpoints.js";
import { Wrong } from "../field.js";
import { ago, bytes, count, number } from "../format.js";
import { useResource } from "../hooks.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { Button, Code, Dialog, Failure, Icon, Loading, Meter, Notice, Talk, Words } from "../ui.js";
import { ACCEPTED, startUpload, stopUpload, useUpload } from "../uploading.js";
import { Foot, stepOf } from "./new-steps.js";

/** @import * as T from "../types.js" */

/**
 * @typedef {object} DatasetProps
 * @property {string} id
 * @property {string | undefined} model
 * @property {number} limit
 * @property {boolean | undefined} strip
 * @property {boolean | undefined} skip
 * @property {(path: string, value: unknown) => void} change
 * @property {() => void} onGone
 */

const FORMATS = /** @type {Record<string, string>} */ ({
  "rlhf-online": "RLHF Online",
  sft: "Prompts with responses (SFT)",
  preference: "Preference pairs",
  kto: "Labeled completions (KTO)",
  pretrain: "Plain text",
  unknown: "Unknown format",
});
const ADVICE = /** @type {Record<string, string>} */ ({
  sft: "The file contains responses. Online training generates its own: use the prompts only.",
  preference:
    "Pairs of chosen and rejected responses are for DPO or for training a reward model; online RL does not use them.",
  kto: "Labeled completions are for KTO, an offline method; online training needs prompts only.",
  pretrain: "Plain text has no prompts. Each line needs a `prompt` or `messages`.",
  unknown: "Every line needs either `prompt` or `messages`, the same field in all lines.",
});
const EXAMPLE = `{"prompt": "Write a haiku about coding."}
{"messages": [{"role": "system", "content": "You are a coding expert."},
              {"role": "user", "content": "Explain recursion simply."}]}`;

/** @param {T.StepProps} props */
export function DataStep({ draft, setDraft, change, service, problems, late }) {
  const sets = useResource(getDatasets, []);
  const { work, error } = useUpload();
  useEffect(() => {
    if (!work) sets.reload();
  }, [work === null]);
  /** @param {T.DatasetAnswer} dataset */
  const pick = (dataset) => {
    setDraft((old) => ({ ...old, dataset: dataset.id }));
    change("data.prompts", dataset.path);
  };
  const chosen = draft.tree.data?.prompts;
  const wrong = problems.filter((p) => stepOf(p.path) === "data");
  return html`<div class="stack wide">
    <${Drop} onFile=${(file) => startUpload(file, service.upload_limit_bytes)} work=${work}
      limit=${service.upload_limit_bytes} />
    ${!chosen && html`<${Wrong} problems=${wrong} late=${late} />`}
    ${error && html`<${Failure} error=${error} />`}
    ${sets.error && html`<${Failure} error=${sets.error} again=${sets.reload} />`}
    ${
      draft.dataset &&
      chosen &&
      html`<${Dataset} key=${draft.dataset} id=${draft.dataset} model=${draft.tree.policy?.model}
        limit=${draft.tree.data?.max_prompt_tokens ?? 1024} strip=${draft.tree.data?.strip_responses}
        skip=${draft.tree.data?.skip_invalid} change=${change} onGone=${() => {
          setDraft((old) => ({ ...old, dataset: null }));
          change("data.prompts", undefined);
          sets.reload();
        }} />`
    }
    ${
      draft.dataset &&
      chosen &&
      wrong.length > 0 &&
      html`<${Notice} kind="bad" title="Training will reject this file">
        <ul>${wrong.slice(0, 10).map((p) => html`<li><${Words} text=${p.message} /></li>`)}</ul>
      <//>`
    }
    ${sets.data?.datasets.length ? html`<${Earlier} sets=${sets.data} chosen=${draft.dataset} pick=${pick} />` : ""}
    <${Elsewhere} chosen=${draft.dataset ? "" : chosen} problems=${wrong} onPick=${(path) => {
      setDraft((old) => ({ ...old, dataset: null }));
      change("data.prompts", path || undefined);
    }} />
    <${Foot} back="model" next="settings" />
  </div>`;
}

/** @param {{ onFile: (file: File) => void; work: T.Upload | null; limit: number }} props */
function Drop({ onFile, work, limit }) {
  const [over, setOver] = useState(false);
  const input = useRef(/** @type {HTMLInputElement | null} */ (null));
  /** @param {DragEvent} event */
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    const file = event.dataTransfer?.files[0];
    if (!work && file) onFile(file);
  };
  return html`<section class="drop ${over ? "over" : ""}" aria-label="Upload prompts" onDragOver=${(e) => {
    e.preventDefault();
    setOver(true);
  }} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <${Icon} name="upload" />
    ${
      work
        ? html`<div class="stack tight grow" role="status">
          <strong>${doing(work)} ${work.name}</strong>
          <${Meter} value=${Math.round(work.share * 100)} of=${100} label="Upload" />
          <span class="muted small">
            ${
              work.share < 1
                ? `${Math.round(work.share * 100)} %`
                : work.stopping
                  ? "It is deleted as soon as it has been read."
                  : "Every line is checked."
            }
          </span>
          <${Button} slim disabled=${work.stopping} onClick=${stopUpload}>Stop<//>
        </div>`
        : html`
          <h2>Drop a prompt file here</h2>
          <p class="muted">
            .jsonl, .jsonl.gz or .parquet, up to ${bytes(limit)}. Prompts only: the model generates completions.
          </p>
          <${Button} kind="primary" onClick=${() => input.current?.click()}>Choose a file<//>
        `
    }
    <input ref=${input} class="hidden-text" type="file" tabindex="-1" aria-label="Prompt file" accept=${ACCEPTED}
      onChange=${(e) => {
        const file = e.target.files[0];
        e.target.value = "";
        if (file) onFile(file);
      }} />
  </section>`;
}

/** @param {T.Upload} work */
function doing(work) {
  return work.stopping ? "Stopping" : work.share < 1 ? "Uploading" : "Reading";
}

/** @param {DatasetProps} props */
function Dataset({ id, model, limit, strip, skip, change, onGone }) {
  const { data, error, reload } = useResource((signal) => getDataset(id, signal), [id]);
  if (error?.status === 404)
    return html`<${Notice} kind="warn">
      This upload no longer exists on the server. <a href="#/new/data" onClick=${onGone}>Choose another</a>
    <//>`;
  if (error) return html`<${Failure} error=${error} again=${reload} />`;
  if (!data) return html`<${Loading} lines=${3} />`;
  const name = FORMATS[data.format] || data.format;
  const bad = badLines(data);
  const fits = data.format === "rlhf-online" || (data.format === "sft" && strip);
  const usable = data.ready || (fits && !bad.file && (bad.lines === 0 || skip));
  const left = bad.lines > 0 && skip;
  return html`<section class="card stack wide" aria-label="The dataset">
    <div class="row between top">
      <div class="verdict ${usable ? "" : "bad"}">
        <span class="sign"><${Icon} name=${usable ? "check" : "alert"} /></span>
        <div role="status">
          <h2>${name}, ${count(data.records, "prompt")}, ${usable ? "ready" : "not ready"}</h2>
          <p class="muted">
            ${data.name} · ${bytes(data.bytes)}
            ${data.duplicates ? ` · ${count(data.duplicates, "duplicate prompt")}` : ""}
          </p>
        </div>
      </div>
      <${Removal} dataset=${data} onGone=${onGone} />
    </div>
    ${
      usable &&
      left &&
      html`<${Notice}>
        ${badWords(bad)} skipped and written to the run's rejected.jsonl.${" "}
        <${Button} slim onClick=${() => change("data.skip_invalid", undefined)}>Undo<//>
      <//>`
    }
    ${
      !usable &&
      !fits &&
      html`<${Notice} kind="warn" title="What to do">
        <${Words} text=${data.advice || ADVICE[data.format]} />
        ${
          data.format === "sft" &&
          html`<p><${Button} slim onClick=${() => change("data.strip_responses", true)}>Use the prompts only<//></p>`
        }
      <//>`
    }
    ${
      !usable &&
      fits &&
      html`<${Notice} kind="warn" title="What to do">
        ${
          bad.file
            ? "Fix the file and upload it again."
            : html`
              Fix the file and upload it again, or train without ${badWords(bad, "")}.
              <p><${Button} slim onClick=${() => change("data.skip_invalid", true)}>Skip invalid lines<//></p>
            `
        }
      <//>`
    }
    ${
      !usable &&
      !fits &&
      data.format !== "sft" &&
      html`<div class="stack tight">
        <h3>Expected format</h3>
        <${Code} text=${EXAMPLE} label="example lines" wrap />
      </div>`
    }
    ${data.problems_total > 0 && html`<${Problems} data=${data} />`}
    ${
      data.rows &&
      data.rows.length > 0 &&
      html`<div class="stack tight">
        <h3>First rows</h3>
        <div class="stack">
          ${data.rows.map((row) =>
            row.messages
              ? html`<${Talk} messages=${row.messages} />`
              : html`<p class="small error-text">line ${row.line}: ${row.problem}</p>`,
          )}
        </div>
      </div>`
    }
    ${usable && model && html`<${Lengths} id=${id} model=${model} limit=${limit} />`}
  </section>`;
}

/**
 * How many lines training would reject (`more`: at least), and whether the file itself has a fault.
 * @param {T.DatasetReport} data
 */
function badLines(data) {
  const errors = data.problems.filter((p) => p.severity === "error");
  const lines = new Set(errors.map((p) => p.line).filter((line) => line !== null && line !== undefined)).size;
  return {
    lines,
    more: data.problems_total > data.problems.length,
    file: data.format !== "sft" && errors.some((p) => p.line === null || p.line === undefined),
  };
}

/** @param {{ lines: number; more: boolean }} bad */
function badWords({ lines, more }, verb = lines === 1 ? " is" : " are") {
  return `${more ? "at least " : ""}${count(lines, "invalid line")}${verb}`;
}

/** @param {{ dataset: T.DatasetAnswer; onGone: () => void }} props */
function Removal({ dataset, onGone }) {
  const [asking, setAsking] = useState(false);
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const close = () => {
    setAsking(false);
    setError(null);
  };
  const go = async () => {
    try {
      await deleteDataset(dataset.id);
      onGone();
    } catch (problem) {
      setError(ApiError.of(problem));
    }
  };
  return html`
    <${Button} slim kind="quiet" onClick=${() => setAsking(true)}>Delete<//>
    ${
      asking &&
      html`<${Dialog} title="Delete ${dataset.name}?" onClose=${close}>
        <p>
          The upload is deleted from the server. Runs that use it can then be neither resumed nor cloned with it.
        </p>
        ${error && html`<${Failure} error=${error} />`}
        <div class="actions">
          <${Button} onClick=${close}>Cancel<//><${Button} kind="danger" onClick=${go}>Delete<//>
        </div>
      <//>`
    }
  `;
}

/** @param {{ data: T.DatasetReport }} props */
function Problems({ data }) {
  return html`<details open=${!data.ready}>
    <summary>${count(data.problems_total, "problem")} by line</summary>
    <div class="scroll">
      <table class="cards">
        <thead>
          <tr>
            <th scope="col" class="number">line</th>
            <th scope="col">field</th>
            <th scope="col">found</th>
            <th scope="col">expected</th>
          </tr>
        </thead>
        <tbody>
          ${data.problems.map(
            (p) => html`<tr>
              <td class="number" data-label="line">${p.line ?? "file"}</td>
              <td class="mono" data-label="field">${p.field || ""}</td>
              <td data-label="found">
                <span>
                  <${Words} text=${p.found} />${p.severity === "warning" ? html` <span class="tag">warning</span>` : ""}
                </span>
              </td>
              <td data-label="expected"><span><${Words} text=${p.expected} /></span></td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${
      data.problems_total > data.problems.length &&
      html`<p class="small muted">and ${number(data.problems_total - data.problems.length)} more</p>`
    }
  </details>`;
}

/** @param {{ id: string; model: string; limit: number }} props */
function Lengths({ id, model, limit }) {
  const { data, error } = useResource(
    (signal) => getLengths(id, { model, max_prompt_tokens: limit }, signal),
    [id, model, limit],
  );
  if (error) return html`<p class="small muted">The prompt lengths could not be computed: ${error.message}</p>`;
  if (!data) return html`<${Loading} lines=${2} height=${20} />`;
  const most = Math.max(1, ...data.histogram.map((bin) => bin.prompts));
  const bins = data.histogram.slice(0, data.histogram.findLastIndex((bin) => bin.prompts > 0) + 1);
  return html`<div class="stack tight">
    <h3>Prompt lengths in tokens</h3>
    <div class="histogram" role="img"
      aria-label="Prompt lengths: longest ${data.longest} tokens, ${data.over_limit} over the limit of ${data.limit}">
      ${bins.map(
        (bin) => html`
          <span class="small muted number">${number(bin.from)}–${number(bin.to)}</span>
          <span class=${bin.prompts ? "column" : ""} style=${{ width: `${(bin.prompts / most) * 100}%` }}></span>
          <span class="small number">${number(bin.prompts)}</span>
        `,
      )}
    </div>
    <p class="small ${data.over_limit ? "error-text" : "muted"}">
      Longest ${number(data.longest)}, limit ${number(data.limit)}
      ${
        data.over_limit
          ? `: ${count(data.over_limit, "prompt")} over it. Raise it in the settings, or filter them (data.overlong).`
          : ""
      }
    </p>
  </div>`;
}

/** @param {{ sets: T.DatasetList; chosen: string | null; pick: (dataset: T.DatasetAnswer) => void }} props */
function Earlier({ sets, chosen, pick }) {
  return html`<fieldset class="card stack">
    <legend class="hidden-text">Recent uploads</legend>
    <h2>Recent uploads</h2>
    <div class="choices">
      ${sets.datasets.map(
        (one) => html`<label class="choice">
          <input type="radio" name="dataset" checked=${one.id === chosen} onChange=${() => pick(one)} />
          <span>
            <span class="name">${one.name}</span>
            <span class="small muted">
              ${FORMATS[one.format] || one.format}, ${count(one.records, "prompt")}
              ${one.ready ? "" : ", not ready"} · ${bytes(one.bytes)} · ${ago(one.created)}
            </span>
          </span>
        </label>`,
      )}
    </div>
    ${sets.next && html`<p class="small muted">Newest ${sets.datasets.length} of ${number(sets.total)}.</p>`}
  </fieldset>`;
}

/** @param {{ chosen: unknown; onPick: (path: string) => void; problems: T.Problem[] }} props */
function Elsewhere({ chosen, onPick, problems }) {
  const [text, setText] = useState(typeof chosen === "string" ? chosen : "");
  return html`<details open=${Boolean(chosen)}>
    <summary>Use a file on the server</summary>
    <div class="field">
      <label for="data-path">Path</label>
      <input id="data-path" type="text" autocomplete="off" spellcheck=${false} value=${text} onInput=${(e) => {
        setText(e.target.value);
        onPick(e.target.value.trim());
      }} aria-invalid=${text && problems.length ? "true" : undefined} aria-describedby="data-path-hint" />
      <span id="data-path-hint" class="hint">
        It must be in a folder that the server allows (<code>rlhf serve --data DIR</code>).
      </span>
      ${text && html`<${Wrong} problems=${problems} id="data-path-error" />`}
    </div>
  </details>`;
}

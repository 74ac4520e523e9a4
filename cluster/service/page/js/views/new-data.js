/** Step 2: the prompts. Upload, verdict, first rows, lengths, problems by line. */
import { request } from "../api.js";
import { Wrong } from "../field.js";
import { ago, bytes, count, number } from "../format.js";
import { useResource } from "../hooks.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { Button, Code, Dialog, Failure, Icon, Loading, Meter, Notice, Talk, Words } from "../ui.js";
import { ACCEPTED, remove, startUpload, stopUpload, useUpload } from "../uploading.js";
import { Foot, stepOf } from "./new-steps.js";

export const FORMATS = {
  "rlhf-online": "RLHF Online",
  sft: "Prompts with responses (SFT)",
  preference: "Preference pairs",
  kto: "Labelled answers (KTO)",
  pretrain: "Plain text",
  unknown: "Not recognised",
};
const ADVICE = {
  sft: "The file holds responses. The model is to write its own: use the prompts only.",
  preference:
    "Pairs of chosen and rejected responses are for DPO or for training a reward model; online RL does not use them.",
  kto: "Answers with labels are for KTO, an offline method; online training needs prompts only.",
  pretrain: "Text without a prompt cannot be answered. Each line needs a `prompt` or `messages`.",
  unknown: "Make sure that every line has either `prompt` or `messages`, and that all lines are of one kind.",
};
const EXAMPLE = `{"prompt": "Write a haiku about coding."}
{"messages": [{"role": "system", "content": "You are a coding expert."},
              {"role": "user", "content": "Explain recursion simply."}]}`;

export function DataStep({ draft, setDraft, change, service, problems, late }) {
  const sets = useResource((signal) => request("/datasets", { query: { limit: 20 }, signal }), []);
  const { work, error } = useUpload();
  useEffect(() => {
    if (!work) sets.reload();
  }, [work === null]);
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
      html`<${Notice} kind="bad" title="A run would refuse it">
        <ul>${wrong.slice(0, 10).map((p) => html`<li><${Words} text=${p.message} /></li>`)}</ul>
      <//>`
    }
    ${sets.data?.datasets.length > 0 && html`<${Earlier} sets=${sets.data} chosen=${draft.dataset} pick=${pick} />`}
    <${Elsewhere} chosen=${draft.dataset ? "" : chosen} problems=${wrong} onPick=${(path) => {
      setDraft((old) => ({ ...old, dataset: null }));
      change("data.prompts", path || undefined);
    }} />
    <${Foot} back="model" next="settings" />
  </div>`;
}

function Drop({ onFile, work, limit }) {
  const [over, setOver] = useState(false);
  const input = useRef(null);
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    if (!work && event.dataTransfer.files[0]) onFile(event.dataTransfer.files[0]);
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
                  ? "It is removed as soon as it is read."
                  : "Every line is checked."
            }
          </span>
          <${Button} slim disabled=${work.stopping} onClick=${stopUpload}>Stop<//>
        </div>`
        : html`
          <h2>Drop a file of prompts here</h2>
          <p class="muted">
            .jsonl, .jsonl.gz or .parquet, up to ${bytes(limit)}. Without answers: the model writes them.
          </p>
          <${Button} kind="primary" onClick=${() => input.current.click()}>Choose a file<//>
        `
    }
    <input ref=${input} class="hidden-text" type="file" tabindex="-1" aria-label="File of prompts" accept=${ACCEPTED}
      onChange=${(e) => {
        const file = e.target.files[0];
        e.target.value = "";
        if (file) onFile(file);
      }} />
  </section>`;
}

function doing(work) {
  return work.stopping ? "Stopping" : work.share < 1 ? "Uploading" : "Reading";
}

function Dataset({ id, model, limit, strip, skip, change, onGone }) {
  const at = `/datasets/${encodeURIComponent(id)}`;
  const { data, error, reload } = useResource((signal) => request(at, { query: { rows: 5 }, signal }), [id]);
  if (error?.status === 404)
    return html`<${Notice} kind="warn">
      This upload is no longer on the server. <a href="#/new/data" onClick=${onGone}>Choose another</a>
    <//>`;
  if (error) return html`<${Failure} error=${error} again=${reload} />`;
  if (!data) return html`<${Loading} lines=${3} />`;
  const name = FORMATS[data.format] || data.format;
  const bad = badLines(data);
  const fits = data.format === "rlhf-online" || (data.format === "sft" && strip);
  const usable = data.ready || (fits && !bad.whole && (bad.lines === 0 || skip));
  const left = bad.lines > 0 && skip;
  return html`<section class="card stack wide" aria-label="The dataset">
    <div class="row between top">
      <div class="verdict ${usable ? "" : "bad"}">
        <span class="sign"><${Icon} name=${usable ? "check" : "alert"} /></span>
        <div role="status">
          <h2>${name}, ${count(data.records, "prompt")}, ${usable ? "ready" : "not ready"}</h2>
          <p class="muted">
            ${data.name} · ${bytes(data.bytes)}
            ${data.duplicates ? ` · ${count(data.duplicates, "repeated prompt")}` : ""}
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
          bad.whole
            ? "Mend the file and upload it again."
            : html`
              Mend the file and upload it again, or train without ${badWords(bad, "")}.
              <p><${Button} slim onClick=${() => change("data.skip_invalid", true)}>Leave bad lines out<//></p>
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
      data.rows?.length > 0 &&
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
    ${usable && model && html`<${Lengths} at=${at} model=${model} limit=${limit} />`}
  </section>`;
}

/** How many lines training would reject (`more`: at least), and whether the file itself has a fault. */
function badLines(data) {
  const errors = data.problems.filter((p) => p.severity === "error");
  const lines = new Set(errors.map((p) => p.line).filter((line) => line !== null && line !== undefined)).size;
  return {
    lines,
    more: data.problems_total > data.problems.length,
    whole: data.format !== "sft" && errors.some((p) => p.line === null || p.line === undefined),
  };
}

function badWords({ lines, more }, verb = lines === 1 ? " is" : " are") {
  return `${more ? "at least " : ""}${count(lines, "bad line")}${verb}`;
}

function Removal({ dataset, onGone }) {
  const [asking, setAsking] = useState(false);
  const [error, setError] = useState(null);
  const close = () => {
    setAsking(false);
    setError(null);
  };
  const go = async () => {
    try {
      await remove(dataset.id);
      onGone();
    } catch (problem) {
      setError(problem);
    }
  };
  return html`
    <${Button} slim kind="quiet" onClick=${() => setAsking(true)}>Remove<//>
    ${
      asking &&
      html`<${Dialog} title="Remove ${dataset.name}?" onClose=${close}>
        <p>
          The upload is deleted from the server. A run that has read it can then neither be resumed nor cloned with it.
        </p>
        ${error && html`<${Failure} error=${error} />`}
        <div class="actions">
          <${Button} onClick=${close}>Keep it<//><${Button} kind="danger" onClick=${go}>Remove<//>
        </div>
      <//>`
    }
  `;
}

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

function Lengths({ at, model, limit }) {
  const { data, error } = useResource(
    (signal) => request(`${at}/lengths`, { query: { model, max_prompt_tokens: limit }, signal }),
    [at, model, limit],
  );
  if (error) return html`<p class="small muted">The prompts' lengths are not known: ${error.message}</p>`;
  if (!data) return html`<${Loading} lines=${2} height=${20} />`;
  const most = Math.max(1, ...data.histogram.map((bin) => bin.prompts));
  const bins = data.histogram.slice(0, data.histogram.findLastIndex((bin) => bin.prompts > 0) + 1);
  return html`<div class="stack tight">
    <h3>Lengths in tokens</h3>
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

function Earlier({ sets, chosen, pick }) {
  return html`<fieldset class="card stack">
    <legend class="hidden-text">Uploaded before</legend>
    <h2>Uploaded before</h2>
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
    ${sets.next && html`<p class="small muted">The newest ${sets.datasets.length} of ${number(sets.total)}.</p>`}
  </fieldset>`;
}

function Elsewhere({ chosen, onPick, problems }) {
  const [text, setText] = useState(typeof chosen === "string" ? chosen : "");
  return html`<details open=${Boolean(chosen)}>
    <summary>A file that is on the server already</summary>
    <div class="field">
      <label for="data-path">Its path</label>
      <input id="data-path" type="text" autocomplete="off" spellcheck=${false} value=${text} onInput=${(e) => {
        setText(e.target.value);
        onPick(e.target.value.trim());
      }} aria-invalid=${text && problems.length ? "true" : undefined} aria-describedby="data-path-hint" />
      <span id="data-path-hint" class="hint">
        It must lie in a folder that the server allows (<code>rlhf serve --data DIR</code>).
      </span>
      ${text && html`<${Wrong} problems=${problems} id="data-path-error" />`}
    </div>
  </details>`;
}

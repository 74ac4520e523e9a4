/** What the model generated: by step, with search and sort; groups, scores, advantages, KL per token as color. */
import { getSamples, getTokens } from "../endpoints.js";
import { number } from "../format.js";
import { useResource, useSettled } from "../hooks.js";
import { html, useEffect, useMemo, useRef, useState } from "../html.js";
import { Button, Empty, Failure, Loading, Talk } from "../ui.js";

/** @import * as T from "../types.js" */

const PAGE = 48;
const MOST_OPTIONS = 200; // of a list to choose a step from; beyond, its number is typed
const MOST = 1000; // that the server gives at once
const SHADES = [0.05, 0.2, 0.6, 1.5]; // nats from which a token is tinted, and more so

/** @param {{ id: string; known: Record<string, number[]>; query: URLSearchParams }} props */
export function Samples({ id, known, query }) {
  const [kind, setKind] = useState("step");
  const [step, setStep] = useState(query.get("step") ? Number(query.get("step")) : undefined);
  const [text, setText] = useState("");
  const [sort, setSort] = useState("group");
  const [order, setOrder] = useState("desc");
  const [shown, setShown] = useState(PAGE);
  const [only, setOnly] = useState(query.get("sample")); // its group alone is shown: it may be any of thousands
  const q = useSettled(text);
  const steps = known[kind] || [];
  const chosen = step ?? steps.at(-1);
  useEffect(() => {
    if (step === undefined) setStep(chosen);
  }, [step, chosen]); // stays while more steps come
  useEffect(() => setShown(PAGE), [kind, chosen, q, sort, order]);
  /** @param {number | undefined} next undefined: the newest */
  const pick = (next) => {
    setStep(next);
    setOnly(null);
  };
  const ask = { kind, step: chosen, q, limit: shown, offset: 0, ...(sort === "group" ? {} : { sort, order }) };
  const { data, error, loading, reload } = useResource(
    (signal) =>
      !steps.length
        ? Promise.resolve(null)
        : only
          ? groupOf(id, { kind, step: chosen }, only, signal)
          : getSamples(id, ask, signal),
    [id, ask, only, steps.length > 0],
  );
  const [kept, setKept] = useState(/** @type {T.SamplePage | null} */ (null));
  useEffect(() => {
    if (data) setKept(data);
  }, [data]);
  if (!known.step.length && !known.eval.length)
    return html`<${Empty} title="No samples yet">
      <p>Completions are recorded with their scores (logging.samples_every).</p>
    <//>`;
  const page = data || kept;
  return html`<div class="stack">
    <div class="filters">
      ${
        known.eval.length > 0 &&
        html`<div class="chips" role="group" aria-label="Kind">
          ${[
            ["step", "Training"],
            ["eval", "Evaluation"],
          ].map(
            ([one, title]) =>
              html`<button type="button" class="chip" aria-pressed=${kind === one} onClick=${() => {
                setKind(one);
                pick(undefined);
              }}>
                ${title}
              </button>`,
          )}
        </div>`
      }
      <${StepPicker} steps=${steps} chosen=${chosen} onPick=${pick} />
      ${
        !only &&
        html`
          <input type="search" class="inline" placeholder="Search prompts and completions"
            aria-label="Search prompts and completions" value=${text}
            onInput=${(e) => setText(e.target.value)} />
          <label class="check">
            Sort by <select class="inline" value=${sort} onChange=${(e) => setSort(e.target.value)}>
              ${["group", "reward", "advantage", "tokens", ...(page?.rewards || [])].map(
                (one) => html`<option value=${one} selected=${sort === one}>${one}</option>`,
              )}
            </select>
          </label>
          ${
            sort !== "group" &&
            html`<${Button} slim onClick=${() => setOrder(order === "desc" ? "asc" : "desc")}>
              ${order === "desc" ? "Highest first" : "Lowest first"}
            <//>`
          }
        `
      }
    </div>
    ${error && html`<${Failure} error=${error} again=${reload} />`}
    ${!page && loading && html`<${Loading} lines=${3} height=${140} />`}
    ${!steps.length && html`<${Empty} title="No samples of this kind" />`}
    ${
      page &&
      steps.length > 0 &&
      html`
        <${Caption} page=${page} only=${only} onAll=${() => setOnly(null)} />
        ${
          page.samples.length === 0
            ? only
              ? ""
              : html`<${Empty} title="No matches"><p>No prompt or completion contains this text.</p><//>`
            : html`<${Groups} page=${page} run=${id} grouped=${only !== null || sort === "group"} marked=${only} />`
        }
        ${
          !only &&
          page.total > page.samples.length &&
          html`<div class="row">
            ${
              shown < MOST &&
              html`<${Button} disabled=${loading} onClick=${() => setShown(Math.min(shown + PAGE, MOST))}>Show more<//>`
            }
            <span class="small muted">
              ${page.samples.length} of ${number(page.total)}${shown < MOST ? "" : "; search or sort to see others"}
            </span>
          </div>`
        }
      `
    }
  </div>`;
}

/**
 * What is shown, and of which step.
 * @param {{ page: T.SamplePage; only: string | null; onAll: () => void }} props
 */
function Caption({ page, only, onAll }) {
  const where = `${page.kind === "eval" ? "the evaluation at " : ""}step ${number(page.step)}`;
  if (!only) return html`<p class="small muted" role="status">${number(page.total)} completions of ${where}</p>`;
  const words = page.samples.length
    ? `The ${number(page.samples.length)} completions for the prompt of sample ${only}, ${where}`
    : `${where} has no sample ${only}`;
  return html`<div class="row">
    <p class="small muted" role="status">${words}</p><${Button} slim onClick=${onAll}>Show all<//>
  </div>`;
}

/**
 * The page of one sample's group; without samples if the step does not have it.
 * @param {string} run
 * @param {Record<string, unknown>} query
 * @param {string} id
 * @param {AbortSignal} signal
 */
async function groupOf(run, query, id, signal) {
  for (let offset = 0; ; offset += MOST) {
    const page = await getSamples(run, { ...query, limit: MOST, offset }, signal);
    const found = page.samples.find((sample) => sample.id === id);
    if (found) return getSamples(run, { ...query, group: found.group, limit: MOST }, signal);
    if (offset + MOST >= page.total) return { ...page, samples: [] };
  }
}

/** @param {{ steps: number[]; chosen: number | undefined; onPick: (step: number | undefined) => void }} props */
function StepPicker({ steps, chosen, onPick }) {
  const place = steps.indexOf(chosen ?? -1);
  /** @param {number} wanted */
  const nearest = (wanted) =>
    steps.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best), steps[0]);
  /** @param {{ target: HTMLInputElement }} event */
  const pick = (event) => {
    const wanted = Number(event.target.value);
    onPick(Number.isFinite(wanted) ? nearest(wanted) : chosen);
  };
  return html`<div class="row">
    <${Button} slim disabled=${place <= 0} onClick=${() => onPick(steps[place - 1])} aria-label="Earlier step">‹<//>
    <label class="check">
      Step ${
        steps.length > MOST_OPTIONS
          ? html`<${StepField} chosen=${chosen} onChange=${pick} />`
          : html`<select class="inline" onChange=${pick}>
            ${steps.map((one) => html`<option value=${one} selected=${one === chosen}>${one}</option>`)}
          </select>`
      }
    </label>
    <${Button} slim disabled=${place < 0 || place >= steps.length - 1} onClick=${() => onPick(steps[place + 1])}
      aria-label="Later step">
      ›
    <//>
    ${
      place < steps.length - 1 &&
      html`<${Button} slim onClick=${() => onPick(steps.at(-1))}>Newest (${number(steps.at(-1))})<//>`
    }
  </div>`;
}

/** @param {{ chosen: number | undefined; onChange: (event: any) => void }} props */
function StepField({ chosen, onChange }) {
  const [text, setText] = useState(String(chosen));
  useEffect(() => setText(String(chosen)), [chosen]);
  return html`<input type="text" class="inline short" inputmode="numeric" value=${text}
    onInput=${(e) => setText(e.target.value)} onChange=${onChange} />`;
}

/** @param {{ page: T.SamplePage; run: string; grouped: boolean; marked: string | null }} props */
function Groups({ page, run, grouped, marked }) {
  const groups = useMemo(() => {
    if (!grouped) return page.samples.map((sample) => [sample]);
    /** @type {Map<number, T.Sample[]>} */
    const found = new Map();
    for (const sample of page.samples) found.set(sample.group, [...(found.get(sample.group) || []), sample]);
    return [...found.values()];
  }, [page, grouped]);
  return html`<div class="stack">
    ${groups.map(
      (samples) => html`<section class="card group" key=${samples[0].id} aria-label="Prompt ${samples[0].group}">
        <${Talk} messages=${samples[0].prompt} />
        <div class="answers">
          ${samples.map(
            (sample) =>
              html`<${Completion} key=${sample.id} sample=${sample} page=${page} run=${run}
                marked=${sample.id === marked} />`,
          )}
        </div>
      </section>`,
    )}
  </div>`;
}

/** @param {{ sample: T.Sample; page: T.SamplePage; run: string; marked: boolean }} props */
function Completion({ sample, page, run, marked }) {
  const [open, setOpen] = useState(marked);
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    if (marked) box.current?.scrollIntoView({ block: "center" });
  }, [marked]);
  /** @param {string} name */
  const isTotal = (name) => page.samples.every((one) => one.rewards[name] === one.reward);
  const names = page.rewards.filter((name) => !isTotal(name));
  const advantage = sample.advantage ?? 0;
  const direction = advantage > 0.05 ? "up" : advantage < -0.05 ? "down" : "";
  return html`<article class="answer ${marked ? "marked" : ""}" ref=${box} aria-label="Completion ${sample.id}">
    <div class="scores">
      ${
        sample.valid
          ? html`<span>reward <b>${number(sample.reward)}</b></span>`
          : html`<span class="state failed">no score</span>`
      }
      ${
        sample.advantage !== null &&
        html`<span class="adv ${direction}">
          advantage ${advantage > 0 ? "+" : ""}${number(sample.advantage)}
        </span>`
      }
      ${names.map((name) => html`<span>${name} <b>${number(sample.rewards[name])}</b></span>`)}
    </div>
    ${
      open
        ? html`<${Tokens} sample=${sample} page=${page} run=${run} />`
        : html`<div class="text" tabindex="0">${sample.completion || html`<span class="muted">(empty)</span>`}</div>`
    }
    <div class="row between">
      <span class="small muted">
        ${number(sample.tokens)} tokens${sample.finish_reason === "length" ? ", truncated" : ""} · ${sample.id}
      </span>
      <${Button} slim kind="quiet" onClick=${() => setOpen(!open)} aria-pressed=${open ? "true" : "false"}>Tokens<//>
    </div>
  </article>`;
}

/** @param {number} value */
function shade(value) {
  const level = SHADES.filter((limit) => Math.abs(value) >= limit).length;
  return level ? `${value > 0 ? "q" : "n"}${level}` : "";
}

/** @param {{ sample: T.Sample; page: T.SamplePage; run: string }} props */
function Tokens({ sample, page, run }) {
  const { data, error } = useResource(
    (signal) => getTokens(run, { step: page.step, kind: page.kind, sample: sample.id }, signal),
    [sample.id, page.step, page.kind],
  );
  if (error) return html`<div class="text">${sample.completion}</div><${Failure} error=${error} />`;
  if (!data) return html`<${Loading} lines=${2} height=${20} />`;
  const values = data.kl || data.logprobs.map((value) => -value);
  const what = data.kl ? "KL against the reference" : "surprisal (−log-probability); no reference recorded";
  const pieces = data.pieces || data.tokens.map((token) => `${token} `);
  return html`
    <div class="tokens text" tabindex="0" aria-label="Tokens, tinted by ${what}">
      ${pieces.map(
        (piece, i) => html`
          <span class=${shade(values[i])}
            title="${number(values[i])} nats, log-probability ${number(data.logprobs[i])}">
            ${piece || "·"}
          </span>`,
      )}
    </div>
    <p class="small muted">Tinted by ${what}; hover for the number.</p>
  `;
}

/** The trained model beside its base: the same question to both. */
import { ApiError, events, isAbort } from "../api.js";
import { runAt } from "../endpoints.js";
import { Wrong } from "../field.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { Button, Failure, Notice, Talk } from "../ui.js";

const MOST_TOKENS = 4096;
/** @import * as T from "../types.js" */
/** @typedef {"trained" | "base"} Side */
/** @typedef {Record<Side, T.Message[]>} Talks */
/**
 * @typedef {object} TypedProps
 * @property {string} id
 * @property {string} title
 * @property {string} [hint]
 * @property {string} value
 * @property {(text: string) => void} onInput
 * @property {string | null} wrong
 */

const SIDES = /** @type {[Side, object | string, string][]} */ ([
  ["trained", "Trained", "Trained"],
  ["base", html`Base (<code>policy</code>)`, "Base (policy)"],
]);

/**
 * [the number that was typed, or null; what is wrong with it]; both `0.7` and `0,7` are accepted.
 * @param {string} text
 * @param {{ least: number; most: number; integer?: boolean }} bounds
 * @returns {[number, null] | [null, string]}
 */
function typedNumber(text, { least, most, integer }) {
  const value = Number(text.trim().replace(",", "."));
  const right = text.trim() !== "" && value >= least && value <= most && (!integer || Number.isInteger(value));
  return right ? [value, null] : [null, `${integer ? "An integer" : "A number"} from ${least} to ${most}.`];
}

/** @param {{ id: string }} props */
export function Chat({ id }) {
  const [talks, setTalks] = useState(/** @type {Talks} */ ({ trained: [], base: [] }));
  const [text, setText] = useState("");
  const [system, setSystem] = useState("");
  const [temperature, setTemperature] = useState("1.0");
  const [longest, setLongest] = useState("256");
  const [note, setNote] = useState("");
  const [missing, setMissing] = useState(/** @type {string | null} */ (null));
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const [busy, setBusy] = useState(false);
  const stop = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => stop.current?.abort(), []);
  const [warmth, warmthWrong] = typedNumber(temperature, { least: 0, most: 10 });
  const [length, lengthWrong] = typedNumber(longest, { least: 1, most: MOST_TOKENS, integer: true });
  const wrong = warmthWrong || lengthWrong;
  /** @type {(who: Side, piece: string) => void} */
  const add = (who, piece) =>
    setTalks((old) => {
      const turns = [...old[who]];
      const last = turns.at(-1);
      if (last?.role === "assistant") turns[turns.length - 1] = { ...last, content: last.content + piece };
      else turns.push({ role: "assistant", content: piece });
      return { ...old, [who]: turns };
    });
  /** @param {Event} event */
  const send = async (event) => {
    event.preventDefault();
    if (!text.trim() || busy || wrong) return;
    const turn = { role: "user", content: text };
    const body = {
      trained: [...talks.trained, turn],
      base: missing ? null : [...talks.base, turn],
      max_tokens: length,
      temperature: warmth,
      system: system.trim() || null,
    };
    setTalks({ trained: body.trained, base: body.base || [] });
    setText("");
    setError(null);
    setBusy(true);
    setNote("sending");
    stop.current = new AbortController();
    const { signal } = stop.current;
    const before = talks;
    let answered = false;
    /** @type {ApiError | null} */
    let failed = null;
    try {
      for await (const { event: kind, data } of events(`${runAt(id)}/chat`, { method: "POST", body, signal })) {
        if (kind === "state") setNote(data.message);
        if (kind === "piece") {
          answered = true;
          setNote("");
          add(data.who, data.text);
        }
        if (kind === "missing") {
          setMissing(data.message);
          setTalks((old) => ({ ...old, [data.who]: [] }));
        }
        if (kind === "error") failed = new ApiError(0, data.code, data.message);
      }
    } catch (problem) {
      if (!isAbort(problem)) failed = ApiError.of(problem);
    }
    setError(failed);
    /** @type {(who: Side, turns: T.Message[]) => T.Message[]} */
    const settled = (who, turns) => (turns.at(-1)?.role === "user" ? before[who] : turns); // without a reply: as before
    setTalks((old) => ({ trained: settled("trained", old.trained), base: settled("base", old.base) }));
    if (!answered) setText((typed) => typed || turn.content);
    setBusy(false);
    setNote("");
  };
  const clear = () => setTalks({ trained: [], base: [] });
  /** @param {KeyboardEvent} event */
  const keys = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  return html`<div class="stack">
    <div class="sides">
      ${SIDES.map(
        ([who, title, label]) => html`<section class="card stack" aria-label=${label} aria-live="polite">
          <h2 class="minor">${title}</h2>
          ${
            who === "base" && missing
              ? html`<${Notice}>The base model is no longer available: ${missing}<//>`
              : talks[who].length
                ? html`<${Talk} messages=${talks[who]} full />`
                : html`<p class="muted">Send a message below; both models reply.</p>`
          }
        </section>`,
      )}
    </div>
    ${error && html`<${Failure} error=${error} />`}
    <form class="card stack" onSubmit=${send}>
      <div class="field">
        <label for="chat-text">Message</label>
        <textarea id="chat-text" rows="3" value=${text} onInput=${(e) => setText(e.target.value)}
          onKeyDown=${keys}></textarea>
      </div>
      <div class="row between">
        <span class="live" role="status">${note}</span>
        <span class="row">
          ${talks.trained.length > 0 && html`<${Button} kind="quiet" disabled=${busy} onClick=${clear}>New chat<//>`}
          ${
            busy
              ? html`<${Button} onClick=${() => stop.current?.abort()}>Stop<//>`
              : html`<button class="button primary" disabled=${!text.trim() || wrong}>Send</button>`
          }
        </span>
      </div>
      <details>
        <summary>Generation settings</summary>
        <div class="settings">
          <div class="field">
            <label for="chat-system">System prompt</label>
            <input id="chat-system" type="text" value=${system} onInput=${(e) => setSystem(e.target.value)} />
          </div>
          <${Typed} id="chat-temperature" title="Temperature" hint="0: greedy decoding."
            value=${temperature} onInput=${setTemperature} wrong=${warmthWrong} />
          <${Typed} id="chat-longest" title="Max completion length (tokens)" value=${longest} onInput=${setLongest}
            wrong=${lengthWrong} />
        </div>
      </details>
    </form>
  </div>`;
}

/** @param {TypedProps} props */
function Typed({ id, title, hint, value, onInput, wrong }) {
  return html`<div class="field">
    <label for=${id}>${title}</label>
    <input id=${id} type="text" inputmode="decimal" value=${value} onInput=${(e) => onInput(e.target.value)}
      aria-invalid=${wrong ? "true" : undefined} aria-describedby="${id}-error" />
    ${hint && html`<span class="hint">${hint}</span>`}
    <${Wrong} id="${id}-error" problems=${wrong ? [{ message: wrong }] : []} />
  </div>`;
}

/** The trained model beside its base: the same question to both. */
import { events } from "../api.js";
import { Wrong } from "../field.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { Button, Failure, Notice, Talk } from "../ui.js";

const MOST_TOKENS = 4096;
const SIDES = [
  ["trained", "After training"],
  ["base", "Before"],
];

/** [what was typed as a number, or null; what is wrong with it]: both `0.7` and `0,7` are read. */
function typedNumber(text, { least, most, whole }) {
  const value = Number(text.trim().replace(",", "."));
  const right = text.trim() !== "" && value >= least && value <= most && (!whole || Number.isInteger(value));
  return right ? [value, null] : [null, `A ${whole ? "whole number" : "number"} from ${least} to ${most}.`];
}

export function Chat({ id }) {
  const [talks, setTalks] = useState({ trained: [], base: [] });
  const [text, setText] = useState("");
  const [system, setSystem] = useState("");
  const [temperature, setTemperature] = useState("1.0");
  const [longest, setLongest] = useState("256");
  const [note, setNote] = useState("");
  const [missing, setMissing] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const stop = useRef(null);
  useEffect(() => () => stop.current?.abort(), []);
  const [warmth, warmthWrong] = typedNumber(temperature, { least: 0, most: 10 });
  const [length, lengthWrong] = typedNumber(longest, { least: 1, most: MOST_TOKENS, whole: true });
  const wrong = warmthWrong || lengthWrong;
  const add = (who, piece) =>
    setTalks((old) => {
      const turns = [...old[who]];
      const last = turns.at(-1);
      if (last?.role === "assistant") turns[turns.length - 1] = { ...last, content: last.content + piece };
      else turns.push({ role: "assistant", content: piece });
      return { ...old, [who]: turns };
    });
  const send = async (event) => {
    event?.preventDefault();
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
    setNote("asking");
    stop.current = new AbortController();
    const before = talks;
    let answered = false,
      failed = null;
    try {
      for await (const { event: kind, data } of events(`/runs/${encodeURIComponent(id)}/chat`, {
        method: "POST",
        body,
        signal: stop.current.signal,
      })) {
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
        if (kind === "error") failed = data;
      }
    } catch (problem) {
      if (problem.name !== "AbortError") failed = problem;
    }
    setError(failed);
    const turnOf = (who, turns) => (turns.at(-1)?.role === "user" ? before[who] : turns); // unanswered: as if not asked
    setTalks((old) => ({ trained: turnOf("trained", old.trained), base: turnOf("base", old.base) }));
    if (!answered) setText((typed) => typed || turn.content);
    setBusy(false);
    setNote("");
  };
  const clear = () => setTalks({ trained: [], base: [] });
  const keys = (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) send(e);
  };
  return html`<div class="stack">
    <div class="sides">
      ${SIDES.map(
        ([who, title]) => html`<section class="card stack" aria-label=${title} aria-live="polite">
          <h2 class="minor">${title}</h2>
          ${
            who === "base" && missing
              ? html`<${Notice}>The model that it began from cannot be asked any more: ${missing}<//>`
              : talks[who].length
                ? html`<${Talk} messages=${talks[who]} whole />`
                : html`<p class="muted">Ask something below; both answer.</p>`
          }
        </section>`,
      )}
    </div>
    ${error && html`<${Failure} error=${error} />`}
    <form class="card stack" onSubmit=${send}>
      <div class="field">
        <label for="chat-text">Your turn</label>
        <textarea id="chat-text" rows="3" value=${text} onInput=${(e) => setText(e.target.value)}
          onKeyDown=${keys}></textarea>
      </div>
      <div class="row between">
        <span class="live" role="status">${note}</span>
        <span class="row">
          ${talks.trained.length > 0 && html`<${Button} kind="quiet" disabled=${busy} onClick=${clear}>Begin anew<//>`}
          ${
            busy
              ? html`<${Button} onClick=${() => stop.current?.abort()}>Stop<//>`
              : html`<button class="button primary" disabled=${!text.trim() || wrong}>Send</button>`
          }
        </span>
      </div>
      <details>
        <summary>How they answer</summary>
        <div class="settings">
          <div class="field">
            <label for="chat-system">System turn</label>
            <input id="chat-system" type="text" value=${system} onInput=${(e) => setSystem(e.target.value)} />
          </div>
          <${Typed} id="chat-temperature" title="Temperature" hint="0: always the likeliest word."
            value=${temperature} onInput=${setTemperature} wrong=${warmthWrong} />
          <${Typed} id="chat-longest" title="Longest answer, in tokens" value=${longest} onInput=${setLongest}
            wrong=${lengthWrong} />
        </div>
      </details>
    </form>
  </div>`;
}

function Typed({ id, title, hint, value, onInput, wrong }) {
  return html`<div class="field">
    <label for=${id}>${title}</label>
    <input id=${id} type="text" inputmode="decimal" value=${value} onInput=${(e) => onInput(e.target.value)}
      aria-invalid=${wrong ? "true" : undefined} aria-describedby="${id}-error" />
    ${hint && html`<span class="hint">${hint}</span>`}
    <${Wrong} id="${id}-error" problems=${wrong ? [{ message: wrong }] : []} />
  </div>`;
}

/** Choosing a model: those that the server found, or a path, an address or a hub id. */
import { request } from "../api.js";
import { isMistake, Wrong } from "../field.js";
import { bytes, number, parameters } from "../format.js";
import { useResource } from "../hooks.js";
import { html, useState } from "../html.js";

const SHOWN = 8;

const TEMPLATE = { true: "chat template", false: "no chat template" };

export function useModels() {
  return useResource((signal) => request("/models", { signal }), []);
}

/** `models` are those to choose from; `onPick` gets a path, or null where nothing is chosen. */
export function Picker({ name, title, help, models, value, onPick, wrong, late = true, roots, optional }) {
  const listed = models.some((model) => model.path === value);
  const [typed, setTyped] = useState(value && !listed ? value : "");
  const [text, setText] = useState("");
  const fitting = models.filter((m) => `${m.name} ${m.path}`.toLowerCase().includes(text.toLowerCase()));
  const chosenFirst = fitting.filter((m) => m.path === value).concat(fitting.filter((m) => m.path !== value));
  const errorId = `${name}-error`;
  return html`<fieldset class="card stack" aria-describedby=${wrong.length ? errorId : undefined}>
    <legend class="hidden-text">${title}</legend>
    <div><h2>${title}</h2><p class="muted">${help}</p></div>
    ${
      models.length > SHOWN &&
      html`<input type="search" placeholder="Search ${models.length} models" aria-label="Search: ${title}" value=${text}
        onInput=${(e) => setText(e.target.value)} />`
    }
    <div class="choices">
      ${chosenFirst.slice(0, SHOWN).map(
        (model) =>
          html`<${Choice} key=${model.path} name=${name} model=${model} checked=${model.path === value} onPick=${() => {
            setTyped("");
            onPick(model.path);
          }} />`,
      )}
      ${
        optional &&
        html`<label class="choice">
          <input type="radio" name=${name} checked=${!value} onChange=${() => {
            setTyped("");
            onPick(null);
          }} />
          <span>
            <span class="name">None</span>
            <span class="small muted">Reward functions alone judge, or a teacher does.</span>
          </span>
        </label>`
      }
    </div>
    ${
      fitting.length > SHOWN &&
      html`<p class="small muted">${number(fitting.length - SHOWN)} more; search for them by name.</p>`
    }
    ${
      models.length === 0 &&
      html`<p class="muted">
        None was found ${
          roots.length
            ? html`under ${roots.map((root) => html`<code>${root}</code> `)}`
            : html`: the server was started without <code>--models DIR</code>`
        }
        . A path or a hub id can be given.
      </p>`
    }
    <div class="field">
      <label for="${name}-path">Or a path, an address or a hub id</label>
      <input id="${name}-path" type="text" autocomplete="off" spellcheck=${false} placeholder="organisation/model"
        value=${typed} aria-invalid=${isMistake(wrong, late) && !listed ? "true" : undefined}
        aria-describedby=${wrong.length ? errorId : undefined} onInput=${(e) => {
          setTyped(e.target.value);
          onPick(e.target.value.trim() || null);
        }} />
      <${Wrong} problems=${wrong} id=${errorId} late=${late} />
    </div>
  </fieldset>`;
}

function Choice({ name, model, checked, onPick }) {
  const facts = [
    parameters(model.parameters),
    model.architecture,
    model.dtype,
    model.bytes ? bytes(model.bytes) : null,
    model.vocabulary ? `vocabulary ${number(model.vocabulary)}` : null,
    model.context ? `context ${number(model.context)} tokens` : null,
    TEMPLATE[model.chat_template],
    model.chat_template === false && name !== "reward" ? "prompts go in as they are" : null,
    model.kind === "adapter" ? `on ${model.base}` : null,
    model.run ? `made by run ${model.run}` : null,
  ].filter(Boolean);
  return html`<label class="choice ${model.usable ? "" : "off"}">
    <input type="radio" name=${name} checked=${checked} disabled=${!model.usable} onChange=${onPick} />
    <span>
      <span class="name">${model.name}</span>
      <span class="small muted">${facts.join(" · ")}</span>
      <span class="small muted mono">${model.path}</span>
      ${!model.usable && html`<span class="small error-text">${model.problem}</span>`}
    </span>
  </label>`;
}

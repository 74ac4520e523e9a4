/** Choosing a model: one that the server found, or a path, a URL or a hub id. */
import { getModels } from "../endpoints.js";
import { isMistake, Wrong } from "../field.js";
import { bytes, number, parameters } from "../format.js";
import { useResource } from "../hooks.js";
import { html, useState } from "../html.js";

/** @import * as T from "../types.js" */

const SHOWN = 8;

/**
 * `models` are those to choose from; `onPick` gets a path, or null if nothing is chosen.
 * @typedef {object} PickerProps
 * @property {string} name
 * @property {string} title
 * @property {string} help
 * @property {T.FoundModel[]} models
 * @property {string | undefined} value
 * @property {(path: string | null) => void} onPick
 * @property {T.Problem[]} wrong
 * @property {boolean} [late]
 * @property {string[]} roots where the server looks
 * @property {boolean} [optional]
 */

export function useModels() {
  return useResource(getModels, []);
}

/** @param {PickerProps} props */
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
            <span class="small muted">Reward functions or a teacher only.</span>
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
        ${
          roots.length
            ? html`No models found under ${roots.map((root) => html`<code>${root}</code> `)}`
            : html`No models listed: the server was started without <code>--models DIR</code>.${" "}`
        }
        Enter a path or a hub id.
      </p>`
    }
    <div class="field">
      <label for="${name}-path">Or a path, a URL or a hub id</label>
      <input id="${name}-path" type="text" autocomplete="off" spellcheck=${false} placeholder="organization/model"
        value=${typed} aria-invalid=${isMistake(wrong, late) && !listed ? "true" : undefined}
        aria-describedby=${wrong.length ? errorId : undefined} onInput=${(e) => {
          setTyped(e.target.value);
          onPick(e.target.value.trim() || null);
        }} />
      <${Wrong} problems=${wrong} id=${errorId} late=${late} />
    </div>
  </fieldset>`;
}

/** @param {{ name: string; model: T.FoundModel; checked: boolean; onPick: () => void }} props */
function Choice({ name, model, checked, onPick }) {
  const facts = [
    parameters(model.parameters),
    model.architecture,
    model.dtype,
    model.bytes ? bytes(model.bytes) : null,
    model.vocabulary ? `vocabulary ${number(model.vocabulary)}` : null,
    model.context ? `context ${number(model.context)} tokens` : null,
    model.chat_template ? "chat template" : "no chat template",
    !model.chat_template && name !== "reward" ? "prompts are used as they are" : null,
    model.kind === "adapter" ? `on ${model.base}` : null,
    model.run ? `from run ${model.run}` : null,
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

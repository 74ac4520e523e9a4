/** One setting as a form field: label, input, help, range, default and what is wrong with it. */
import { html, useEffect, useState } from "./html.js";
import { labelOf } from "./labels.js";
import { defaultText, parse } from "./schema.js";
import { getIn, shown } from "./tree.js";
import { Icon, Words } from "./ui.js";

/** @import * as T from "./types.js" */

/** @typedef {(path: string, value: unknown) => void} OnChange undefined: the default */
/**
 * @typedef {object} FieldProps
 * @property {T.FormField} field
 * @property {T.Tree} tree
 * @property {T.Problem[]} problems
 * @property {T.Detail[]} [warnings]
 * @property {OnChange} onChange
 * @property {boolean} [big] whether it is one of those that matter most
 */
/** @typedef {Record<string, string | undefined>} Attributes */
/** @typedef {{ field: T.FormField; value: any; common: Attributes; onChange: OnChange }} InputProps */

/**
 * @template {T.Detail} P
 * @param {P[]} problems
 * @param {string} path
 * @returns {P[]}
 */
export function problemsAt(problems, path) {
  return problems.filter((problem) => problem.path === path || problem.path.startsWith(`${path}.`));
}

/**
 * The problems of one field; where a required one's section is missing, the section's too.
 * @param {T.Problem[]} problems
 * @param {{ path: string; required?: boolean }} field
 */
export function problemsOf(problems, { path, required }) {
  return problems.filter(
    (problem) => problemsAt([problem], path).length || (required && path.startsWith(`${problem.path}.`)),
  );
}

/**
 * What is wrong, beside the field. A missing value is shown as a mistake only once the step was passed (`late`).
 * @param {{ problems: { message: string; missing?: boolean }[]; id?: string; late?: boolean }} props
 */
export function Wrong({ problems, id, late = true }) {
  if (!problems.length) return null;
  const text = html`<${Words} text=${problems.map((problem) => problem.message).join("; ")} />`;
  return isMistake(problems, late)
    ? html`<span class="error" id=${id} role="alert">${text}</span>`
    : html`<span class="hint" id=${id}>${text}</span>`;
}

/**
 * What is allowed and seldom meant: shown calmly.
 * @param {{ warnings: T.Detail[]; id: string }} props
 */
export function Unusual({ warnings, id }) {
  return (
    warnings.length > 0 &&
    html`<span class="unusual" id=${id}>
      <${Icon} name="info" /><span><${Words} text=${warnings.map((one) => one.message).join("; ")} /></span>
    </span>`
  );
}

/** @param {{ missing?: boolean }[]} problems */
export function isMistake(problems, late = true) {
  return problems.some((problem) => late || !problem.missing);
}

/**
 * @param {FieldProps} props
 */
export function Field({ field, tree, problems, warnings = [], onChange, big }) {
  const { path } = field;
  const value = getIn(tree, path);
  const wrong = problemsOf(problems, field);
  const unusual = problemsAt(warnings, path);
  const id = `f-${path.replaceAll(".", "-")}`;
  const about = `${id}-hint${wrong.length ? ` ${id}-error` : ""}${unusual.length ? ` ${id}-unusual` : ""}`;
  const common = { id, "aria-describedby": about, "aria-invalid": wrong.length ? "true" : undefined };
  const fallback = defaultText(field);
  const facts = [
    field.choices ? "" : field.range,
    field.recommended ? `recommended ${field.recommended.map(shown).join(" to ")}` : "",
    fallback && !field.required && field.kind !== "section" ? `default ${fallback}` : "",
    big ? "" : path,
  ]
    .filter(Boolean)
    .join(" · ");
  return html`<div class="field">
    ${
      field.kind === "switch" || field.kind === "section"
        ? html`<span class="check">
          <${Switch} field=${field} value=${value} common=${common} onChange=${onChange} />
          <label for=${id}>${labelOf(path)}</label>
        </span>`
        : html`
          <label for=${id}>${labelOf(path)}</label>
          <${Input} field=${field} value=${value} common=${common} onChange=${onChange} />
        `
    }
    <span class="hint" id="${id}-hint">
      <${Words} text=${field.help} />${facts && html`<span class="facts-line">${facts}</span>`}
    </span>
    <${Unusual} warnings=${unusual} id="${id}-unusual" />
    <${Wrong} problems=${wrong} id="${id}-error" />
  </div>`;
}

/** @param {InputProps} props */
function Switch({ field, value, common, onChange }) {
  if (field.kind === "section") {
    return html`<input type="checkbox" ...${common} checked=${Boolean(value)}
      onChange=${(e) => onChange(field.path, e.target.checked ? {} : undefined)} />`;
  }
  const usual = Boolean(field.default);
  const on = value === undefined ? usual : value;
  return html`<input type="checkbox" ...${common} checked=${on}
    onChange=${(e) => onChange(field.path, e.target.checked === usual ? undefined : e.target.checked)} />`;
}

/** @param {InputProps} props */
function Input({ field, value, common, onChange }) {
  if (field.kind === "choice") {
    const chosen = value === undefined ? field.default : value;
    const choices = field.choices ?? [];
    /** @param {{ target: HTMLSelectElement }} event */
    const set = (event) => {
      const option = choices.find((one) => String(one) === event.target.value);
      onChange(field.path, option === field.default ? undefined : option);
    };
    return html`<select ...${common} onChange=${set}>
      ${field.nullable && html`<option value="" selected=${chosen === null || chosen === undefined}>–</option>`}
      ${choices.map(
        (option) => html`<option value=${String(option)} selected=${option === chosen}>${String(option)}</option>`,
      )}
    </select>`;
  }
  return html`<${Typed} field=${field} value=${value} common=${common} onChange=${onChange} />`;
}

/** @param {InputProps} props */
function Typed({ field, value, common, onChange }) {
  const [text, setText] = useState(shown(value));
  useEffect(() => {
    if (parse(field, text) !== value && JSON.stringify(parse(field, text)) !== JSON.stringify(value))
      setText(shown(value === null ? undefined : value));
  }, [value]);
  /** @param {{ target: HTMLInputElement }} event */
  const typed = (event) => {
    setText(event.target.value);
    onChange(field.path, parse(field, event.target.value));
  };
  const keyboard = field.kind === "number" ? "decimal" : undefined;
  return html`<input type="text" ...${common} inputmode=${keyboard} autocomplete="off" spellcheck=${false}
    placeholder=${defaultText(field)} value=${text} onInput=${typed} />`;
}

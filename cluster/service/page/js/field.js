/** One setting as a form field: label, input, help, range, default and what is wrong with it. */
import { html, useEffect, useState } from "./html.js";
import { defaultText, parse } from "./schema.js";
import { getIn, shown } from "./tree.js";
import { Icon, Words } from "./ui.js";

const NAMES = {
  "algorithm.kl.coef": "KL coefficient",
  "sampling.n": "Answers for each prompt",
  "sampling.max_tokens": "Longest answer, in tokens",
  "train.steps": "Steps",
  "train.prompts_per_step": "Prompts a step",
  "train.learning_rate": "Learning rate",
  "sampling.temperature": "Temperature",
  "data.max_prompt_tokens": "Longest prompt, in tokens",
};

export function title(path) {
  if (NAMES[path]) return NAMES[path];
  const words =
    path
      .split(".")
      .slice(1)
      .filter((part) => !/^\d+$/.test(part))
      .join(", ")
      .replaceAll("_", " ") || path;
  return words[0].toUpperCase() + words.slice(1);
}

export function problemsAt(problems, path) {
  return problems.filter((problem) => problem.path === path || problem.path.startsWith(`${path}.`));
}

/** The problems of one field; where a required one's section is missing, the section's too. */
export function problemsOf(problems, { path, required }) {
  return problems.filter(
    (problem) => problemsAt([problem], path).length || (required && path.startsWith(`${problem.path}.`)),
  );
}

/** What is wrong, said beside it. What is only missing is no mistake until somebody has gone past it (`late`). */
export function Wrong({ problems, id, late = true }) {
  if (!problems.length) return null;
  const text = html`<${Words} text=${problems.map((problem) => problem.message).join("; ")} />`;
  return isMistake(problems, late)
    ? html`<span class="error" id=${id} role="alert">${text}</span>`
    : html`<span class="hint" id=${id}>${text}</span>`;
}

/** What a run may have but seldom should: said calmly, since it may be meant. */
export function Unusual({ warnings, id }) {
  return (
    warnings.length > 0 &&
    html`<span class="unusual" id=${id}>
      <${Icon} name="info" /><span><${Words} text=${warnings.map((one) => one.message).join("; ")} /></span>
    </span>`
  );
}

export function isMistake(problems, late = true) {
  return problems.some((problem) => late || !problem.missing);
}

/** `onChange(path, value)` gets `undefined` where the default is to hold. */
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
          <label for=${id}>${title(path)}</label>
        </span>`
        : html`
          <label for=${id}>${title(path)}</label>
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

function Input({ field, value, common, onChange }) {
  if (field.kind === "choice") {
    const chosen = value === undefined ? field.default : value;
    const set = (e) => {
      const option = field.choices.find((one) => String(one) === e.target.value);
      onChange(field.path, option === field.default ? undefined : option);
    };
    return html`<select ...${common} onChange=${set}>
      ${field.nullable && html`<option value="" selected=${chosen === null || chosen === undefined}>–</option>`}
      ${field.choices.map(
        (option) => html`<option value=${String(option)} selected=${option === chosen}>${String(option)}</option>`,
      )}
    </select>`;
  }
  return html`<${Typed} field=${field} value=${value} common=${common} onChange=${onChange} />`;
}

function Typed({ field, value, common, onChange }) {
  const [text, setText] = useState(shown(value));
  useEffect(() => {
    if (parse(field, text) !== value && JSON.stringify(parse(field, text)) !== JSON.stringify(value))
      setText(shown(value === null ? undefined : value));
  }, [value]);
  const typed = (e) => {
    setText(e.target.value);
    onChange(field.path, parse(field, e.target.value));
  };
  const keyboard = field.kind === "number" ? "decimal" : undefined;
  return html`<input type="text" ...${common} inputmode=${keyboard} autocomplete="off" spellcheck=${false}
    placeholder=${defaultText(field)} value=${text} onInput=${typed} />`;
}

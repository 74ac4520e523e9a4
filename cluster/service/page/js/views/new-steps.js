/** The four steps of a new run: their names, the step of a setting, the buttons at the foot of each. */
import { html } from "../html.js";

export const STEPS = [
  ["model", "Model"],
  ["data", "Dataset"],
  ["settings", "Settings"],
  ["review", "Review"],
];

const OF_MODEL = /^(policy|policy\.model|rewards|rewards\.\d+\.(model|path|url|type).*)$/;
const OF_DATA = /^data$|^data\.prompts|[/\\]|\.(jsonl|gz|parquet)\b/; // or a file's name

/**
 * The step on which a problem is fixed.
 * @param {string} path
 */
export function stepOf(path) {
  return OF_MODEL.test(path) ? "model" : OF_DATA.test(path) ? "data" : "settings";
}

/**
 * Back and continue, at the foot of a step.
 * @param {{ back?: string; next?: string; title?: string; children?: any }} props
 */
export function Foot({ back, next, title = "Continue", children }) {
  return html`<div class="foot">
    ${back ? html`<a class="button" href="#/new/${back}">Back</a>` : html`<span></span>`}
    ${children || html`<a class="button primary" href="#/new/${next}">${title}</a>`}
  </div>`;
}

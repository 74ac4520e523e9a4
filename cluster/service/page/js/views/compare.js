/** Several runs on one plot a metric, and where their settings differ. */
import { ApiError } from "../api.js";
import { Chart } from "../chart.js";
import { getCurves, getRun } from "../endpoints.js";
import { count, number } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { html, useMemo } from "../html.js";
import { leaves, shown } from "../tree.js";
import { Empty, Failure, Loading, Notice, State } from "../ui.js";

/** @import * as T from "../types.js" */
/** @typedef {T.RunDetails & { metrics: T.MetricColumns }} Compared */

const METRICS = [
  ["reward/mean", "Reward"],
  ["eval/reward_mean", "Reward on held-out prompts"],
  ["kl/mean", "KL, nats per token"],
  ["rollout/length_mean", "Length, tokens"],
  ["policy/entropy", "Entropy, nats"],
  ["policy/loss", "Loss"],
  ["policy/grad_norm", "Gradient norm"],
  ["advantage/zero_groups", "Zero-advantage groups"],
  ["throughput/tokens_per_s", "Tokens/s"],
];
const POINTS = 1500;

/**
 * @param {string[]} ids
 * @param {AbortSignal} signal
 */
async function load(ids, signal) {
  const keys = METRICS.map(([key]) => key);
  /** @type {(id: string) => Promise<Compared | null>} null: it does not exist */
  const one = async (id) => {
    try {
      const curves = getCurves(id, { points: POINTS, keys }, signal);
      const [details, metrics] = await Promise.all([getRun(id, signal), curves]);
      return { ...details, metrics };
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null;
      throw error;
    }
  };
  const found = await Promise.all(ids.map(one));
  return { runs: found.filter((run) => run !== null), missing: ids.filter((_, i) => found[i] === null) };
}

/** @param {{ ids: string[] }} props */
export function Compare({ ids }) {
  useTitle("Compare");
  const { data: found, error, reload } = useResource((signal) => load(ids, signal), [ids], { poll: 10000 });
  const data = found?.runs;
  const missing = found?.missing ?? [];
  const charts = useMemo(
    () =>
      data
        ? METRICS.map(([key, title]) => ({ title, ...joined(data, key) })).filter((chart) => chart.lines.length)
        : [],
    [data],
  );
  if (!ids.length)
    return html`<${Empty} title="Nothing to compare"><p>Pick runs in the <a href="#/runs">list</a>.</p><//>`;
  return html`<div class="stack wide">
    <h1>Compare ${count((data || ids).length, "run")}</h1>
    ${error && html`<${Failure} error=${error} again=${reload} />`}
    ${!data && !error && html`<${Loading} lines=${4} height=${120} />`}
    ${
      missing.length > 0 &&
      html`<${Notice} kind="warn">
        ${missing.map((id, i) => html`${i ? ", " : ""}<code>${id}</code>`)}${" "}
        ${missing.length === 1 ? "no longer exists." : "no longer exist."}
      <//>`
    }
    ${
      data &&
      data.length > 0 &&
      html`
        <div class="card flush">
          <table class="cards">
            <thead>
              <tr>
                <th scope="col">Run</th>
                <th scope="col">State</th>
                <th scope="col" class="number">Step</th>
                <th scope="col" class="number">Reward</th>
                <th scope="col" class="number">KL</th>
              </tr>
            </thead>
            <tbody>
              ${data.map(
                ({ run, metrics }, index) => html`<tr>
                  <td class="bare" data-label="">
                    <span class="key">
                      <span class="dot b${(index % 6) + 1}"></span>${" "}
                      <a href="#/runs/${encodeURIComponent(run.id)}">${label(run)}</a>
                    </span>
                  </td>
                  <td data-label="State"><${State} state=${run.state} /></td>
                  <td class="number" data-label="Step">${number(run.step)}</td>
                  <td class="number" data-label="Reward">${number(end(metrics, "reward/mean"))}</td>
                  <td class="number" data-label="KL">${number(end(metrics, "kl/mean"))}</td>
                </tr>`,
              )}
            </tbody>
          </table>
        </div>
        ${
          charts.length === 0
            ? html`<${Empty} title="No numbers yet"><p>None of these runs has recorded a step.</p><//>`
            : html`<div class="curves">
              ${charts.map((chart) => html`<${Chart} key=${chart.title} sync="compare" ...${chart} />`)}
            </div>`
        }
        <${Differences} runs=${data} />
      `
    }
  </div>`;
}

/** @param {T.Run} run */
function label(run) {
  return `${run.name} ${run.id.slice(-6)}`;
}

/**
 * @param {T.MetricColumns} metrics
 * @param {string} key
 */
function end(metrics, key) {
  return metrics.series[key]?.findLast((value) => value !== null);
}

/**
 * All runs' values of one key over the union of their steps.
 * @param {Compared[]} runs
 * @param {string} key
 */
function joined(runs, key) {
  const having = runs.filter((one) => end(one.metrics, key) !== undefined);
  const steps = [...new Set(having.flatMap((one) => one.metrics.step))].sort((a, b) => a - b);
  const lines = having.map((one) => {
    const at = new Map(one.metrics.step.map((step, i) => [step, one.metrics.series[key][i]]));
    const values = steps.map((step) => at.get(step) ?? null);
    return { label: label(one.run), values, color: runs.indexOf(one), points: key.startsWith("eval/") };
  });
  return { steps, lines };
}

/** @param {{ runs: Compared[] }} props */
function Differences({ runs }) {
  const trees = runs.map((one) => new Map(leaves(one.config || {})));
  const keys = [...new Set(trees.flatMap((tree) => [...tree.keys()]))].filter(
    (key) => new Set(trees.map((tree) => JSON.stringify(tree.get(key)))).size > 1,
  );
  if (runs.length < 2) return null;
  if (!keys.length) return html`<p class="muted">Their settings are the same.</p>`;
  return html`<section class="stack tight">
    <h2>Where the settings differ</h2>
    <div class="card flush scroll">
      <table>
        <thead>
          <tr><th scope="col">setting</th>${runs.map((one) => html`<th scope="col">${label(one.run)}</th>`)}</tr>
        </thead>
        <tbody>
          ${keys.map(
            (key) => html`<tr>
              <th scope="row" class="mono">${key}</th>
              ${trees.map((tree) => html`<td class="mono">${tree.has(key) ? shown(tree.get(key)) : "–"}</td>`)}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  </section>`;
}

/** Several runs on one plot a metric, and where their settings differ. */
import { request } from "../api.js";
import { Chart } from "../chart.js";
import { count, number } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { html, useMemo } from "../html.js";
import { leaves, shown } from "../tree.js";
import { Empty, Failure, Loading, Notice, State } from "../ui.js";

const METRICS = [
  ["reward/mean", "Reward"],
  ["eval/reward_mean", "Reward on held-out prompts"],
  ["kl/mean", "KL, nats per token"],
  ["rollout/length_mean", "Length, tokens"],
  ["policy/entropy", "Entropy, nats"],
  ["policy/loss", "Loss"],
  ["policy/grad_norm", "Gradient norm"],
  ["advantage/zero_groups", "Groups without advantage"],
  ["throughput/tokens_per_s", "Tokens a second"],
];
const POINTS = 1500;

async function load(ids, signal) {
  const keys = METRICS.map(([key]) => key);
  const asked = await Promise.allSettled(
    ids.map(async (id) => {
      const at = `/runs/${encodeURIComponent(id)}`;
      const [details, metrics] = await Promise.all([
        request(at, { signal }),
        request(`${at}/metrics`, { query: { format: "columns", points: POINTS, keys }, signal }),
      ]);
      return { ...details, metrics };
    }),
  );
  const failed = asked.flatMap(({ reason }, i) => (reason ? [{ id: ids[i], error: reason }] : []));
  const other = failed.find(({ error }) => error.status !== 404);
  if (other) throw other.error;
  return { runs: asked.flatMap(({ value }) => value || []), missing: failed.map(({ id }) => id) };
}

export function Compare({ ids }) {
  useTitle("Compare");
  const { data: found, error, reload } = useResource((signal) => load(ids, signal), [ids], { poll: 10000 });
  const data = found?.runs;
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
      found?.missing.length > 0 &&
      html`<${Notice} kind="warn">
        ${found.missing.map((id, i) => html`${i ? ", " : ""}<code>${id}</code>`)}${" "}
        ${found.missing.length === 1 ? "no longer exists." : "no longer exist."}
      <//>`
    }
    ${
      data?.length > 0 &&
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

function label(run) {
  return `${run.name} ${run.id.slice(-6)}`;
}

function end(metrics, key) {
  return (metrics.series[key] || []).findLast((value) => value !== null);
}

/** All runs' values of one key over the union of their steps. */
function joined(runs, key) {
  const having = runs
    .map((one, index) => [one, index])
    .filter(([one]) => (one.metrics.series[key] || []).some((v) => v !== null));
  const steps = [...new Set(having.flatMap(([one]) => one.metrics.step))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const lines = having.map(([one, index]) => {
    const values = new Array(steps.length).fill(null);
    one.metrics.step.forEach((step, i) => {
      values[place.get(step)] = one.metrics.series[key][i];
    });
    return { label: label(one.run), values, colour: index, points: key.startsWith("eval/") };
  });
  return { steps, lines };
}

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

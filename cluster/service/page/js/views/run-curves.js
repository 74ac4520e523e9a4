/** The curves of a run: which metrics share a chart; only those that the run has. */
import { Chart } from "../chart.js";
import { html, useMemo } from "../html.js";
import { ended } from "../live.js";
import { Empty } from "../ui.js";

/** @import * as T from "../types.js" */

/** @typedef {[key: string, label: string, extra?: Partial<T.Line>]} Key */
/**
 * unless: whether the chart is left out for these values
 * @typedef {{ title: string; unit: string; keys: Key[]; unless?: (values: T.Values) => boolean }} ChartOf
 */

/** @type {ChartOf[]} */
const CHARTS = [
  {
    title: "KL divergence",
    unit: "nats per token",
    keys: [
      ["kl/mean", "KL"],
      ["kl/coef", "coefficient", { right: true, dashed: true, color: 1 }],
    ],
  },
  { title: "Completion length", unit: "tokens", keys: [["rollout/length_mean", "mean"]] },
  { title: "Entropy", unit: "nats", keys: [["policy/entropy", "entropy"]] },
  {
    title: "Signal",
    unit: "shares",
    keys: [
      ["advantage/zero_groups", "zero-advantage groups"],
      ["rollout/truncated_fraction", "truncated completions"],
      ["policy/clip_fraction", "clipped tokens"],
    ],
  },
  {
    title: "Loss",
    unit: "",
    keys: [
      ["policy/loss", "policy"],
      ["value/loss", "value"],
      ["distill/jsd", "JSD to the teacher"],
    ],
  },
  { title: "Gradient norm", unit: "", keys: [["policy/grad_norm", "norm"]] },
  { title: "Learning rate", unit: "", keys: [["policy/lr", "rate"]] },
  {
    title: "Log-probability gap",
    unit: "trainer vs. generator",
    keys: [
      ["rollout/logprob_gap_mean", "mean"],
      ["rollout/logprob_gap_p999", "99.9 % quantile", { color: 1 }],
      ["rollout/logprob_gap_max", "largest", { color: 2 }],
    ],
  },
  { title: "Throughput", unit: "tokens/s", keys: [["throughput/tokens_per_s", "tokens"]] },
  {
    title: "Step time",
    unit: "seconds",
    keys: [
      ["time/step_s", "total"],
      ["time/generate_s", "generate"],
      ["time/train_s", "train"],
    ],
  },
  { title: "Staleness", unit: "policy versions", keys: [["rollout/staleness_max", "oldest completion"]] },
  {
    title: "Off-policy correction",
    unit: "",
    keys: [
      ["importance/ess", "effective sample size (share)"],
      ["importance/clipped_fraction", "clipped", { color: 1 }],
    ],
  },
  { title: "Critic", unit: "explained variance", keys: [["value/explained_variance", "explained"]] },
  {
    title: "Adapter ranks",
    unit: "AdaLoRA",
    keys: [
      ["adalora/rank_mean", "mean per layer"],
      ["adalora/budget", "budget, all layers", { right: true, dashed: true, color: 1 }],
    ],
  },
  { title: "Replaced groups", unit: "per step", keys: [["advantage/replaced_groups", "replaced"]] },
  {
    title: "Unscored samples",
    unit: "per step",
    keys: [["reward/failed", "failed"]],
    unless: (values) => values.every((v) => !v),
  },
];
const NO_REWARD = ["reward/mean", "reward/std", "reward/failed"];

/** @param {T.Series} series */
function rewards(series) {
  const mean = series["reward/mean"];
  /** @type {T.Line[]} */
  const lines = mean ? [{ label: "trained on", values: mean, band: series["reward/std"] }] : [];
  const names = Object.keys(series).filter((key) => key.startsWith("reward/") && !NO_REWARD.includes(key));
  for (const key of names) {
    if (mean && series[key].every((value, i) => value === mean[i])) continue; // the only trained one, weight 1
    lines.push({ label: key.slice("reward/".length), values: series[key], color: lines.length });
  }
  return lines;
}

/** @param {T.Series} series */
function held(series) {
  return Object.keys(series)
    .filter((key) => key.startsWith("eval/"))
    .map((key) => ({
      label: key.slice("eval/".length).replace("reward_mean", "trained on"),
      values: series[key],
      points: true,
    }))
    .filter((line, i, all) => i === 0 || !line.values.every((value, at) => value === all[0].values[at]))
    .map((line, color) => ({ ...line, color }));
}

/**
 * Why there are no curves yet.
 * @param {T.Run} run
 */
function before(run) {
  if (ended(run)) return "The run ended before its first step.";
  if (run.state === "paused") return "The run was paused before its first step. Resume it to start.";
  if (run.state === "queued" && run.queue?.position !== 0)
    return "The run is waiting in the queue. Curves appear after its first step.";
  return "Loading models and generating the first completions. Curves appear after the first step.";
}

/** @param {{ columns: T.MetricColumns; run: T.Run }} props */
export function Curves({ columns, run }) {
  const charts = useMemo(() => {
    const { series, step } = columns;
    /** @param {T.Values | undefined} values */
    const some = (values) => values?.some((value) => value !== null);
    const made = [
      { title: "Reward", unit: "mean per step, with the standard deviation of its samples", lines: rewards(series) },
      { title: "Reward on held-out prompts", unit: "mean", lines: held(series) },
    ];
    for (const { title, unit, keys, unless } of CHARTS) {
      const there = keys.filter(([key]) => some(series[key]) && !unless?.(series[key]));
      made.push({
        title,
        unit,
        lines: there.map(([key, label, extra], i) => ({ label, values: series[key], color: i, ...extra })),
      });
    }
    return made.filter((chart) => chart.lines.length).map((chart) => ({ ...chart, steps: step }));
  }, [columns]);
  if (!charts.length)
    return html`<${Empty} title=${ended(run) ? "No steps recorded" : "No steps yet"}><p>${before(run)}</p><//>`;
  return html`
    <div class="curves">${charts.map((chart) => html`<${Chart} key=${chart.title} sync="run" ...${chart} />`)}</div>
    <p class="small muted">Drag over a curve to zoom in; double-click to zoom out.</p>
  `;
}

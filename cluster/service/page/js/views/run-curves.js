/** The curves of a run: which metrics stand together, and only those that the run has. */
import { Chart } from "../chart.js";
import { html, useMemo } from "../html.js";
import { ended } from "../live.js";
import { Empty } from "../ui.js";

const CHARTS = [
  {
    title: "KL divergence",
    unit: "nats per token",
    keys: [
      ["kl/mean", "KL"],
      ["kl/coef", "coefficient", { right: true, dashed: true, colour: 1 }],
    ],
  },
  { title: "Answer length", unit: "tokens", keys: [["rollout/length_mean", "mean"]] },
  { title: "Entropy", unit: "nats", keys: [["policy/entropy", "entropy"]] },
  {
    title: "Signal",
    unit: "shares",
    keys: [
      ["advantage/zero_groups", "groups without advantage"],
      ["rollout/truncated_fraction", "answers cut off"],
      ["policy/clip_fraction", "tokens clipped"],
    ],
  },
  {
    title: "Loss",
    unit: "",
    keys: [
      ["policy/loss", "policy"],
      ["value/loss", "value"],
      ["distill/jsd", "divergence to the teacher"],
    ],
  },
  { title: "Gradient norm", unit: "", keys: [["policy/grad_norm", "norm"]] },
  { title: "Learning rate", unit: "", keys: [["policy/lr", "rate"]] },
  {
    title: "Log-probability gap",
    unit: "trainer against generator",
    keys: [
      ["rollout/logprob_gap_mean", "mean"],
      ["rollout/logprob_gap_max", "largest", { colour: 1 }],
    ],
  },
  { title: "Throughput", unit: "tokens a second", keys: [["throughput/tokens_per_s", "tokens"]] },
  {
    title: "Time of a step",
    unit: "seconds",
    keys: [
      ["time/step_s", "whole"],
      ["time/generate_s", "generate"],
      ["time/train_s", "train"],
    ],
  },
  { title: "Staleness", unit: "policy versions", keys: [["rollout/staleness_max", "oldest answer"]] },
  {
    title: "Off-policy correction",
    unit: "",
    keys: [
      ["importance/ess", "effective share"],
      ["importance/clipped_fraction", "clipped", { colour: 1 }],
    ],
  },
  { title: "Critic", unit: "explained variance", keys: [["value/explained_variance", "explained"]] },
  {
    title: "Ranks of the adapter",
    unit: "AdaLoRA",
    keys: [
      ["adalora/rank_mean", "mean of a layer"],
      ["adalora/budget", "budget of all layers", { right: true, dashed: true, colour: 1 }],
    ],
  },
  { title: "Replaced groups", unit: "a step", keys: [["advantage/replaced_groups", "replaced"]] },
  {
    title: "Samples without a score",
    unit: "a step",
    keys: [["reward/failed", "failed"]],
    unless: (values) => values.every((v) => !v),
  },
];
const NO_REWARD = ["reward/mean", "reward/std", "reward/failed"];

function rewards(series) {
  const mean = series["reward/mean"];
  const lines = mean ? [{ label: "trained on", values: mean, band: series["reward/std"] }] : [];
  const names = Object.keys(series).filter((key) => key.startsWith("reward/") && !NO_REWARD.includes(key));
  for (const key of names) {
    if (mean && series[key].every((value, i) => value === mean[i])) continue; // the only trained one, weight 1
    lines.push({ label: key.slice("reward/".length), values: series[key], colour: lines.length });
  }
  return lines;
}

function held(series) {
  return Object.keys(series)
    .filter((key) => key.startsWith("eval/"))
    .map((key) => ({
      label: key.slice("eval/".length).replace("reward_mean", "trained on"),
      values: series[key],
      points: true,
    }))
    .filter((line, i, all) => i === 0 || !line.values.every((value, at) => value === all[0].values[at]))
    .map((line, colour) => ({ ...line, colour }));
}

/** Why there are no curves yet. */
function before(run) {
  if (ended(run)) return "The run ended before its first step.";
  if (run.state === "paused") return "The run was paused before its first step. It begins when it is resumed.";
  if (run.state === "queued" && run.queue?.position !== 0)
    return "The run waits for its turn. The curves begin with its first step.";
  return "Models are being loaded and the first answers written. The curves begin with the first step.";
}

export function Curves({ columns, run }) {
  const charts = useMemo(() => {
    const { series, step } = columns;
    const some = (values) => values?.some((value) => value !== null);
    const made = [
      { title: "Reward", unit: "mean of a step, spread of its samples", lines: rewards(series) },
      { title: "On held-out prompts", unit: "mean", lines: held(series) },
    ];
    for (const { title, unit, keys, unless } of CHARTS) {
      const there = keys.filter(([key]) => some(series[key]) && !unless?.(series[key]));
      made.push({
        title,
        unit,
        lines: there.map(([key, label, extra], i) => ({ label, values: series[key], colour: i, ...extra })),
      });
    }
    return made.filter((chart) => chart.lines.length).map((chart) => ({ ...chart, steps: step }));
  }, [columns]);
  if (!charts.length)
    return html`<${Empty} title=${ended(run) ? "No step was recorded" : "No step yet"}><p>${before(run)}</p><//>`;
  return html`
    <div class="curves">${charts.map((chart) => html`<${Chart} key=${chart.title} sync="run" ...${chart} />`)}</div>
    <p class="small muted">Drag over a curve to look closer; double-click to see all of it.</p>
  `;
}

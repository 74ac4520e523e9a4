/** One run: head with state, progress and actions, and its tabs. */
import { request } from "../api.js";
import { bytes, clock, count, duration, number, percent, took } from "../format.js";
import { useTitle } from "../hooks.js";
import { html, useEffect, useMemo, useState } from "../html.js";
import { ended, useLive } from "../live.js";
import { Button, Code, Dialog, Empty, Failure, Loading, Meter, Notice, State, Tabs } from "../ui.js";
import { Chat } from "./run-chat.js";
import { CloneDialog } from "./run-clone.js";
import { Curves } from "./run-curves.js";
import { Doctor, useDiagnosis } from "./run-doctor.js";
import { Logs } from "./run-logs.js";
import { Samples } from "./run-samples.js";

const MODES = {
  live: "live",
  polling: "looking every few seconds",
  waiting: "the server does not answer; trying again",
  connecting: "connecting",
  ended: "",
};
const PHASES = [
  ["time/generate_s", "generate"],
  ["time/reward_s", "reward"],
  ["time/annotate_s", "log-probabilities"],
  ["time/train_s", "train"],
  ["weights/sync_s", "weight sync"],
];

export function Run({ id, tab, query }) {
  const { details, error, columns, mode, refresh } = useLive(id);
  const run = details?.run;
  useTitle(run?.name || id);
  const findings = useDiagnosis(id, columns.step.at(-1) ?? 0, run?.state);
  if (!details && error)
    return error.status === 404
      ? html`<${Empty} title="There is no such run"><p>${id}</p><p><a href="#/runs">To the runs</a></p><//>`
      : html`<${Failure} error=${error} again=${refresh} />`;
  if (!details) return html`<${Loading} lines=${5} height=${60} />`;
  if (run.state === "unreadable")
    return html`<div class="stack">
      <h1>${run.id}</h1><${Notice} kind="bad" title="This run cannot be read">${run.unreadable}<//>
    </div>`;
  const at = `#/runs/${encodeURIComponent(id)}`;
  const tabs = [
    ["curves", "Curves", at],
    ["doctor", `Doctor${findings.list?.length ? ` (${findings.list.length})` : ""}`, `${at}/doctor`],
    ["samples", "Samples", `${at}/samples`],
    ["logs", "Logs", `${at}/logs`],
    ["config", "Settings", `${at}/config`],
    ...(details.actions.includes("chat") ? [["chat", "Chat", `${at}/chat`]] : []),
  ];
  return html`<div class="stack wide">
    <${Head} details=${details} mode=${mode} refresh=${refresh} columns=${columns} />
    ${details.metrics_problem && html`<${Notice} kind="warn">${details.metrics_problem}<//>`}
    ${run.error && html`<${RunError} error=${run.error} at=${at} />`}
    <${Tabs} tabs=${tabs} current=${tab} label="Of this run" />
    ${
      tab === "curves" &&
      html`<div class="run-grid">
        <div class="stack wide">
          ${
            findings.list?.some((f) => f.severity !== "info") &&
            html`<${Notice} kind=${findings.list.some((f) => f.severity === "critical") ? "bad" : "warn"}>
              The Doctor found: ${graveTitles(findings.list)}. <a href="${at}/doctor">What to do</a>
            <//>`
          }
          <${Curves} columns=${columns} run=${run} />
        </div>
        <${Side} details=${details} columns=${columns} />
      </div>`
    }
    ${tab === "doctor" && html`<${Doctor} details=${details} findings=${findings} />`}
    ${tab === "samples" && html`<${Samples} id=${id} known=${details.samples} query=${query} />`}
    ${tab === "logs" && html`<${Logs} id=${id} running=${!ended(run)} />`}
    ${
      tab === "config" &&
      html`<div class="stack">
        <${Code} text=${details.command} label="command" wrap />
        ${
          details.yaml
            ? html`<${Code} text=${details.yaml} label="config.yaml" />`
            : html`<${Notice} kind="warn">The config of this run cannot be read.<//>`
        }
      </div>`
    }
    ${tab === "chat" && html`<${Chat} id=${id} />`}
  </div>`;
}

function graveTitles(list) {
  const titles = list.filter((finding) => finding.severity !== "info").map((finding) => finding.title);
  return titles.slice(0, 3).join("; ") + (titles.length > 3 ? `; and ${titles.length - 3} more` : "");
}

function Head({ details, mode, refresh, columns }) {
  const { run } = details;
  const last = (key) => (columns.series[key] || []).findLast((value) => value !== null);
  const left = !ended(run) && details.remaining_s !== null ? duration(details.remaining_s) : null;
  const facts = [
    ["Reward", number(last("reward/mean"))],
    ["KL", number(last("kl/mean"))],
    ["Answer length", number(last("rollout/length_mean"))],
    ["Tokens a second", number(last("throughput/tokens_per_s"))],
    ["Took", duration(took(run))],
    ...(left ? [["Left", left]] : []),
  ];
  return html`<div class="run-head">
    <div class="row between top">
      <div class="grow">
        <div class="row">
          <h1>${run.name}</h1>
          <${State} state=${run.stopping ? "stopping" : run.state} />
          <span class="live" role="status">${MODES[mode]}</span>
        </div>
        <p class="small muted">${run.id} · made ${clock(run.created)}</p>
      </div>
      <${Actions} details=${details} refresh=${refresh} />
    </div>
    ${
      run.queue &&
      html`<${Notice} title=${run.queue.position ? `Number ${run.queue.position} in the queue` : "Starting"}>
        ${run.queue.reason}
      <//>`
    }
    <div class="stack tight">
      <${Meter} value=${run.step} of=${run.steps} state=${run.state} label="Steps" />
      <span class="small muted">Step ${number(run.step)} of ${number(run.steps)}</span>
    </div>
    <dl class="headline">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
  </div>`;
}

function RunError({ error, at }) {
  const where = [
    error.role && `${error.role}${error.rank === null || error.rank === undefined ? "" : ` ${error.rank}`}`,
    error.phase && `phase ${error.phase}`,
  ]
    .filter(Boolean)
    .join(", ");
  const file = error.log ? error.log.split("/").pop() : null;
  return html`<${Notice} kind="bad" title="${where || "the run"}: ${error.type}" alert>
    <span class="error-words">${error.message}</span>
    ${" "}
    <a href="${at}/logs${file ? `?file=${encodeURIComponent(file)}` : ""}">To the log</a>
  <//>`;
}

function Actions({ details, refresh }) {
  const { run, actions } = details;
  const [dialog, setDialog] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState("");
  const at = `/runs/${encodeURIComponent(run.id)}`;
  useEffect(() => {
    setBusy("");
  }, [run.state, run.stopping]);
  const act = async (name, work) => {
    setBusy(name);
    setError(null);
    setDialog(null);
    try {
      await work();
    } catch (problem) {
      setError(problem);
    }
    setBusy("");
  };
  const ask = (verb) =>
    act(verb, async () => {
      await request(`${at}/${verb}`, { method: "POST" });
      refresh();
    });
  const remove = () =>
    act("delete", async () => {
      await request(at, { method: "DELETE", query: { confirm: run.id } });
      location.hash = "#/runs";
    });
  const download = () =>
    act("download", async () => {
      location.href = (await request(`${at}/model/ticket`, { method: "POST" })).url;
    });
  const can = (name) => actions.includes(name);
  const off = busy !== "" || run.stopping;
  return html`<div class="stack tight">
    <div class="actions">
      ${can("pause") && html`<${Button} disabled=${off} onClick=${() => ask("pause")}>Pause<//>`}
      ${can("resume") && html`<${Button} kind="primary" disabled=${off} onClick=${() => ask("resume")}>Resume<//>`}
      ${can("stop") && html`<${Button} disabled=${off} onClick=${() => setDialog("stop")}>Stop<//>`}
      ${
        can("download") &&
        html`<${Button} icon="download" disabled=${busy !== ""} onClick=${download}>
          Download${details.model ? ` (${bytes(details.model.bytes)})` : ""}
        <//>`
      }
      ${can("clone") && html`<${Button} onClick=${() => setDialog("clone")}>Clone<//>`}
      ${can("delete") && html`<${Button} kind="danger" disabled=${off} onClick=${() => setDialog("delete")}>Delete<//>`}
    </div>
    ${error && html`<${Failure} error=${error} />`}
    ${
      dialog === "stop" &&
      html`<${Dialog} title="Stop ${run.name}?" onClose=${() => setDialog(null)}>
        <p>A checkpoint is saved first. The run can be resumed later.</p>
        <div class="actions">
          <${Button} onClick=${() => setDialog(null)}>Keep it going<//>
          <${Button} kind="primary" onClick=${() => ask("stop")}>Stop<//>
        </div>
      <//>`
    }
    ${
      dialog === "delete" &&
      html`<${Dialog} title="Delete ${run.name}?" onClose=${() => setDialog(null)}>
        <p>
          Everything in <code>${details.path}</code> is deleted: metrics, samples,${" "}
          ${count(details.checkpoints.length, "checkpoint")}${details.model ? " and the model" : ""}.${" "}
          This cannot be undone.
        </p>
        <div class="actions">
          <${Button} onClick=${() => setDialog(null)}>Keep it<//>
          <${Button} kind="danger" onClick=${remove}>Delete for good<//>
        </div>
      <//>`
    }
    ${dialog === "clone" && html`<${CloneDialog} details=${details} changes=${{}} onClose=${() => setDialog(null)} />`}
  </div>`;
}

function Side({ details, columns }) {
  const phases = useMemo(() => {
    const found = PHASES.map(([key, name]) => [name, (columns.series[key] || []).findLast((v) => v !== null)]).filter(
      ([, s]) => s > 0,
    );
    const step = (columns.series["time/step_s"] || []).findLast((v) => v !== null);
    const rest = step ? step - found.reduce((sum, [, s]) => sum + s, 0) : 0;
    return rest > 0.01 * (step || 1) ? [...found, ["other", rest]] : found;
  }, [columns]);
  const total = phases.reduce((sum, [, s]) => sum + s, 0);
  const versions = Object.entries(details.run.versions || {});
  return html`<aside class="stack" aria-label="About the run">
    ${
      total > 0 &&
      html`<section class="card tightly stack tight">
        <h2 class="minor">The last step, ${duration(total)}</h2>
        <div class="phases" role="img" aria-label=${phases.map(([name, s]) => `${name} ${duration(s)}`).join(", ")}>
          ${phases.map(([, s], i) => html`<span class="b${i + 1}" style=${{ flexGrow: s, flexBasis: 0 }}></span>`)}
        </div>
        <dl class="facts small">
          ${phases.map(
            ([name, s], i) => html`
              <dt><span class="key"><span class="dot b${i + 1}"></span> ${name}</span></dt>
              <dd>${duration(s)} · ${percent(s / total)}</dd>
            `,
          )}
        </dl>
      </section>`
    }
    <section class="card tightly stack tight">
      <h2 class="minor">Checkpoints</h2>
      ${
        details.checkpoints.length
          ? html`<dl class="facts small">
            ${details.checkpoints
              .slice(-8)
              .reverse()
              .map((one) => html`<dt>step ${number(one.step)}</dt><dd>${bytes(one.bytes)}</dd>`)}
          </dl>`
          : html`<p class="small muted">None yet.</p>`
      }
      ${
        details.model &&
        html`<p class="small">The model: ${count(details.model.files, "file")}, ${bytes(details.model.bytes)}</p>`
      }
    </section>
    <section class="card tightly stack tight">
      <h2 class="minor">Where it lies</h2><p class="small mono muted error-words">${details.path}</p>
    </section>
    ${
      versions.length > 0 &&
      html`<section class="card tightly">
        <details>
          <summary>Versions</summary>
          <dl class="facts small">${versions.map(([name, v]) => html`<dt>${name}</dt><dd>${v}</dd>`)}</dl>
        </details>
      </section>`
    }
  </aside>`;
}

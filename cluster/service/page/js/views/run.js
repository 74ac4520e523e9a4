/** One run: head with state, progress and actions, and its tabs. */
import { ApiError } from "../api.js";
import { askRunTo, deleteRun, getDownload } from "../endpoints.js";
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

/** @import * as T from "../types.js" */
/** @import { Mode } from "../live.js" */

/** @type {Record<Mode, string>} */
const MODES = {
  live: "live",
  polling: "updating every few seconds",
  waiting: "the server does not answer; trying again",
  connecting: "connecting",
  stopped: "not updating",
  ended: "",
};
const PHASES = [
  ["time/generate_s", "generate"],
  ["time/reward_s", "reward"],
  ["time/annotate_s", "log-probabilities"],
  ["time/train_s", "train"],
  ["weights/sync_s", "weight sync"],
];

/** @param {{ id: string; tab: string; query: URLSearchParams }} props */
export function Run({ id, tab, query }) {
  const { details, error, columns, mode, refresh } = useLive(id);
  const run = details?.run;
  useTitle(run?.name || id);
  const findings = useDiagnosis(id, columns.step.at(-1) ?? 0, run?.state);
  if (!details && error)
    return error.status === 404
      ? html`<${Empty} title="Run not found"><p>${id}</p><p><a href="#/runs">All runs</a></p><//>`
      : html`<${Failure} error=${error} again=${refresh} />`;
  if (!details || !run) return html`<${Loading} lines=${5} height=${60} />`;
  if (run.state === "unreadable")
    return html`<div class="stack">
      <h1>${run.id}</h1><${Notice} kind="bad" title="This run cannot be read">${run.unreadable}<//>
    </div>`;
  const at = `#/runs/${encodeURIComponent(id)}`;
  const [doctor, grave] = [findings.list ?? [], (findings.list ?? []).filter((f) => f.severity !== "info")];
  const tabs = [
    ["curves", "Curves", at],
    ["doctor", `Doctor${doctor.length ? ` (${doctor.length})` : ""}`, `${at}/doctor`],
    ["samples", "Samples", `${at}/samples`],
    ["logs", "Logs", `${at}/logs`],
    ["config", "Settings", `${at}/config`],
    ...(details.actions.includes("chat") ? [["chat", "Chat", `${at}/chat`]] : []),
  ];
  return html`<div class="stack wide">
    <${Head} details=${details} mode=${mode} refresh=${refresh} columns=${columns} />
    ${mode === "stopped" && error && html`<${Stopped} error=${error} refresh=${refresh} />`}
    ${details.metrics_problem && html`<${Notice} kind="warn">${details.metrics_problem}<//>`}
    ${run.error && html`<${RunError} error=${run.error} at=${at} />`}
    <${Tabs} tabs=${tabs} current=${tab} label="Run views" />
    ${
      tab === "curves" &&
      html`<div class="run-grid">
        <div class="stack wide">
          ${
            grave.length > 0 &&
            html`<${Notice} kind=${grave.some((f) => f.severity === "critical") ? "bad" : "warn"}>
              The Doctor found: ${titlesOf(grave)}. <a href="${at}/doctor">What to do</a>
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

/**
 * Why a run is not updated any more, and what to do about it; an expired token is asked for by the page's frame.
 * @param {{ error: ApiError; refresh: () => void }} props
 */
function Stopped({ error, refresh }) {
  if (error.status !== 404) return html`<${Failure} error=${error} again=${refresh} />`;
  return html`<${Notice} kind="warn" title="This run no longer exists" alert>
    It was deleted from the server. <a href="#/runs">All runs</a>
  <//>`;
}

/** @param {T.Finding[]} list */
function titlesOf(list) {
  const titles = list.map((finding) => finding.title);
  return titles.slice(0, 3).join("; ") + (titles.length > 3 ? `; and ${titles.length - 3} more` : "");
}

/** @param {{ details: T.RunDetails; mode: Mode; refresh: () => void; columns: T.MetricColumns }} props */
function Head({ details, mode, refresh, columns }) {
  const { run } = details;
  /** @param {string} key */
  const last = (key) => columns.series[key]?.findLast((value) => value !== null);
  const left = !ended(run) && details.remaining_s !== null ? duration(details.remaining_s) : null;
  const facts = [
    ["Reward", number(last("reward/mean"))],
    ["KL", number(last("kl/mean"))],
    ["Completion length", number(last("rollout/length_mean"))],
    ["Tokens/s", number(last("throughput/tokens_per_s"))],
    ["Duration", duration(took(run))],
    ...(left ? [["Time left", left]] : []),
  ];
  return html`<div class="run-head">
    <div class="row between top">
      <div class="grow">
        <div class="row">
          <h1>${run.name}</h1>
          <${State} state=${run.stopping ? "stopping" : run.state} />
          <span class="live" role="status">${MODES[mode]}</span>
        </div>
        <p class="small muted">${run.id} · created ${clock(run.created)}</p>
      </div>
      <${Actions} details=${details} refresh=${refresh} />
    </div>
    ${
      run.queue &&
      html`<${Notice} title=${run.queue.position ? `Position ${run.queue.position} in the queue` : "Starting"}>
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

/** @param {{ error: T.RunError; at: string }} props */
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
    <a href="${at}/logs${file ? `?file=${encodeURIComponent(file)}` : ""}">Open log</a>
  <//>`;
}

/** @param {{ details: T.RunDetails; refresh: () => void }} props */
function Actions({ details, refresh }) {
  const { run, actions } = details;
  const [dialog, setDialog] = useState("");
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const [busy, setBusy] = useState("");
  const close = () => setDialog("");
  useEffect(() => {
    setBusy("");
  }, [run.state, run.stopping]);
  /** @type {(name: string, work: () => Promise<void>) => Promise<void>} */
  const act = async (name, work) => {
    setBusy(name);
    setError(null);
    close();
    try {
      await work();
    } catch (problem) {
      setError(ApiError.of(problem));
    }
    setBusy("");
  };
  /** @param {string} verb */
  const ask = (verb) =>
    act(verb, async () => {
      await askRunTo(run.id, verb);
      refresh();
    });
  const remove = () =>
    act("delete", async () => {
      await deleteRun(run.id);
      location.hash = "#/runs";
    });
  const download = () =>
    act("download", async () => {
      location.href = (await getDownload(run.id)).url;
    });
  /** @param {string} name */
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
      html`<${Dialog} title="Stop ${run.name}?" onClose=${close}>
        <p>A checkpoint is saved first. The run can be resumed later.</p>
        <div class="actions">
          <${Button} onClick=${close}>Cancel<//>
          <${Button} kind="primary" onClick=${() => ask("stop")}>Stop<//>
        </div>
      <//>`
    }
    ${
      dialog === "delete" &&
      html`<${Dialog} title="Delete ${run.name}?" onClose=${close}>
        <p>
          Everything in <code>${details.path}</code> is deleted: metrics, samples,${" "}
          ${count(details.checkpoints.length, "checkpoint")}${details.model ? " and the model" : ""}.${" "}
          This cannot be undone.
        </p>
        <div class="actions">
          <${Button} onClick=${close}>Cancel<//>
          <${Button} kind="danger" onClick=${remove}>Delete permanently<//>
        </div>
      <//>`
    }
    ${dialog === "clone" && html`<${CloneDialog} details=${details} changes=${{}} onClose=${close} />`}
  </div>`;
}

/** @param {{ details: T.RunDetails; columns: T.MetricColumns }} props */
function Side({ details, columns }) {
  const phases = useMemo(() => {
    /** @param {string} key */
    const last = (key) => columns.series[key]?.findLast((v) => v !== null) ?? 0;
    const found = PHASES.map(([key, name]) => /** @type {[string, number]} */ ([name, last(key)]));
    const known = found.filter(([, s]) => s > 0);
    const rest = last("time/step_s") - known.reduce((sum, [, s]) => sum + s, 0);
    /** @type {[string, number][]} */
    const other = rest > 0.01 * last("time/step_s") ? [["other", rest]] : [];
    return [...known, ...other];
  }, [columns]);
  const total = phases.reduce((sum, [, s]) => sum + s, 0);
  const versions = Object.entries(details.run.versions || {});
  return html`<aside class="stack" aria-label="About the run">
    ${
      total > 0 &&
      html`<section class="card tightly stack tight">
        <h2 class="minor">Last step, ${duration(total)}</h2>
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
        html`<p class="small">Model: ${count(details.model.files, "file")}, ${bytes(details.model.bytes)}</p>`
      }
    </section>
    <section class="card tightly stack tight">
      <h2 class="minor">Location</h2><p class="small mono muted error-words">${details.path}</p>
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

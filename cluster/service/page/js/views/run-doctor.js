/** What the Doctor found: severity, evidence, remedy, and the button that clones the run with the change. */
import { ApiError, isAbort } from "../api.js";
import { Spark } from "../chart.js";
import { getDiagnosis } from "../endpoints.js";
import { number } from "../format.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { shown } from "../tree.js";
import { Button, Empty, Failure, Loading, Words } from "../ui.js";
import { CloneDialog } from "./run-clone.js";

/** @import * as T from "../types.js" */

/** @typedef {{ list: T.Finding[] | null; error: ApiError | null }} Diagnosis */

const EVERY = 8000; // ms between two diagnoses of a running run

/**
 * The findings; requested again when there are more steps, every `EVERY` ms at most.
 * @param {string} id
 * @param {number} step
 * @param {string | undefined} state
 */
export function useDiagnosis(id, step, state) {
  const [found, setFound] = useState(/** @type {Diagnosis} */ ({ list: null, error: null }));
  const latest = useRef(step);
  latest.current = step;
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    let asked = -1;
    const ask = async () => {
      if (asked !== latest.current) {
        asked = latest.current;
        try {
          const { findings } = await getDiagnosis(id, stop.signal);
          setFound({ list: findings, error: null });
        } catch (error) {
          if (!isAbort(error)) setFound((old) => ({ ...old, error: ApiError.of(error) }));
        }
      }
      if (!stop.signal.aborted) timer = setTimeout(ask, EVERY);
    };
    ask();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [id, state]);
  return found;
}

/** @param {{ details: T.RunDetails; findings: Diagnosis }} props */
export function Doctor({ details, findings }) {
  const [dialog, setDialog] = useState(/** @type {T.Finding | null} */ (null));
  if (findings.error && !findings.list) return html`<${Failure} error=${findings.error} />`;
  if (!findings.list) return html`<${Loading} lines=${3} />`;
  if (!findings.list.length) {
    return html`<${Empty} title="No problems found">
      <p>
        ${
          details.steps_recorded < 20
            ? "Trends need at least 20 steps."
            : "Reward, KL, entropy, lengths, gradients and scores look normal."
        }
      </p>
    <//>`;
  }
  return html`<div class="stack">
    ${findings.list.map(
      (finding) =>
        html`<${Finding} key=${finding.rule} finding=${finding} id=${details.run.id}
          onApply=${() => setDialog(finding)} />`,
    )}
    ${
      dialog &&
      html`<${CloneDialog} details=${details}
        changes=${Object.fromEntries(dialog.remedy.changes.map((c) => [c.key, c.value]))}
        onClose=${() => setDialog(null)} />`
    }
  </div>`;
}

/** @param {{ finding: T.Finding; id: string; onApply: () => void }} props */
function Finding({ finding, id, onApply }) {
  const { metrics = [], samples = [] } = finding.evidence || {};
  /** @param {{ step: number; sample_id: string }} one */
  const to = (one) =>
    `#/runs/${encodeURIComponent(id)}/samples?step=${one.step}&sample=${encodeURIComponent(one.sample_id)}`;
  const changes = finding.remedy.changes || [];
  return html`<article class="finding ${finding.severity}" aria-label=${finding.title}>
    <div class="row"><h2>${finding.title}</h2><span class="state ${finding.severity}">${finding.severity}</span></div>
    <p>${finding.explanation}</p>
    ${
      metrics.length > 0 &&
      html`<div class="sparks">
        ${metrics.map(
          (one) => html`<div>
            <${Spark} values=${one.values} label="${one.key}, steps ${one.steps[0]} to ${one.steps.at(-1)}" />
            <div class="small">
              <span class="mono">${one.key}</span>${" "}
              <span class="muted">${one.note}, ${number(one.values[0])} → ${number(one.values.at(-1))}</span>
            </div>
          </div>`,
        )}
      </div>`
    }
    ${
      samples.length > 0 &&
      html`<p class="small">
        See ${samples.map(
          (one, i) => html`
            ${i ? ", " : ""}
            <a href=${to(one)}>sample ${one.sample_id}</a>${" "}
            of step ${one.step} (${one.note})
          `,
        )}
      </p>`
    }
    <p><strong>What to do.</strong> <${Words} text=${finding.remedy.text} /></p>
    ${
      changes.length > 0 &&
      html`<div class="row">
        <${Button} kind="primary" onClick=${onApply}>Clone with this change<//>
        <span class="small muted">
          ${changes.map((c, i) => html`${i ? ", " : ""}<span class="mono">${c.key} = ${shown(c.value)}</span>`)}
        </span>
      </div>`
    }
  </article>`;
}

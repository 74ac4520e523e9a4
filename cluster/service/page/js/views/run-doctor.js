/** What the Doctor found: severity, evidence, remedy, and the button that clones the run with the change. */
import { request } from "../api.js";
import { Spark } from "../chart.js";
import { number } from "../format.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { shown } from "../tree.js";
import { Button, Empty, Failure, Loading, Words } from "../ui.js";
import { CloneDialog } from "./run-clone.js";

const EVERY = 8000; // ms between two diagnoses while a run goes

/** {list, error}; asked for again when there are further steps, every `EVERY` ms at most. */
export function useDiagnosis(id, step, state) {
  const [found, setFound] = useState({ list: null, error: null });
  const latest = useRef(step);
  latest.current = step;
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0,
      asked = null;
    const ask = async () => {
      if (asked !== latest.current) {
        asked = latest.current;
        try {
          const { findings } = await request(`/runs/${encodeURIComponent(id)}/diagnosis`, { signal: stop.signal });
          setFound({ list: findings, error: null });
        } catch (error) {
          if (error.name !== "AbortError") setFound((old) => ({ ...old, error }));
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

export function Doctor({ details, findings }) {
  const [dialog, setDialog] = useState(null);
  if (findings.error && !findings.list) return html`<${Failure} error=${findings.error} />`;
  if (!findings.list) return html`<${Loading} lines=${3} />`;
  if (!findings.list.length) {
    return html`<${Empty} title="Nothing to mend">
      <p>
        ${
          details.steps_recorded < 20
            ? "So few steps tell little; trends need twenty."
            : "Reward, KL, entropy, lengths, gradients and scores look as they should."
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

function Finding({ finding, id, onApply }) {
  const { metrics = [], samples = [] } = finding.evidence || {};
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
        <${Button} kind="primary" onClick=${onApply}>Clone with the change<//>
        <span class="small muted">
          ${changes.map((c, i) => html`${i ? ", " : ""}<span class="mono">${c.key} = ${shown(c.value)}</span>`)}
        </span>
      </div>`
    }
  </article>`;
}

/** A new run in four steps: model, dataset, settings, review. The draft is kept in the session. */
import { newKey } from "../api.js";
import { asked, DRAFT, emptyDraft, isBegun } from "../draft.js";
import { getSchema, getService, plan as planRun } from "../endpoints.js";
import { useResource, useSettled, useStored, useTitle } from "../hooks.js";
import { html, useCallback, useEffect, useMemo, useState } from "../html.js";
import { plainly } from "../plain.js";
import { setIn } from "../tree.js";
import { Button, Dialog, Failure, Icon, Loading } from "../ui.js";
import { taken, useUpload } from "../uploading.js";
import { DataStep } from "./new-data.js";
import { ModelStep } from "./new-model.js";
import { ReviewStep } from "./new-review.js";
import { SettingsStep } from "./new-settings.js";
import { STEPS, stepOf } from "./new-steps.js";

/** @import * as T from "../types.js" */

const VIEWS = /** @type {Record<string, (props: T.StepProps) => object>} */ ({
  model: ModelStep,
  data: DataStep,
  settings: SettingsStep,
  review: ReviewStep,
});

/** @param {{ step: string }} props */
export function NewRun({ step }) {
  useTitle("New run");
  const [draft, setDraft] = useStored(DRAFT, emptyDraft());
  const schema = useResource(getSchema, []);
  const service = useResource(getService, []);
  const settled = useSettled(draft.tree);
  const ask = useMemo(() => asked({ ...draft, tree: settled }, schema.data), [draft.clone, settled, schema.data]);
  const plan = useResource((signal) => planRun(ask.plan, ask.body, signal), [ask], { keep: true });
  const current = settled === draft.tree && !plan.loading;
  /** @type {T.StepProps["change"]} */
  const set = (path, value) => setDraft((old) => ({ ...old, key: newKey(), tree: setIn(old.tree, path, value) }));
  const change = useCallback(set, []);
  const problems = useMemo(() => (plan.data ? plainly(plan.data.problems, draft.tree) : []), [draft.tree, plan.data]);
  const warnings = plan.data?.warnings || [];
  const { dataset } = useUpload();
  useEffect(() => {
    if (!dataset) return;
    setDraft((old) => ({ ...old, dataset: dataset.id }));
    change("data.prompts", dataset.path);
    taken();
  }, [dataset]);
  const here = STEPS.findIndex(([name]) => name === step);
  const late = STEPS.some(([name], index) => index > here && draft.seen.includes(name)); // a later step was visited
  useEffect(() => setDraft((old) => (old.seen.includes(step) ? old : { ...old, seen: [...old.seen, step] })), [step]);
  /** @param {string} name */
  const right = (name) => Boolean(plan.data) && name !== "review" && !problems.some((p) => stepOf(p.path) === name);
  /** @param {string} name */
  const ticked = (name) => name !== step && draft.seen.includes(name) && right(name);
  const error = schema.error || service.error;
  const known = {
    draft,
    setDraft,
    change,
    problems,
    warnings,
    plan,
    ask,
    current,
    schema: schema.data,
    service: service.data,
    right,
    late,
  };
  const View = VIEWS[step] || ModelStep;
  return html`<div class="narrow stack wide">
    <${Head} draft=${draft} onDiscard=${() => {
      setDraft(emptyDraft());
      location.hash = "#/new/model";
    }} />
    <nav class="steps" aria-label="Form steps">
      ${STEPS.map(
        ([name, title], index) => html`
          <a href="#/new/${name}" class=${ticked(name) ? "done" : ""}
            aria-current=${name === step ? "step" : undefined}>
            <span class="mark">
              ${ticked(name) ? html`<${Icon} name="check" /><span class="hidden-text">Done:</span>` : index + 1}
            </span>
            <span>${title}</span>
          </a>`,
      )}
    </nav>
    ${
      error
        ? html`<${Failure} error=${error} again=${() => {
            schema.reload();
            service.reload();
          }} />`
        : !schema.data || !service.data
          ? html`<${Loading} lines=${5} />`
          : html`<${View} key=${draft.began} ...${known} />`
    }
  </div>`;
}

/** @param {{ draft: T.Draft; onDiscard: () => void }} props */
function Head({ draft, onDiscard }) {
  const [asking, setAsking] = useState(false);
  return html`<div class="stack tight">
    <div class="row between">
      <h1>New run</h1>
      ${isBegun(draft) && html`<${Button} kind="quiet" slim onClick=${() => setAsking(true)}>Discard<//>`}
    </div>
    ${
      draft.clone &&
      html`<p class="muted">
        Clone of <a href="#/runs/${encodeURIComponent(draft.clone.id)}">${draft.clone.name}</a>: settings that you do
        not change stay the same.
      </p>`
    }
    ${
      asking &&
      html`<${Dialog} title="Discard this draft?" onClose=${() => setAsking(false)}>
        <p>All settings of this draft are lost. Uploads stay on the server.</p>
        <div class="actions">
          <${Button} onClick=${() => setAsking(false)}>Keep draft<//>
          <${Button} kind="danger" onClick=${() => {
            setAsking(false);
            onDiscard();
          }}>
            Discard
          <//>
        </div>
      <//>`
    }
  </div>`;
}

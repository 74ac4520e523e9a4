/** The upload in progress: it belongs to the page, not to a view, so that it is still there when one comes back. */
import { ApiError, upload } from "./api.js";
import { deleteDataset } from "./endpoints.js";
import { bytes } from "./format.js";
import { useEffect, useState } from "./html.js";

/** @import * as T from "./types.js" */
/**
 * error: why the last one failed; dataset: uploaded, not yet chosen.
 * @typedef {{ work: T.Upload | null; error: ApiError | null; dataset: T.DatasetAnswer | null }} State
 */

const SUFFIXES = [".jsonl", ".jsonl.gz", ".parquet"];
export const ACCEPTED = ".jsonl,.gz,.parquet"; // of the file dialog, which knows last suffixes only

/** @type {State} */
let state = { work: null, error: null, dataset: null };
let abort = () => {};
const changed = new EventTarget();

/** @param {Partial<State>} change */
function set(change) {
  state = { ...state, ...change };
  changed.dispatchEvent(new Event("change"));
}

export function useUpload() {
  const [seen, setSeen] = useState(state);
  useEffect(() => {
    const look = () => setSeen(state);
    look();
    changed.addEventListener("change", look);
    return () => changed.removeEventListener("change", look);
  }, []);
  return seen;
}

/**
 * Why a file cannot be sent, before it is; null if it can.
 * @param {File} file
 * @param {number} limit
 */
function refusal(file, limit) {
  const name = file.name.toLowerCase();
  if (!SUFFIXES.some((suffix) => name.endsWith(suffix))) {
    const advice = name.endsWith(".json") ? " Convert a JSON list to one record per line (.jsonl)." : "";
    return `${file.name} is not one of ${SUFFIXES.join(", ")}.${advice}`;
  }
  return file.size > limit ? `${file.name} has ${bytes(file.size)}, the limit is ${bytes(limit)}.` : null;
}

/**
 * @param {File} file
 * @param {number} limit in bytes
 */
export async function startUpload(file, limit) {
  const refused = refusal(file, limit);
  if (refused) return set({ error: new ApiError(0, "refused", refused) });
  const sending = upload(file, (share) => state.work && set({ work: { ...state.work, share } }));
  abort = sending.abort;
  set({ work: { name: file.name, share: 0, stopping: false }, error: null, dataset: null });
  try {
    const dataset = await sending.promise;
    if (state.work?.stopping) await deleteDataset(dataset.id);
    else set({ dataset });
  } catch (error) {
    const problem = ApiError.of(error);
    if (problem.code !== "aborted") set({ error: problem });
  }
  set({ work: null });
}

/** A file that is being read may become a dataset while we hang up: wait for it, then delete it. */
export function stopUpload() {
  if (!state.work) return;
  if (state.work.share < 1) abort();
  else set({ work: { ...state.work, stopping: true } });
}

export function taken() {
  set({ dataset: null });
}

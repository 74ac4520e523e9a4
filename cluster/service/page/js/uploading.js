/** The upload in progress: it belongs to the page, not to a view, so that it is still there when one comes back. */
import { request, upload } from "./api.js";
import { bytes } from "./format.js";
import { useEffect, useState } from "./html.js";

const SUFFIXES = [".jsonl", ".jsonl.gz", ".parquet"];
export const ACCEPTED = ".jsonl,.gz,.parquet"; // of the file dialog, which knows last suffixes only

/** work: {name, share, stopping} while one runs; error: why the last one failed; dataset: uploaded, not yet chosen. */
let state = { work: null, error: null, dataset: null };
let abort = null;
const changed = new EventTarget();

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

/** Why a file cannot be sent, before it is; null where it can. */
function refusal(file, limit) {
  const name = file.name.toLowerCase();
  if (!SUFFIXES.some((suffix) => name.endsWith(suffix))) {
    const advice = name.endsWith(".json") ? " A list in JSON must be written as one record a line (.jsonl)." : "";
    return `${file.name} is not one of ${SUFFIXES.join(", ")}.${advice}`;
  }
  return file.size > limit ? `${file.name} has ${bytes(file.size)}, the limit is ${bytes(limit)}.` : null;
}

export async function startUpload(file, limit) {
  const refused = refusal(file, limit);
  if (refused) return set({ error: { message: refused } });
  const sending = upload(file, (share) => state.work && set({ work: { ...state.work, share } }));
  abort = sending.abort;
  set({ work: { name: file.name, share: 0, stopping: false }, error: null, dataset: null });
  try {
    const dataset = await sending.promise;
    if (state.work.stopping) await remove(dataset.id);
    else set({ dataset });
  } catch (error) {
    if (error.code !== "aborted") set({ error });
  }
  set({ work: null });
}

/** A file that is being read may become a dataset while we hang up: wait for it, then remove it. */
export function stopUpload() {
  if (state.work.share < 1) return abort();
  set({ work: { ...state.work, stopping: true } });
}

export function remove(id) {
  return request(`/datasets/${encodeURIComponent(id)}`, { method: "DELETE" });
}

export function taken() {
  set({ dataset: null });
}

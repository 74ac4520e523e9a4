/** The API endpoints that the page uses, with the types of their responses. */
import { request } from "./api.js";

/** @import * as T from "./types.js" */
/** @typedef {AbortSignal | undefined} Signal */

/** @param {string} id */
export function runAt(id) {
  return `/runs/${encodeURIComponent(id)}`;
}

/** @param {string} id */
function datasetAt(id) {
  return `/datasets/${encodeURIComponent(id)}`;
}

/** @type {(signal?: Signal) => Promise<T.ServiceInfo>} */
export const getService = (signal) => request("/service", { signal });

/** @type {(signal: Signal) => Promise<T.ClusterInfo>} */
export const getCluster = (signal) => request("/cluster", { signal });

/** @type {(signal: Signal) => Promise<T.Schema>} */
export const getSchema = (signal) => request("/schema/config", { signal });

/** @type {(signal: Signal) => Promise<T.ModelList>} */
export const getModels = (signal) => request("/models", { signal });

/** @type {(query: T.RequestOptions["query"], signal: Signal) => Promise<T.RunList>} */
export const getRuns = (query, signal) => request("/runs", { query, signal });

/** @type {(id: string, signal: Signal) => Promise<T.RunDetails>} */
export const getRun = (id, signal) => request(runAt(id), { signal });

/** @type {(id: string, query: T.RequestOptions["query"], signal: Signal) => Promise<T.MetricColumns>} */
export const getCurves = (id, query, signal) =>
  request(`${runAt(id)}/metrics`, { query: { ...query, format: "columns" }, signal });

/** @type {(id: string, since: number, signal: Signal) => Promise<{ metrics: T.MetricRow[] }>} */
export const getMetricsSince = (id, since, signal) => request(`${runAt(id)}/metrics`, { query: { since }, signal });

/** @type {(id: string, signal: Signal) => Promise<{ findings: T.Finding[] }>} */
export const getDiagnosis = (id, signal) => request(`${runAt(id)}/diagnosis`, { signal });

/** @type {(id: string, query: T.RequestOptions["query"], signal: Signal) => Promise<T.SamplePage>} */
export const getSamples = (id, query, signal) => request(`${runAt(id)}/samples`, { query, signal });

/** @type {(id: string, query: T.RequestOptions["query"], signal: Signal) => Promise<T.SampleTokens>} */
export const getTokens = (id, query, signal) => request(`${runAt(id)}/samples/tokens`, { query, signal });

/** @type {(id: string, query: T.RequestOptions["query"], signal: Signal) => Promise<T.LogAnswer>} */
export const getLogs = (id, query, signal) => request(`${runAt(id)}/logs`, { query, signal });

/** @type {(id: string, verb: string) => Promise<unknown>} */
export const askRunTo = (id, verb) => request(`${runAt(id)}/${verb}`, { method: "POST" });

/** @type {(id: string) => Promise<unknown>} */
export const deleteRun = (id) => request(runAt(id), { method: "DELETE", query: { confirm: id } });

/** @type {(id: string) => Promise<T.Ticket>} */
export const getDownload = (id) => request(`${runAt(id)}/model/ticket`, { method: "POST" });

/** @type {(path: string, body: unknown, signal: Signal) => Promise<T.PlanAnswer>} */
export const plan = (path, body, signal) => request(path, { method: "POST", body, signal });

/**
 * Starts a run; with the same key again it is the same run.
 * @type {(path: string, body: unknown, key: string) => Promise<{ run: T.Run }>}
 */
export const start = (path, body, key) => request(path, { method: "POST", body, extra: { "Idempotency-Key": key } });

/** @type {(signal: Signal) => Promise<T.DatasetList>} */
export const getDatasets = (signal) => request("/datasets", { query: { limit: 20 }, signal });

/** @type {(id: string, signal: Signal) => Promise<T.DatasetReport>} */
export const getDataset = (id, signal) => request(datasetAt(id), { query: { rows: 5 }, signal });

/** @type {(id: string, query: T.RequestOptions["query"], signal: Signal) => Promise<T.LengthsAnswer>} */
export const getLengths = (id, query, signal) => request(`${datasetAt(id)}/lengths`, { query, signal });

/** @type {(id: string) => Promise<unknown>} */
export const deleteDataset = (id) => request(datasetAt(id), { method: "DELETE" });

/** The HTTP API: requests, errors, the token, uploads with progress, server-sent events. Shapes: docs/service.md. */

/** @import * as T from "./types.js" */

const BASE = "api/v1";
const KEY = "rlhf-token";

/** What went wrong with a request; `status` 0: there was no response. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} code
   * @param {string} message
   * @param {T.Detail[]} details
   */
  constructor(status, code, message, details = []) {
    super(message);
    this.status = status;
    this.code = code;
    this.details = details;
  }

  /**
   * Whatever was thrown, as one of these.
   * @param {unknown} error
   */
  static of(error) {
    if (error instanceof ApiError) return error;
    return new ApiError(0, "page", error instanceof Error ? error.message : String(error));
  }
}

/**
 * Whether a request ended because its signal was aborted.
 * @param {unknown} error
 */
export function isAbort(error) {
  return error instanceof Error && error.name === "AbortError";
}

/** @returns {string} */
export function getToken() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

/** @param {string} token */
export function setToken(token) {
  try {
    token ? sessionStorage.setItem(KEY, token) : sessionStorage.removeItem(KEY);
  } catch {
    /* kept for this load only */
  }
}

/**
 * @param {Record<string, string>} extra
 * @returns {Record<string, string>}
 */
function headers(extra = {}) {
  const token = getToken();
  return token ? { ...extra, Authorization: `Bearer ${token}` } : extra;
}

/**
 * @param {string} path
 * @param {T.RequestOptions["query"]} [query]
 */
function address(path, query) {
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query || {})) {
    if (value === null || value === undefined || value === "") continue;
    for (const one of Array.isArray(value) ? value : [value]) search.append(key, String(one));
  }
  const text = search.toString();
  return `${BASE}${path}${text ? `?${text}` : ""}`;
}

/**
 * @param {number} status
 * @param {{ error?: { code: string; message: string; details?: T.Detail[] } } | null} body
 */
function refused(status, body) {
  const error = body?.error;
  const fallback = status === 401 ? "This server requires a token." : `The server answered with status ${status}.`;
  if (status === 401) document.dispatchEvent(new Event("unauthorized"));
  return new ApiError(status, error?.code || "unknown", error?.message || fallback, error?.details || []);
}

/**
 * @param {string} path
 * @param {T.RequestOptions} options
 */
async function send(path, { method = "GET", query, body, extra, signal } = {}) {
  /** @type {RequestInit} */
  const options = { method, signal, cache: "no-cache", headers: headers(extra) };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { ...options.headers, "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await fetch(address(path, query), options);
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(0, "unreachable", "The server does not answer. Is it running?");
  }
  if (!response.ok) throw refused(response.status, await response.json().catch(() => null));
  return response;
}

/**
 * One request; its JSON (null for an empty response). Throws ApiError.
 * @param {string} path
 * @param {T.RequestOptions} [options]
 * @returns {Promise<any>}
 */
export async function request(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

/**
 * A file as multipart/form-data with progress from 0 to 1; returns {promise, abort}.
 * @param {File} file
 * @param {(share: number) => void} onProgress
 */
export function upload(file, onProgress) {
  const xhr = new XMLHttpRequest();
  /** @type {Promise<T.DatasetAnswer>} */
  const promise = new Promise((resolve, reject) => {
    xhr.open("POST", address("/datasets"));
    for (const [name, value] of Object.entries(headers())) xhr.setRequestHeader(name, value);
    xhr.responseType = "json";
    xhr.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    xhr.onload = () => (xhr.status < 300 ? resolve(xhr.response) : reject(refused(xhr.status, xhr.response)));
    xhr.onerror = () => reject(new ApiError(0, "unreachable", "The upload failed: the server does not answer."));
    xhr.onabort = () => reject(new ApiError(0, "aborted", "The upload was canceled."));
    const form = new FormData();
    form.append("file", file, file.name);
    xhr.send(form);
  });
  return { promise, abort: () => xhr.abort() };
}

/**
 * Server-sent events as an async iterator of {event, id, data}. By fetch, so that the token can go with it.
 * @param {string} path
 * @param {T.RequestOptions} options
 * @returns {AsyncGenerator<T.ServerEvent>}
 */
export async function* events(path, options = {}) {
  const response = await send(path, { ...options, extra: { Accept: "text/event-stream" } });
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * @param {string} block
 * @returns {T.ServerEvent | null}
 */
function parse(block) {
  const found = { event: "message", id: /** @type {string | null} */ (null), data: /** @type {string[]} */ ([]) };
  for (const line of block.split(/\r?\n/)) {
    if (!line || line.startsWith(":")) continue;
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") found.data.push(value);
    else if (name === "event") found.event = value;
    else if (name === "id") found.id = value;
  }
  return found.data.length ? { ...found, data: JSON.parse(found.data.join("\n")) } : null;
}

/** A key that makes a repeated POST /runs harmless; `randomUUID` needs a secure context, this does not. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

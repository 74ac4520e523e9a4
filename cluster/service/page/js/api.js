/** The HTTP API: requests, errors, the token, uploads with progress, server-sent events. Shapes: docs/service.md. */

const BASE = "api/v1";
const KEY = "rlhf-token";

export class ApiError extends Error {
  constructor(status, code, message, details = []) {
    super(message);
    Object.assign(this, { status, code, details });
  }
}

export function getToken() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

export function setToken(token) {
  try {
    token ? sessionStorage.setItem(KEY, token) : sessionStorage.removeItem(KEY);
  } catch {
    /* kept for this load only */
  }
}

function headers(extra = {}) {
  const token = getToken();
  return token ? { ...extra, Authorization: `Bearer ${token}` } : extra;
}

function address(path, query) {
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query || {})) {
    if (value === null || value === undefined || value === "") continue;
    for (const one of Array.isArray(value) ? value : [value]) search.append(key, one);
  }
  const text = search.toString();
  return `${BASE}${path}${text ? `?${text}` : ""}`;
}

function refused(status, body) {
  const error = body?.error;
  const fallback = status === 401 ? "This server asks for a token." : `The server answered ${status}.`;
  if (status === 401) document.dispatchEvent(new Event("unauthorized"));
  return new ApiError(status, error?.code || "unknown", error?.message || fallback, error?.details || []);
}

async function send(path, { method = "GET", query, body, extra, signal } = {}) {
  const options = { method, signal, cache: "no-cache", headers: headers(extra) };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(address(path, query), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The server does not answer. Is it running?");
  }
  if (!response.ok) throw refused(response.status, await response.json().catch(() => null));
  return response;
}

/** One request; its JSON (null of an empty answer). Throws ApiError. */
export async function request(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

/** A file as multipart/form-data with progress from 0 to 1; returns {promise, abort}. */
export function upload(file, onProgress) {
  const xhr = new XMLHttpRequest();
  const promise = new Promise((resolve, reject) => {
    xhr.open("POST", address("/datasets"));
    for (const [name, value] of Object.entries(headers())) xhr.setRequestHeader(name, value);
    xhr.responseType = "json";
    xhr.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    xhr.onload = () => (xhr.status < 300 ? resolve(xhr.response) : reject(refused(xhr.status, xhr.response)));
    xhr.onerror = () => reject(new ApiError(0, "unreachable", "The upload broke off: the server does not answer."));
    xhr.onabort = () => reject(new ApiError(0, "aborted", "The upload was stopped."));
    const form = new FormData();
    form.append("file", file, file.name);
    xhr.send(form);
  });
  return { promise, abort: () => xhr.abort() };
}

/** Server-sent events as an async iterator of {event, id, data}. By fetch, so that the token can go with it. */
export async function* events(path, options = {}) {
  const response = await send(path, { ...options, extra: { Accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const found = { event: "message", id: null, data: [] };
  for (const line of block.split(/\r?\n/)) {
    if (!line || line.startsWith(":")) continue;
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") found.data.push(value);
    else if (name === "event" || name === "id") found[name] = value;
  }
  return found.data.length ? { ...found, data: JSON.parse(found.data.join("\n")) } : null;
}

/** A key that makes a repeated POST /runs harmless; `randomUUID` needs a secure context, this does not. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

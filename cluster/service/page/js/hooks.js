/** Hooks that views share: data of the server, kept current; the page's title; a value that settles. */
import { ApiError, isAbort } from "./api.js";
import { useCallback, useEffect, useRef, useState } from "./html.js";

/** @import * as T from "./types.js" */

/**
 * {data, error, loading, reload}: of `load(signal)`, again when `deps` change and every `poll` ms while visible.
 * With `keep` the old data stay until the new ones are there.
 * @template R
 * @param {(signal: AbortSignal) => Promise<R>} load
 * @param {unknown[]} deps
 * @returns {T.Loaded<R>}
 */
export function useResource(load, deps, { poll = 0, keep = false } = {}) {
  /** @typedef {Omit<T.Loaded<R>, "reload">} State */
  const [state, setState] = useState(/** @type {State} */ ({ data: null, error: null, loading: true }));
  const [turn, setTurn] = useState(0);
  const shown = useRef("");
  const key = JSON.stringify(deps);
  useEffect(() => {
    const stop = new AbortController();
    const fresh = shown.current !== key;
    if (fresh) setState((old) => ({ ...old, loading: true, error: null, data: keep ? old.data : null }));
    let timer = 0;
    const run = async () => {
      try {
        if (!document.hidden || fresh) {
          const data = await load(stop.signal);
          if (stop.signal.aborted) return;
          shown.current = key;
          setState({ data, error: null, loading: false });
        }
      } catch (error) {
        if (stop.signal.aborted || isAbort(error)) return;
        setState((old) => ({ ...old, error: ApiError.of(error), loading: false }));
      }
      if (poll && !stop.signal.aborted) timer = setTimeout(run, poll);
    };
    run();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [key, turn, poll]);
  const reload = useCallback(() => setTurn((old) => old + 1), []);
  return { ...state, reload };
}

/** @param {string} title */
export function useTitle(title) {
  useEffect(() => {
    document.title = title ? `${title} · rlhf-online` : "rlhf-online";
  }, [title]);
}

/**
 * The value once it has not changed for `wait` ms.
 * @template V
 * @param {V} value
 */
export function useSettled(value, wait = 350) {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), wait);
    return () => clearTimeout(timer);
  }, [value, wait]);
  return settled;
}

/** The theme's name, also after it was changed: canvases must be redrawn. */
export function useTheme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme);
  useEffect(() => {
    const changed = () => setTheme(document.documentElement.dataset.theme);
    document.addEventListener("themechange", changed);
    return () => document.removeEventListener("themechange", changed);
  }, []);
  return theme;
}

/**
 * An object kept in the session's storage; what an older page kept lacks fields, which then have their first value.
 * @template {object} V
 * @param {string} key
 * @param {V} initial
 * @returns {[V, (next: V | ((old: V) => V)) => void]}
 */
export function useStored(key, initial) {
  const [value, setValue] = useState(() => {
    try {
      return { ...initial, ...JSON.parse(sessionStorage.getItem(key) ?? "{}") };
    } catch {
      return initial;
    }
  });
  useEffect(() => {
    try {
      sessionStorage.setItem(key, JSON.stringify(value));
    } catch {
      /* full or forbidden: kept in memory */
    }
  }, [key, value]);
  return [value, setValue];
}

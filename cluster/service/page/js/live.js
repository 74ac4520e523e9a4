/** A run as it trains: details and curves, kept current by server-sent events, or by polling without them. */
import { ApiError, events, isAbort } from "./api.js";
import { getCurves, getMetricsSince, getRun, runAt } from "./endpoints.js";
import { useCallback, useEffect, useState } from "./html.js";

/** @import * as T from "./types.js" */
/**
 * waiting: the server does not answer, and is tried again; stopped: it refused, and trying again would not help.
 * @typedef {"connecting" | "live" | "polling" | "waiting" | "stopped" | "ended"} Mode
 */
/** @typedef {{ details: T.RunDetails | null; error: ApiError | null; columns: T.MetricColumns; mode: Mode }} Live */

const POINTS = 2000; // of each curve, thinned by the server; live steps are added until there are twice as many
const SOON = 600; // ms until the first look after a stream has ended
const POLL = 3000;
const ROUNDS = 5; // of polling before the stream is tried again
const REFRESH = 2500; // least time between two looks at the details
const LONGEST = 30_000; // ms between two tries while the server does not answer
const REDRAW = 120; // ms in which new steps are collected
const PASSING = [408, 425, 429]; // refusals that a later try may not meet
const ENDED = ["succeeded", "failed", "stopped", "unreadable"];

/** @param {T.Run | null | undefined} run */
export function ended(run) {
  return run !== null && run !== undefined && ENDED.includes(run.state);
}

/**
 * Whether the server refused in a way that trying again does not change: the run was deleted, the token has expired.
 * @param {unknown} error
 */
export function isFinal(error) {
  return error instanceof ApiError && error.status >= 400 && error.status < 500 && !PASSING.includes(error.status);
}

class Columns {
  /** @param {Partial<T.MetricColumns>} [columns] */
  constructor({ step = [], series = {} } = {}) {
    this.step = step;
    this.series = series;
  }

  get last() {
    return this.step.at(-1) ?? -1;
  }

  /** @param {T.MetricRow} row */
  add(row) {
    if (row.step <= this.last) return;
    const before = this.step.length;
    this.step.push(row.step);
    for (const [key, value] of Object.entries(row)) {
      if (key === "step" || key === "time") continue;
      if (!this.series[key]) this.series[key] = new Array(before).fill(null);
      this.series[key].push(value);
    }
    for (const values of Object.values(this.series)) if (values.length === before) values.push(null);
  }

  /** @param {number} last */
  cut(last) {
    const kept = this.step.filter((step) => step <= last).length;
    this.step.length = kept;
    for (const values of Object.values(this.series)) values.length = kept;
  }

  /** @returns {T.MetricColumns} */
  copy() {
    const series = Object.entries(this.series).map(([key, values]) => [key, [...values]]);
    return { step: [...this.step], series: Object.fromEntries(series) };
  }
}

/**
 * The run's state as it changes, and `refresh` to start over.
 * @param {string} id
 */
export function useLive(id) {
  const [state, setState] = useState(
    /** @type {Live} */ ({ details: null, error: null, columns: { step: [], series: {} }, mode: "connecting" }),
  );
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    new Follower(id, stop.signal, (change) => setState((old) => ({ ...old, ...change }))).follow();
    return () => stop.abort();
  }, [id, turn]);
  return { ...state, refresh: useCallback(() => setTurn((old) => old + 1), []) };
}

/**
 * Resolves when the tab is visible: at once, or when it is shown again, or when `signal` ends it.
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
function seen(signal) {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
    look();
  });
}

/**
 * The events until the tab is hidden. A browser has six connections to a server for all its tabs together: streams of
 * hidden tabs would leave none for the visible one.
 * @param {string} path
 * @param {{ query: Record<string, unknown>; signal: AbortSignal }} options
 * @returns {AsyncGenerator<T.ServerEvent>}
 */
async function* whileSeen(path, { query, signal }) {
  const stop = new AbortController();
  const hide = () => {
    if (document.hidden || signal.aborted) stop.abort();
  };
  document.addEventListener("visibilitychange", hide);
  signal.addEventListener("abort", hide);
  try {
    hide();
    yield* events(path, { query, signal: stop.signal });
  } catch (error) {
    if (!isAbort(error) || signal.aborted) throw error;
  } finally {
    document.removeEventListener("visibilitychange", hide);
    signal.removeEventListener("abort", hide);
  }
}

/**
 * Resolves after `ms`, or when `signal` ends it.
 * @param {number} ms
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

class Follower {
  /**
   * @param {string} id
   * @param {AbortSignal} signal
   * @param {(change: Partial<Live>) => void} show
   */
  constructor(id, signal, show) {
    this.id = id;
    this.signal = signal;
    this.show = show;
    this.columns = new Columns();
    this.loaded = false;
    this.run = /** @type {T.Run | null} */ (null);
    this.looked = 0; // when
    this.timer = 0;
    this.failures = 0; // in a row
  }

  /** Until the run ends, the server refuses, or `signal` stops it. */
  async follow() {
    while (!this.signal.aborted) {
      await seen(this.signal);
      try {
        if (!this.signal.aborted && (await this.watch())) return;
      } catch (error) {
        if (this.signal.aborted || isAbort(error)) return;
        this.set({ error: ApiError.of(error), mode: isFinal(error) ? "stopped" : "waiting" });
        if (isFinal(error)) return;
        await pause(Math.min(LONGEST, SOON * 2 ** this.failures), this.signal);
        this.failures += 1;
      }
    }
  }

  /** The run now, then its events, then polling; true once it has ended. */
  async watch() {
    await this.look();
    if (!this.loaded) await this.load();
    if (ended(this.run)) {
      if (this.columns.last < (this.run?.step ?? 0)) await this.load();
      this.set({ mode: "ended" });
      return true;
    }
    await this.stream();
    if (!document.hidden) await this.poll();
    return false;
  }

  async stream() {
    const query = { since: Math.max(0, this.columns.last) };
    try {
      for await (const event of whileSeen(`${runAt(this.id)}/events`, { query, signal: this.signal })) {
        this.set({ mode: "live" });
        await this.take(event);
      }
    } catch (error) {
      if (this.signal.aborted || isAbort(error) || isFinal(error)) throw error; // any other: polling may still work
    }
  }

  async poll() {
    for (let round = 0; round < ROUNDS && !this.signal.aborted && !document.hidden; round += 1) {
      await pause(round ? POLL : SOON, this.signal);
      await this.look();
      if (ended(this.run)) return;
      const { metrics } = await getMetricsSince(this.id, Math.max(0, this.columns.last), this.signal);
      for (const row of metrics) this.columns.add(row);
      if (metrics.length) this.redraw();
      this.set({ mode: "polling" });
    }
  }

  /** @param {T.ServerEvent} event */
  async take({ event, data }) {
    if (event === "metrics") this.columns.add(data);
    if (event === "reset") this.columns.cut(data.last);
    if (event === "metrics" || event === "reset") this.redraw();
    if (event === "run") this.run = data;
    if (event === "end" || Date.now() - this.looked > REFRESH) await this.look();
    if (this.columns.step.length > 2 * POINTS) await this.load();
  }

  async look() {
    this.looked = Date.now();
    const details = await getRun(this.id, this.signal);
    this.run = details.run;
    this.failures = 0;
    this.set({ details, error: null });
  }

  async load() {
    this.columns = new Columns(await getCurves(this.id, { points: POINTS }, this.signal));
    this.loaded = true;
    this.redraw();
  }

  redraw() {
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.set({ columns: this.columns.copy() });
    }, REDRAW);
  }

  /** @param {Partial<Live>} change */
  set(change) {
    if (!this.signal.aborted) this.show(change);
  }
}

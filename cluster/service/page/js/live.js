/** A run as it goes: details and curves, kept fresh by server-sent events, by polling where these do not come. */
import { events, request } from "./api.js";
import { useCallback, useEffect, useState } from "./html.js";

const POINTS = 2000; // of each curve, thinned by the server; live steps are added until there are twice as many
const POLL = 3000;
const ROUNDS = 5; // of polling before the stream is tried again
const REFRESH = 2500; // least time between two looks at the details
const ENDED = ["succeeded", "failed", "stopped", "unreadable"];

export function ended(run) {
  return ENDED.includes(run?.state);
}

class Columns {
  constructor({ step = [], series = {} } = {}) {
    this.step = step;
    this.series = series;
  }

  get last() {
    return this.step.length ? this.step.at(-1) : -1;
  }

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

  cut(last) {
    const kept = this.step.filter((step) => step <= last).length;
    this.step.length = kept;
    for (const values of Object.values(this.series)) values.length = kept;
  }

  copy() {
    return {
      step: [...this.step],
      series: Object.fromEntries(Object.entries(this.series).map(([key, values]) => [key, [...values]])),
    };
  }
}

/** {details, error, columns, mode, refresh}; mode: connecting, live, polling, waiting (for the server) or ended. */
export function useLive(id) {
  const [state, setState] = useState({
    details: null,
    error: null,
    columns: { step: [], series: {} },
    mode: "connecting",
  });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    follow(id, stop.signal, (change) => {
      if (!stop.signal.aborted) setState((old) => ({ ...old, ...change }));
    });
    return () => stop.abort();
  }, [id, turn]);
  return { ...state, refresh: useCallback(() => setTurn((old) => old + 1), []) };
}

/** Resolves once somebody looks: at once, or when the tab is shown again, or when `signal` ends it. */
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
 * tabs that nobody looks at would leave none for the one that is looked at.
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
    if (error.name !== "AbortError" || signal.aborted) throw error;
  } finally {
    document.removeEventListener("visibilitychange", hide);
    signal.removeEventListener("abort", hide);
  }
}

async function follow(id, signal, set) {
  const at = `/runs/${encodeURIComponent(id)}`;
  let columns = new Columns(),
    run = null,
    looked = 0,
    timer = 0;
  const publish = () => {
    if (!timer)
      timer = setTimeout(() => {
        timer = 0;
        set({ columns: columns.copy() });
      }, 120);
  };
  const look = async () => {
    looked = Date.now();
    const details = await request(at, { signal });
    run = details.run;
    set({ details, error: null });
  };
  const load = async () => {
    columns = new Columns(await request(`${at}/metrics`, { query: { format: "columns", points: POINTS }, signal }));
    publish();
  };
  const take = async ({ event, data }) => {
    if (event === "metrics") columns.add(data);
    if (event === "reset") columns.cut(data.last);
    if (event === "metrics" || event === "reset") publish();
    if (event === "run") {
      run = data;
      set({ mode: "live" });
    }
    if (event === "end" || Date.now() - looked > REFRESH) await look();
    if (columns.step.length > 2 * POINTS) await load();
  };
  let loaded = false;
  while (!signal.aborted) {
    await seen(signal);
    if (signal.aborted) return;
    try {
      await look();
      if (!loaded) {
        await load();
        loaded = true;
      }
      if (ended(run)) {
        if (columns.last < (run.step || 0)) await load();
        set({ mode: "ended" });
        return;
      }
      for await (const event of whileSeen(`${at}/events`, { query: { since: Math.max(0, columns.last) }, signal })) {
        set({ mode: "live" });
        await take(event);
      }
      if (document.hidden) continue; // not broken off: it goes on from the last step when the tab is shown
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      set(error.status && error.status !== 503 ? { error, mode: "waiting" } : { error, mode: "waiting" });
      if (error.status === 404 || error.status === 401) return;
    }
    await poll(at, columns, signal, { set, look, publish, isEnded: () => ended(run) });
  }
}

async function poll(at, columns, signal, { set, look, publish, isEnded }) {
  for (let round = 0; round < ROUNDS && !signal.aborted && !document.hidden; round += 1) {
    await new Promise((resolve) => setTimeout(resolve, round ? POLL : 600));
    try {
      await look();
      if (isEnded()) return;
      const { metrics } = await request(`${at}/metrics`, { query: { since: Math.max(0, columns.last) }, signal });
      for (const row of metrics) columns.add(row);
      if (metrics.length) publish();
      set({ mode: "polling" });
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      set({ error, mode: "waiting" });
    }
  }
}

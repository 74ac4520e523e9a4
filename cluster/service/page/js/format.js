/** Numbers, sizes and times as people read them. Pure. */

/** @import * as T from "./types.js" */

/**
 * About three significant digits, thousands grouped: 12408 → "12,408", 0.04167 → "0.0417", 1e-6 → "1e-6".
 * @param {number | null | undefined} value
 * @returns {string}
 */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 0) return `−${number(-value)}`;
  const size = value;
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e9)
    return value
      .toExponential(2)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

/** @param {number | null | undefined} value */
export function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(value * 100)} %`;
}

/**
 * @param {number} value
 * @param {string} noun
 */
export function count(value, noun, plural = `${noun}s`) {
  return `${Math.round(value).toLocaleString("en")} ${value === 1 ? noun : plural}`;
}

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB"];
/** @param {number | null | undefined} value */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const unit = Math.min(SIZES.length - 1, value < 1 ? 0 : Math.floor(Math.log2(value) / 10));
  const size = value / 1024 ** unit;
  return `${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${SIZES[unit]}`;
}

/**
 * 601.6 → "10 min", 5400 → "1 h 30 min", 3.2 → "3.2 s".
 * @param {number | null | undefined} seconds
 */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** @param {string | null} time */
export function ago(time, now = Date.now()) {
  if (!time) return "–";
  const seconds = Math.max(0, (now - Date.parse(time)) / 1000);
  return seconds < 45 ? "just now" : `${duration(seconds)} ago`;
}

/** @param {string | null} time */
export function clock(time) {
  return time ? new Date(time).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" }) : "–";
}

/**
 * How long a run took or has taken.
 * @param {T.Run} run
 */
export function took(run) {
  if (!run.started) return null;
  return ((run.ended ? Date.parse(run.ended) : Date.now()) - Date.parse(run.started)) / 1000;
}

/**
 * 596049920 → "0.6 B".
 * @param {number | null} value
 */
export function parameters(value) {
  if (!value) return null;
  if (value < 1e6) return `${Math.round(value / 1e3)} K parameters`;
  return value < 1e8 ? `${number(value / 1e6)} M parameters` : `${number(value / 1e9)} B parameters`;
}

/** Curves: uPlot in a figure, with colors of the theme, decimation, a band, and keys that follow the cursor. */
import uPlot from "../vendor/uplot.js";
import { number } from "./format.js";
import { useTheme } from "./hooks.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";

/** @import * as T from "./types.js" */

const MOST = 3000; // points of a curve that are drawn: beyond two a pixel nothing more is seen
const HEIGHT = 210;

/**
 * Lines thinned alike to at most `most` points: the lowest and highest of the first line in each bucket, and both ends.
 * @param {T.Values[]} data the steps, then the lines
 */
export function decimate(data, most = MOST) {
  const length = data[0].length;
  if (length <= most) return data;
  const guide = data[1];
  const buckets = Math.floor(most / 2);
  const kept = [0];
  for (let bucket = 0; bucket < buckets; bucket += 1) {
    const start = Math.max(1, Math.floor((bucket * length) / buckets));
    const end = Math.min(length - 1, Math.floor(((bucket + 1) * length) / buckets));
    kept.push(...extremes(guide, start, end));
  }
  kept.push(length - 1);
  return data.map((line) => kept.map((i) => line[i]));
}

/**
 * Where the lowest and the highest are, in order; without any value, the first place.
 * @param {T.Values} values
 * @param {number} start
 * @param {number} end
 */
function extremes(values, start, end) {
  let low = -1;
  let high = -1;
  let lowest = Number.POSITIVE_INFINITY;
  let highest = Number.NEGATIVE_INFINITY;
  for (let i = start; i < end; i += 1) {
    const value = values[i];
    if (!exists(value)) continue;
    if (value < lowest) [low, lowest] = [i, value];
    if (value > highest) [high, highest] = [i, value];
  }
  if (low < 0) return start < end ? [start] : [];
  return low === high ? [low] : [Math.min(low, high), Math.max(low, high)];
}

/** @param {number} index */
export function color(index) {
  return getComputedStyle(document.documentElement)
    .getPropertyValue(`--c${(index % 6) + 1}`)
    .trim();
}

/**
 * Lowest and highest of an axis: some air about the curve; a flat line in the middle.
 * @param {unknown} _
 * @param {number | null | undefined} low
 * @param {number} high
 * @returns {[number, number]}
 */
function span(_, low, high) {
  if (low === null || low === undefined) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  return uPlot.rangeNum(low, high, 0.1, true);
}

/**
 * @param {string} hex
 * @param {number} alpha
 */
function withAlpha(hex, alpha) {
  return `${hex}${Math.round(alpha * 255)
    .toString(16)
    .padStart(2, "0")}`;
}

/** @param {boolean} right whether there is an axis on the right too */
function axes(right) {
  const style = getComputedStyle(document.documentElement);
  const muted = style.getPropertyValue("--muted").trim();
  const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
  const font = `11px ${style.fontFamily}`;
  const base = { stroke: muted, font, ticks: { show: false } };
  /** @type {(_: unknown, values: number[]) => string[]} */
  const ticks = (_, values) => values.map(number);
  const below = { ...base, grid: { show: false }, values: ticks, size: 28, space: 60 };
  const left = { ...base, grid, values: ticks, size: 54, space: 36 };
  const second = { ...base, scale: "right", side: 1, grid: { show: false }, values: ticks, size: 54 };
  return right ? [below, left, second] : [below, left];
}

/**
 * The distance `sign` of a spread around a line.
 * @param {T.Values} values
 * @param {T.Values} spread
 * @param {1 | -1} sign
 */
function edge(values, spread, sign) {
  return values.map((value, i) => {
    const wide = spread[i];
    return exists(value) && exists(wide) ? value + sign * wide : null;
  });
}

/**
 * @param {number | null | undefined} value
 * @returns {value is number}
 */
function exists(value) {
  return value !== null && value !== undefined;
}

/**
 * uPlot's data, series and bands.
 * @param {T.Line[]} lines
 * @param {number[]} steps
 */
function prepare(lines, steps) {
  const data = [steps, ...lines.map((line) => line.values)];
  const series = /** @type {object[]} */ ([{}]);
  const bands = /** @type {object[]} */ ([]);
  lines.forEach((line, index) => {
    const stroke = color(line.color ?? index);
    series.push({
      label: line.label,
      stroke,
      width: 1.6,
      scale: line.right ? "right" : "y",
      spanGaps: true,
      dash: line.dashed ? [5, 4] : undefined,
      points: { show: line.points || steps.length < 2, size: 6, fill: stroke },
    });
  });
  lines.forEach((line, index) => {
    if (!line.band) return;
    const stroke = withAlpha(color(line.color ?? index), 0.18);
    bands.push({ series: [data.length, data.length + 1], fill: stroke });
    for (const sign of /** @type {const} */ ([1, -1])) {
      data.push(edge(line.values, line.band, sign));
      series.push({ stroke: "transparent", width: 0, points: { show: false }, scale: line.right ? "right" : "y" });
    }
  });
  return { data, series, bands };
}

/**
 * @param {string} title
 * @param {T.Line[]} lines
 * @param {number[]} steps
 */
function words(title, lines, steps) {
  const parts = lines.map((line) => {
    const finite = line.values.filter(exists);
    if (!finite.length) return `${line.label}: nothing yet`;
    const low = finite.reduce((a, b) => Math.min(a, b));
    const high = finite.reduce((a, b) => Math.max(a, b));
    return `${line.label}: last ${number(finite.at(-1))}, lowest ${number(low)}, highest ${number(high)}`;
  });
  return `${title}, ${steps.length} points to step ${steps.at(-1) ?? 0}. ${parts.join(". ")}.`;
}

/** @param {{ title: string; unit: string; steps: number[]; lines: T.Line[]; sync?: string }} props */
export function Chart({ title, unit, steps, lines, sync }) {
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  const plot = useRef(/** @type {uPlot | null} */ (null));
  const theme = useTheme();
  const [cursor, setCursor] = useState(/** @type {number | null | undefined} */ (null));
  const right = lines.some((line) => line.right);
  const shape = JSON.stringify([
    theme,
    right,
    lines.map((line) => [line.label, line.color, !!line.band, line.right, line.dashed, line.points]),
    steps.length < 2,
  ]);
  const made = useMemo(() => {
    const { data, ...rest } = prepare(lines, steps);
    return { ...rest, data: decimate(data) };
  }, [steps, lines, theme]);
  useEffect(() => {
    const figure = box.current;
    if (!figure) return undefined;
    /** @param {uPlot} u */
    const follow = (u) => setCursor(u.cursor.idx);
    const options = {
      width: figure.clientWidth,
      height: HEIGHT,
      padding: [8, right ? 0 : 10, 0, 0],
      legend: { show: false },
      series: made.series,
      bands: made.bands,
      axes: axes(right),
      scales: { x: { time: false }, y: { range: span }, ...(right ? { right: { range: span } } : {}) },
      cursor: { y: false, points: { size: 7 }, ...(sync ? { sync: { key: sync } } : {}) },
      hooks: { setCursor: [follow] },
    };
    const u = new uPlot(options, made.data, figure);
    plot.current = u;
    const resized = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width > 0 && width !== u.width) u.setSize({ width, height: HEIGHT });
    });
    resized.observe(figure);
    return () => {
      resized.disconnect();
      u.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => {
    const u = plot.current;
    if (!u || u.data === made.data) return;
    const zoomed = u.scales.x.min > u.data[0][0] || u.scales.x.max < (u.data[0].at(-1) ?? 0);
    u.setData(made.data, !zoomed);
    if (zoomed) u.redraw();
  }, [made]);
  const at = cursor === null || cursor === undefined || cursor >= made.data[0].length ? null : cursor;
  return html`<figure class="chart">
    <figcaption>
      <strong>${title}</strong>
      <span class="muted small">${at === null ? unit : `step ${number(made.data[0][at])}`}</span>
    </figcaption>
    <div ref=${box} role="img" aria-label=${words(title, lines, steps)}></div>
    <div class="keys" aria-hidden="true">
      ${lines.map((line, index) => {
        const values = made.data[index + 1];
        return html`<span class="key">
          <span class="dot b${((line.color ?? index) % 6) + 1}"></span>
          ${line.label} <b>${number(at === null ? last(values) : values[at])}</b>
        </span>`;
      })}
    </div>
  </figure>`;
}

/** @param {T.Values} values */
function last(values) {
  return values.findLast(exists) ?? null;
}

/**
 * A small curve without axes: the evidence of a finding.
 * @param {{ values: T.Values; label: string }} props
 */
export function Spark({ values, label }) {
  const finite = values.flatMap((v, i) => (exists(v) ? [[i, v]] : []));
  if (finite.length < 2) return null;
  const numbers = finite.map(([, v]) => v);
  const low = Math.min(...numbers),
    high = Math.max(...numbers);
  /** @param {number} i */
  const x = (i) => (i / (values.length - 1)) * 100;
  /** @param {number} v */
  const y = (v) => (high === low ? 20 : 37 - ((v - low) / (high - low)) * 34);
  const path = finite.map(([i, v], n) => `${n ? "L" : "M"}${x(i).toFixed(2)} ${y(v).toFixed(2)}`).join("");
  return html`<svg class="spark" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label=${label}>
    <path d=${path} />
  </svg>`;
}

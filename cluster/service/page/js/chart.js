/** Curves: uPlot in a figure, with colours of the theme, decimation, a band, and keys that follow the cursor. */
import uPlot from "../vendor/uplot.js";
import { number } from "./format.js";
import { useTheme } from "./hooks.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";

const MOST = 3000; // points of a curve that are drawn: beyond two a pixel nothing more is seen
const HEIGHT = 210;

/**
 * Lines thinned alike to at most `most` points: the lowest and highest of the first line in each bucket, and both ends.
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
    let low = -1,
      high = -1;
    for (let i = start; i < end; i += 1) {
      if (guide[i] === null || guide[i] === undefined) continue;
      if (low < 0 || guide[i] < guide[low]) low = i;
      if (high < 0 || guide[i] > guide[high]) high = i;
    }
    if (low < 0 && start < end) low = high = start;
    if (low >= 0) kept.push(...(low === high ? [low] : low < high ? [low, high] : [high, low]));
  }
  kept.push(length - 1);
  return data.map((line) => kept.map((i) => line[i]));
}

export function colour(index) {
  return getComputedStyle(document.documentElement)
    .getPropertyValue(`--c${(index % 6) + 1}`)
    .trim();
}

/** Lowest and highest of an axis: some air about the curve; a flat line in the middle. */
function span(_, low, high) {
  if (low === null || low === undefined) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  return uPlot.rangeNum(low, high, 0.1, true);
}

function withAlpha(hex, alpha) {
  return `${hex}${Math.round(alpha * 255)
    .toString(16)
    .padStart(2, "0")}`;
}

function axes(right) {
  const style = getComputedStyle(document.documentElement);
  const muted = style.getPropertyValue("--muted").trim();
  const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
  const font = `11px ${style.fontFamily}`;
  const base = { stroke: muted, font, ticks: { show: false } };
  const ticks = (_, values) => values.map((value) => number(value));
  const made = [
    { ...base, grid: { show: false }, values: ticks, size: 28, space: 60 },
    { ...base, grid, values: ticks, size: 54, space: 36 },
  ];
  if (right) made.push({ ...base, scale: "right", side: 1, grid: { show: false }, values: ticks, size: 54 });
  return made;
}

/** `lines`: [{label, values, right, dashed, points, band: values of the spread}]; `steps` the x values. */
function prepare(lines, steps) {
  const data = [steps, ...lines.map((line) => line.values)];
  const series = [{}];
  const bands = [];
  lines.forEach((line, index) => {
    const stroke = colour(line.colour ?? index);
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
    const stroke = withAlpha(colour(line.colour ?? index), 0.18);
    const edge = (sign) =>
      line.values.map((v, i) =>
        v === null || v === undefined || line.band[i] === null || line.band[i] === undefined
          ? null
          : v + sign * line.band[i],
      );
    bands.push({ series: [data.length, data.length + 1], fill: stroke });
    for (const sign of [1, -1]) {
      data.push(edge(sign));
      series.push({ stroke: "transparent", width: 0, points: { show: false }, scale: line.right ? "right" : "y" });
    }
  });
  return { data, series, bands };
}

function words(title, lines, steps) {
  const parts = lines.map((line) => {
    const finite = line.values.filter((v) => v !== null && v !== undefined);
    if (!finite.length) return `${line.label}: nothing yet`;
    let low = finite[0],
      high = finite[0];
    for (const value of finite) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return `${line.label}: last ${number(finite.at(-1))}, lowest ${number(low)}, highest ${number(high)}`;
  });
  return `${title}, ${steps.length} points to step ${steps.at(-1) ?? 0}. ${parts.join(". ")}.`;
}

export function Chart({ title, unit, steps, lines, sync }) {
  const box = useRef(null);
  const plot = useRef(null);
  const theme = useTheme();
  const [cursor, setCursor] = useState(null);
  const right = lines.some((line) => line.right);
  const shape = JSON.stringify([
    theme,
    right,
    lines.map((line) => [line.label, line.colour, !!line.band, line.right, line.dashed, line.points]),
    steps.length < 2,
  ]);
  const made = useMemo(() => {
    const { data, ...rest } = prepare(lines, steps);
    return { ...rest, data: decimate(data) };
  }, [steps, lines, theme]);
  useEffect(() => {
    const options = {
      width: box.current.clientWidth,
      height: HEIGHT,
      padding: [8, right ? 0 : 10, 0, 0],
      legend: { show: false },
      series: made.series,
      bands: made.bands,
      axes: axes(right),
      scales: { x: { time: false }, y: { range: span }, ...(right ? { right: { range: span } } : {}) },
      cursor: { y: false, points: { size: 7 }, ...(sync ? { sync: { key: sync } } : {}) },
      hooks: { setCursor: [(u) => setCursor(u.cursor.idx)] },
    };
    const u = new uPlot(options, made.data, box.current);
    plot.current = u;
    const resized = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width > 0 && width !== u.width) u.setSize({ width, height: HEIGHT });
    });
    resized.observe(box.current);
    return () => {
      resized.disconnect();
      u.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => {
    const u = plot.current;
    if (!u || u.data === made.data) return;
    const zoomed = u.scales.x.min > u.data[0][0] || u.scales.x.max < u.data[0].at(-1);
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
          <span class="dot b${((line.colour ?? index) % 6) + 1}"></span>
          ${line.label} <b>${number(at === null ? last(values) : values[at])}</b>
        </span>`;
      })}
    </div>
  </figure>`;
}

function last(values) {
  for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

/** A small curve without axes: the evidence of a finding. */
export function Spark({ values, label }) {
  const finite = values.map((v, i) => [i, v]).filter(([, v]) => v !== null);
  if (finite.length < 2) return null;
  const numbers = finite.map(([, v]) => v);
  const low = Math.min(...numbers),
    high = Math.max(...numbers);
  const x = (i) => (i / (values.length - 1)) * 100;
  const y = (v) => (high === low ? 20 : 37 - ((v - low) / (high - low)) * 34);
  const path = finite.map(([i, v], n) => `${n ? "L" : "M"}${x(i).toFixed(2)} ${y(v).toFixed(2)}`).join("");
  return html`<svg class="spark" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label=${label}>
    <path d=${path} />
  </svg>`;
}

// The part of uPlot's types that js/chart.js uses.
declare class uPlot {
  constructor(options: object, data: unknown[][], target: Element | null);
  static rangeNum(low: number, high: number, extra: number, soft: boolean): [number, number];
  readonly data: number[][];
  readonly width: number;
  readonly cursor: { idx: number | null | undefined };
  readonly scales: { x: { min: number; max: number } };
  setSize(size: { width: number; height: number }): void;
  setData(data: unknown[][], resetScales: boolean): void;
  redraw(): void;
  destroy(): void;
}
export default uPlot;

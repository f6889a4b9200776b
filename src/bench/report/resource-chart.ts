// CPU, memory, disk writes and network over the time of a start, a line for each snapshotter, with the phases of each as a
// band above. Knows nothing of the benchmark: whoever has traces can draw them.
import { max } from 'd3-array';
import type { ResourceSample, ResourceTrace } from '../result.ts';
import { linearScale, roundTicks, type Scale, timeAxis } from './axis.ts';
import { phaseBand, phasesFromEnds } from './phase-band.ts';
import { byteUnit, duration } from './quantities.ts';
import { element, fitted, line, svgDocument, text } from './svg.ts';
import { FONT_PIXELS, seriesLine, styleSheet } from './theme.ts';

const WIDTH = 980;
const MARGIN = 20;
const LEFT = 128;
const BAND = 18;
const PANEL = 96;
const GAP = 22;
const TOP = 66;

type Quantity = Exclude<keyof ResourceSample, 'atMs'>;

const PANELS: readonly { readonly of: Quantity; readonly title: string; readonly per?: string }[] = [
  { of: 'cpuCores', title: 'CPU' },
  { of: 'memoryBytes', title: 'memory' },
  { of: 'diskWriteBytesPerSecond', title: 'disk writes', per: '/s' },
  { of: 'networkBytesPerSecond', title: 'network', per: '/s' },
];

export interface ResourceChartOptions {
  readonly title?: string;
  /** Names in the order that gives colours; by default the order in which they first come. */
  readonly snapshotters?: readonly string[];
}

/** `traces` on one time axis; several of one snapshotter share its colour, and the first gives the phases. */
export function renderResourceChart(traces: readonly ResourceTrace[], options: ResourceChartOptions = {}): string {
  const names = [...new Set(traces.map((trace) => trace.snapshotter))];
  const order = options.snapshotters ?? names;
  const first = traces[0];
  const title =
    options.title ?? (first === undefined ? 'No trace' : `What a start of ${first.image} uses: ${first.link}`);
  const mostMs = Math.max(1, ...traces.map(lengthMs));
  const x = linearScale(0, mostMs, LEFT, WIDTH - MARGIN);
  const bands = names.flatMap((name, at) => band(traces.find((trace) => trace.snapshotter === name)!, x, at, order));
  const panelsTop = TOP + names.length * (BAND + 5) + 18;
  const bottom = panelsTop + PANELS.length * (PANEL + GAP) - GAP;
  const ends = names.map((name) => {
    const trace = traces.find((each) => each.snapshotter === name)!;
    return `${name} takes ${duration(trace.marks.at(-1)?.atMs ?? lengthMs(trace))}`;
  });
  return svgDocument(
    {
      title,
      description: `CPU, memory, disk writes and network over time. ${ends.join(', ')}.`,
      width: WIDTH,
      height: bottom + 34,
      body: [
        text(MARGIN, 30, fitted(title, WIDTH - 2 * MARGIN, FONT_PIXELS.title), { class: 'h' }),
        text(MARGIN, 50, 'Above: phases of each start. Dotted: where its phases end.', { class: 's' }),
        ...bands,
        ...PANELS.flatMap((each, at) => {
          const top = panelsTop + at * (PANEL + GAP);
          return panel(each, traces, x, top, mostMs, order, at === PANELS.length - 1);
        }),
        ...names.flatMap((name) => {
          const trace = traces.find((each) => each.snapshotter === name)!;
          const style = `mark ${seriesLine(order.indexOf(name))}`;
          return trace.marks.map((mark) => line(x(mark.atMs), panelsTop - 6, x(mark.atMs), bottom, style));
        }),
      ],
    },
    styleSheet(),
  );
}

function lengthMs(trace: ResourceTrace): number {
  const sampled = max(trace.samples, (sample) => sample.atMs) ?? 0;
  return Math.max(sampled, max(trace.marks, (mark) => mark.atMs) ?? 0);
}

/** Phases of one snapshotter; the stroke beside its name is the legend of the curves. */
function band(trace: ResourceTrace, x: Scale, at: number, order: readonly string[]): string[] {
  const top = TOP + at * (BAND + 5);
  const style = `curve ${seriesLine(order.indexOf(trace.snapshotter))}`;
  return [
    line(MARGIN, top + BAND / 2, MARGIN + 16, top + BAND / 2, style),
    text(MARGIN + 22, top + BAND / 2 + 4, fitted(trace.snapshotter, LEFT - MARGIN - 26, FONT_PIXELS.text)),
    // The mark at the end of the run says that the container was ready.
    ...phaseBand(
      phasesFromEnds(trace.marks.map((mark) => (mark.name === 'ready' ? { ...mark, name: 'run' } : mark))),
      x,
      top,
      BAND,
    ),
  ];
}

function panel(
  { of, title, per }: (typeof PANELS)[number],
  traces: readonly ResourceTrace[],
  x: Scale,
  top: number,
  mostMs: number,
  order: readonly string[],
  last: boolean,
): string[] {
  const bottom = top + PANEL;
  const most = max(traces, (trace) => max(trace.samples, (sample) => sample[of]) ?? 0) ?? 0;
  const { factor, unit } = of === 'cpuCores' ? { factor: 1, unit: 'cores' } : byteUnit(most);
  const y = linearScale(0, most * 1.05, bottom, top);
  const values = roundTicks(most / factor, 3);
  return [
    text(MARGIN, top + 14, title, { class: 'b' }),
    text(MARGIN, top + 30, `${unit}${per ?? ''}`, { class: 's' }),
    ...values.flatMap((value) => [
      line(x.from, y(value * factor), x.to, y(value * factor), 'grid'),
      text(x.from - 8, y(value * factor) + 4, String(Number(value.toFixed(6))), { class: 's', anchor: 'end' }),
    ]),
    ...timeAxis(x, mostMs, top, bottom, 8, last),
    ...traces.map((trace) => curve(trace, of, x, y, order)),
  ];
}

function curve(trace: ResourceTrace, of: Quantity, x: Scale, y: Scale, order: readonly string[]): string {
  const place = (atMs: number, value: number): string => `${x(atMs).toFixed(1)},${y(value).toFixed(1)}`;
  // A rate is the mean since the sample before it, drawn as such: a sloped line would show what was not measured, and the
  // area under it would not be the sum. Memory is of the moment.
  const points = trace.samples.flatMap((sample, at) => {
    const here = place(sample.atMs, sample[of]);
    return of === 'memoryBytes' ? [here] : [place(trace.samples[at - 1]?.atMs ?? 0, sample[of]), here];
  });
  const style = `curve ${seriesLine(order.indexOf(trace.snapshotter))}`;
  return points.length === 0 ? '' : element('polyline', { points: points.join(' '), class: style });
}

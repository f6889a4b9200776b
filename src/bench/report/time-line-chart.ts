// One start as it went, for each snapshotter below each other on the same time axis: its phases as a band, and each request
// that the registry saw as a bar. Requests at the same time lie in lanes below each other. Starts much shorter than
// the longest are drawn once more on an axis of their own, or nothing of them would be seen.
import { max } from 'd3-array';
import type { ColdStartResult, RequestTime } from '../result.ts';
import { linearScale, type Scale, timeAxis } from './axis.ts';
import { phaseBand, phasesFromEnds } from './phase-band.ts';
import { bytes, count, duration } from './quantities.ts';
import { fitted, rect, svgDocument, text, textWidth } from './svg.ts';
import { FONT_PIXELS, PHASES, phaseFill, REQUEST_KINDS, requestFill, styleSheet } from './theme.ts';

const WIDTH = 980;
const MARGIN = 20;
const BAND = 20;
const TOP = 80;
/** Height of all lanes of a panel at most; many lanes become thin ones. */
const LANES_HEIGHT = 220;
const ENLARGE_BELOW = 0.4;

/** `starts` are of one image on one link, in the order in which they are drawn. */
export function timeLineChart(starts: readonly ColdStartResult[]): string {
  const first = starts[0];
  const title = first === undefined ? 'No start' : `One start of ${first.image}: ${first.link}`;
  const longestMs = Math.max(1, ...starts.map(lengthMs));
  const body: string[] = [];
  let y = TOP;
  for (const start of starts) {
    const drawn = panel(start, longestMs, y, '');
    body.push(...drawn.body);
    y = drawn.bottom;
  }
  const short = starts.filter((start) => lengthMs(start) <= longestMs * ENLARGE_BELOW);
  const shortMs = Math.max(1, ...short.map(lengthMs));
  for (const start of short) {
    const drawn = panel(start, shortMs, y, ', enlarged: another time axis');
    body.push(...drawn.body);
    y = drawn.bottom;
  }
  return svgDocument(
    {
      title,
      description: `Phases and requests over time. ${starts.map((start) => `${panelTitle(start, '')}.`).join(' ')}`,
      width: WIDTH,
      height: y + 4,
      body: [
        text(MARGIN, 30, fitted(title, WIDTH - 2 * MARGIN, FONT_PIXELS.title), { class: 'h' }),
        text(
          MARGIN,
          50,
          'Band: phases. Bars: requests as the registry saw them, those at the same time below each other.',
          {
            class: 's',
          },
        ),
        ...legend(starts, 68),
        ...body,
      ],
    },
    styleSheet(),
  );
}

function lengthMs(start: ColdStartResult): number {
  return Math.max(start.phases.totalMs, max(start.requestTimes ?? [], (request) => request.endMs) ?? 0);
}

function panelTitle(start: ColdStartResult, suffix: string): string {
  const requests = `${count(start.requests)} ${start.requests === 1 ? 'request' : 'requests'}`;
  return `${start.snapshotter}: ${duration(start.phases.totalMs)}, ${requests}, ${bytes(start.wireBytes)}${suffix}`;
}

function panel(start: ColdStartResult, domainMs: number, top: number, suffix: string) {
  const x = linearScale(0, domainMs, MARGIN, WIDTH - MARGIN - 12);
  const bandTop = top + 28;
  const lanes = laneOf(start.requestTimes ?? []);
  const laneCount = Math.max(1, ...lanes.map((lane) => lane + 1));
  const pitch = Math.min(11, LANES_HEIGHT / laneCount);
  const lanesTop = bandTop + BAND + 6;
  const bottom = lanesTop + laneCount * pitch + 4;
  const missing = start.requestTimes === undefined || start.requestTimes.length === 0;
  return {
    bottom: bottom + 28,
    body: [
      text(MARGIN, top + 20, fitted(panelTitle(start, suffix), WIDTH - 2 * MARGIN, FONT_PIXELS.text), { class: 'b' }),
      ...timeAxis(x, domainMs, bandTop, bottom, 8),
      ...phaseBand(phasesOf(start), x, bandTop, BAND),
      ...(missing ? [text(MARGIN + 4, lanesTop + 9, 'requests were not recorded', { class: 's' })] : []),
      ...(start.requestTimes ?? []).map((request, at) =>
        requestBar(request, x, lanesTop + lanes[at]! * pitch, Math.max(1, pitch - 2)),
      ),
    ],
  };
}

function requestBar(request: RequestTime, x: Scale, top: number, height: number): string {
  const tip = `${request.kind}: ${bytes(request.bytes)}, ${duration(request.startMs)} to ${duration(request.endMs)}`;
  // A request of no visible length is still a request.
  const width = Math.max(1.5, x(request.endMs) - x(request.startMs));
  return rect(x(request.startMs), top, width, height, requestFill(request.kind), tip);
}

function phasesOf(start: ColdStartResult) {
  const { controlMs, pullMs, createMs, runMs } = start.phases;
  const told = controlMs !== undefined && controlMs <= pullMs;
  return phasesFromEnds([
    ...(told ? [{ name: 'control', atMs: controlMs }] : []),
    { name: 'pull', label: told ? 'rest of pull' : 'pull', atMs: pullMs },
    { name: 'create', atMs: pullMs + createMs },
    { name: 'run', atMs: pullMs + createMs + runMs },
  ]);
}

/** For each request the first lane that is free when it begins. Exported for its test. */
export function laneOf(requests: readonly RequestTime[]): number[] {
  const lanes = Array<number>(requests.length).fill(0);
  const freeAt: number[] = [];
  const order = requests.map((_, at) => at).sort((a, b) => requests[a]!.startMs - requests[b]!.startMs || a - b);
  for (const at of order) {
    const request = requests[at]!;
    const free = freeAt.findIndex((time) => time <= request.startMs);
    const lane = free < 0 ? freeAt.length : free;
    freeAt[lane] = request.endMs;
    lanes[at] = lane;
  }
  return lanes;
}

/** The phases, then the kinds of request that occur. */
function legend(starts: readonly ColdStartResult[], y: number): string[] {
  const seen = new Set(starts.flatMap((start) => (start.requestTimes ?? []).map((request) => request.kind)));
  const phases = PHASES.map((phase) => ({ label: phase, fill: phaseFill(phase) }));
  const kinds = REQUEST_KINDS.filter((kind) => seen.has(kind)).map((kind) => ({
    label: kind,
    fill: requestFill(kind),
  }));
  let x = MARGIN;
  const entries = (list: readonly { readonly label: string; readonly fill: string }[]): string[] =>
    list.flatMap(({ label, fill }) => {
      const at = x;
      x += 14 + textWidth(label, FONT_PIXELS.small) + 16;
      return [rect(at, y - 9, 10, 10, fill), text(at + 14, y, label, { class: 's' })];
    });
  const band = entries(phases);
  x += 24;
  return [...band, ...entries(kinds)];
}

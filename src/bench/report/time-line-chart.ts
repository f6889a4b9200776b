// One start as it went, for each snapshotter below each other on the same time axis: its phases as a band, and each request
// that the registry saw as a bar. Requests at the same time lie in lanes below each other. Where a start is much shorter
// than the longest, it is drawn once more on its own axis, or nothing of it would be seen.
import { max } from 'd3-array';
import type { ColdStartResult, RequestTime } from '../result.ts';
import { linearScale, type Scale, timeAxis } from './axis.ts';
import { phaseBand, phasesFromEnds } from './phase-band.ts';
import { bytes, count, duration } from './quantities.ts';
import { fitted, rect, svgDocument, text, textWidth } from './svg.ts';
import { FONT_PIXELS, REQUEST_KINDS, requestFill, styleSheet } from './theme.ts';

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
  for (const start of starts) {
    if (lengthMs(start) > longestMs * ENLARGE_BELOW) continue;
    const drawn = panel(start, Math.max(1, lengthMs(start)), y, ', enlarged: own time axis');
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
  return phasesFromEnds([
    ...(controlMs === undefined || controlMs > pullMs ? [] : [{ name: 'control', atMs: controlMs }]),
    { name: 'pull', atMs: pullMs },
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

/** The kinds that occur. */
function legend(starts: readonly ColdStartResult[], y: number): string[] {
  const seen = new Set(starts.flatMap((start) => (start.requestTimes ?? []).map((request) => request.kind)));
  let x = MARGIN;
  return REQUEST_KINDS.filter((kind) => seen.has(kind)).flatMap((kind) => {
    const at = x;
    x += 14 + textWidth(kind, FONT_PIXELS.small) + 18;
    return [rect(at, y - 9, 10, 10, requestFill(kind)), text(at + 14, y, kind, { class: 's' })];
  });
}

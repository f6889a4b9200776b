// A trace as an SVG file: each first read at its time and place, in the colour of how it met its bytes, and below on the same
// time axis how many bytes those were. In the style of the benchmark charts, light and dark.
import { linearScale, type Scale, timeAxis } from '../bench/report/axis.ts';
import { duration } from '../bench/report/quantities.ts';
import { fitted, line, rect, svgDocument, text, textWidth } from '../bench/report/svg.ts';
import { FONT_PIXELS, styleSheet } from '../bench/report/theme.ts';
import { formatBytes } from '../units.ts';
import type { AccessTrace, Outcome } from './access-trace.ts';
import { cutPath, plural, shownName } from './shown-name.ts';
import { layOut, type TraceBand, type TraceLayout, type TraceMark } from './trace-layout.ts';
import { OUTCOME_WORDS, OUTCOMES_BY_WAIT, summarize, type TraceSummary } from './trace-summary.ts';

const WIDTH = 1080;
const MARGIN = 20;
const LABELS = 300;
const LEFT = MARGIN + LABELS + 8;
const RIGHT = WIDTH - MARGIN - 24;
const TOP = 112;
const PLOT_HEIGHT = 460;
/** A label has room in every band, however few its bytes. */
const LEAST_BAND = 18;
const MOST_BANDS = 20;
const BARS_HEIGHT = 90;
const MOST_BARS = 60;
/** Least size of a mark, pixels: a read of no visible size is still a read. */
const MARK_WIDTH = 4;
const MARK_HEIGHT = 2.4;

/** In light and dark; hues differ in lightness too. The worse for the reader, the more it stands out. */
const COLOURS: Readonly<Record<Outcome, readonly [string, string]>> = {
  hit: ['#9aa3b2', '#6b7585'],
  ahead: ['#0b62c4', '#58a6ff'],
  late: ['#e08700', '#ffc34d'],
  miss: ['#b3123b', '#ff6b8a'],
};

/** A complete SVG file. */
export function traceChart(trace: AccessTrace): string {
  const summary = summarize(trace, MOST_BARS);
  const layout = layOut(trace, MOST_BANDS);
  const name = `${shownName(trace.repository) || 'an image without a name'}${trace.tag === '' ? '' : `:${shownName(trace.tag)}`}`;
  const title = `Reads of a start of ${name}`;
  const words = described(trace, summary);
  const body = [
    text(MARGIN, 30, fitted(title, WIDTH - 2 * MARGIN, FONT_PIXELS.title), { class: 'h' }),
    text(MARGIN, 50, words, { class: 't' }),
    ...legend(summary, 74),
  ];
  const empty = trace.events.length === 0;
  const drawn = empty
    ? { body: [text(MARGIN, TOP + 12, 'No read was recorded.')], bottom: TOP + 20 }
    : plots(layout, summary);
  return svgDocument(
    { title, description: words, width: WIDTH, height: drawn.bottom + 12, body: [...body, ...drawn.body] },
    `${styleSheet()}${ownStyle()}`,
  );
}

function described(trace: AccessTrace, summary: TraceSummary): string {
  const { reads, fileCount, bytes, durationMs, presentShare } = summary;
  const merged = trace.runs === 1 ? 'One run' : `${trace.runs} runs`;
  const here =
    presentShare === undefined
      ? 'reads of present bytes are not in it'
      : `${(100 * presentShare).toFixed(0)} % were here when asked for`;
  return `${merged}: ${formatBytes(bytes)} in ${plural(reads, 'read')} of ${plural(fileCount, 'file')} within ${duration(durationMs)}; ${here}.`;
}

function legend(summary: TraceSummary, y: number): string[] {
  let x = MARGIN;
  return OUTCOMES_BY_WAIT.flatMap((outcome) => {
    const label = `${outcome}: ${OUTCOME_WORDS[outcome]}, ${formatBytes(summary.outcomes[outcome].bytes)}`;
    const at = x;
    x += 15 + 0.9 * textWidth(label, FONT_PIXELS.small) + 11; // the estimate is an upper one, and all four must fit
    return [rect(at, y - 9, 10, 10, `o-${outcome}`), text(at + 15, y, label, { class: 's' })];
  });
}

function plots(layout: TraceLayout, summary: TraceSummary): { body: string[]; bottom: number } {
  const { bands, marks } = layout;
  const endMs = summary.buckets.at(-1)!.toMs;
  const x = linearScale(0, endMs, LEFT, RIGHT);
  const scales = bandScales(bands);
  const bottom = scales.at(-1)!.to;
  const barsTop = bottom + 36;
  const barsBottom = barsTop + BARS_HEIGHT;
  const stripes = scales.flatMap((scale, at) =>
    at % 2 === 0 ? [rect(LEFT, scale.from, RIGHT - LEFT, scale.to - scale.from, 'stripe')] : [],
  );
  return {
    bottom: barsBottom + 34,
    body: [
      text(LEFT - 8, TOP - 8, 'what was read, in the order of the first read', { anchor: 'end', class: 's' }),
      ...stripes,
      ...timeAxis(x, endMs, TOP, bottom, 8, false),
      ...scales.map((scale, at) => bandLabel(bands[at]!, scale)),
      ...drawnMarks(marks, x, scales),
      ...timeAxis(x, endMs, barsTop, barsBottom, 8),
      ...bars(summary, x, barsTop, barsBottom),
      text((LEFT + RIGHT) / 2, barsBottom + 30, 'since the first read', { anchor: 'middle', class: 's' }),
    ],
  };
}

/** From bytes within each band to pixels; bands lie below each other, their heights follow from their bytes. */
function bandScales(bands: readonly TraceBand[]): Scale[] {
  const total = bands.reduce((sum, { bytes }) => sum + bytes, 0);
  const spare = Math.max(0, PLOT_HEIGHT - bands.length * LEAST_BAND);
  let y = TOP;
  return bands.map(({ bytes }) => {
    const from = y;
    y += LEAST_BAND + (bytes / total) * spare;
    return linearScale(0, bytes, from, y);
  });
}

function bandLabel(band: TraceBand, scale: Scale): string {
  const size = formatBytes(band.bytes);
  const y = scale.from + 13;
  const room = Math.floor((LABELS - textWidth(size, FONT_PIXELS.small) - 14) / (FONT_PIXELS.small * 0.56));
  const name = text(LEFT - 14 - textWidth(size, FONT_PIXELS.small), y, cutPath(band.label, room), {
    anchor: 'end',
    class: 'm',
  });
  return `${name}${text(LEFT - 8, y, size, { anchor: 'end', class: 's' })}`;
}

/** A mark for each read; those of one outcome that touch at the same pixel of time are one. */
function drawnMarks(marks: readonly TraceMark[], x: Scale, scales: readonly Scale[]): string[] {
  const boxes: { x: number; top: number; bottom: number; bytes: number; reads: number; mark: TraceMark }[] = [];
  const lastAt = new Map<string, (typeof boxes)[number]>();
  for (const mark of marks) {
    const y = scales[mark.band]!;
    const left = Math.round(x(mark.atMs));
    const [top, bottom] = [y(mark.from), y(mark.from + mark.length)];
    const key = `${left} ${mark.band} ${mark.outcome}`;
    const last = lastAt.get(key);
    if (last !== undefined && top <= last.bottom + 1 && bottom >= last.top - 1) {
      last.top = Math.min(last.top, top);
      last.bottom = Math.max(last.bottom, bottom);
      last.bytes += mark.length;
      last.reads++;
      continue;
    }
    const box = { x: left, top, bottom, bytes: mark.length, reads: 1, mark };
    boxes.push(box);
    lastAt.set(key, box);
  }
  // The worst for the reader on top.
  const order = boxes.toSorted(
    (a, b) => OUTCOMES_BY_WAIT.indexOf(a.mark.outcome) - OUTCOMES_BY_WAIT.indexOf(b.mark.outcome),
  );
  return order.map(({ x: left, top, bottom, bytes, reads, mark }) => {
    const more = reads === 1 ? '' : ` and ${reads - 1} more`;
    const tip = `${mark.name}${more}: ${formatBytes(bytes)} at ${mark.atMs} ms, ${mark.outcome}`;
    return rect(left - MARK_WIDTH / 2, top, MARK_WIDTH, Math.max(MARK_HEIGHT, bottom - top), `o-${mark.outcome}`, tip);
  });
}

/** Bytes by time, on each other by outcome, what was waited for at the bottom. */
function bars(summary: TraceSummary, x: Scale, top: number, bottom: number): string[] {
  const { buckets } = summary;
  const totals = buckets.map(({ outcomes }) => OUTCOMES_BY_WAIT.reduce((sum, one) => sum + outcomes[one].bytes, 0));
  const most = Math.max(1, ...totals);
  const y = linearScale(0, most, bottom, top);
  const drawn = buckets.flatMap(({ fromMs, toMs, outcomes }) => {
    const width = Math.max(1, x(toMs) - x(fromMs) - 1);
    let below = 0;
    return OUTCOMES_BY_WAIT.toReversed().flatMap((outcome) => {
      const { bytes, reads } = outcomes[outcome];
      if (bytes === 0) return [];
      const from = below;
      below += bytes;
      const tip = `${fromMs} to ${toMs} ms: ${formatBytes(bytes)} in ${plural(reads, 'read')}, ${outcome}`;
      return [rect(x(fromMs), y(below), width, y(from) - y(below), `o-${outcome}`, tip)];
    });
  });
  const step = buckets[0]!.toMs - buckets[0]!.fromMs;
  return [
    line(x.from, top, x.to, top, 'grid'),
    ...drawn,
    text(LEFT - 8, top + 4, formatBytes(most), { anchor: 'end', class: 's' }),
    text(LEFT - 8, (top + bottom) / 2 + 4, `bytes read in each ${duration(step)}`, { anchor: 'end', class: 'm' }),
    text(LEFT - 8, bottom + 4, '0', { anchor: 'end', class: 's' }),
  ];
}

function ownStyle(): string {
  const rules = (mode: 0 | 1): string =>
    [
      ...OUTCOMES_BY_WAIT.map((outcome) => `.o-${outcome} { fill: ${COLOURS[outcome][mode]}; }`),
      `.stripe { fill: ${mode === 0 ? '#f5f6f8' : '#181d25'}; }`,
    ].join(' ');
  return `${rules(0)}\n@media (prefers-color-scheme: dark) { ${rules(1)} }\n`;
}

// A trace for a terminal: its reads over time, and the figures below. In colours each cell of the picture has 2 × 4 dots of
// braille; without them a sign for each outcome says the same. Pure: what the terminal can do is told by the caller.
import { timeTicks } from '../bench/report/axis.ts';
import { duration } from '../bench/report/quantities.ts';
import { formatBytes } from '../units.ts';
import type { AccessTrace, Outcome } from './access-trace.ts';
import { cutPath, plural, shownName } from './shown-name.ts';
import { layOut, type TraceBand, type TraceLayout } from './trace-layout.ts';
import { OUTCOME_WORDS, OUTCOMES_BY_WAIT, summarize, type TraceSummary } from './trace-summary.ts';

export interface PictureOptions {
  /** Characters of a line. */
  readonly width: number;
  readonly colour: boolean;
}

export const LEAST_WIDTH = 60;
const ROWS = 24;
const MOST_BANDS = 16;
const SIGNS: Readonly<Record<Outcome, string>> = { hit: '.', ahead: '+', late: '~', miss: '#' };
/** SGR parameters; of the eight colours that every terminal has, apart for eyes that do not tell red from green. */
const COLOURS: Readonly<Record<Outcome, string>> = { hit: '90', ahead: '36', late: '33', miss: '1;31' };
/** Bit of each dot in a braille cell, by row and column (Unicode, block "Braille Patterns"). */
const DOTS = [
  [0x01, 0x08],
  [0x02, 0x10],
  [0x04, 0x20],
  [0x40, 0x80],
] as const;

/** Lines for a terminal, each ended. */
export function tracePicture(trace: AccessTrace, options: PictureOptions): string {
  const width = Math.max(LEAST_WIDTH, Math.floor(options.width));
  const summary = summarize(trace);
  const lines = [...head(trace, summary), ''];
  if (trace.events.length === 0) lines.push('No read was recorded.');
  else lines.push(...plot(layOut(trace, MOST_BANDS), width, options.colour), '', ...figures(summary, width));
  return `${lines.map((line) => line.trimEnd()).join('\n')}\n`;
}

function head(trace: AccessTrace, summary: TraceSummary): string[] {
  const { repository, tag, runs, updatedMs } = trace;
  const name = `${shownName(repository) || 'an image without a name'}${tag === '' ? '' : `:${shownName(tag)}`}`;
  const merged = runs === 1 ? 'one run' : `${runs} runs`;
  const when = new Date(updatedMs).toISOString().replace(/\.\d+Z$/, 'Z');
  return [
    name,
    `${merged}, the latest ended ${when}: ${plural(summary.reads, 'read')} of ${plural(summary.fileCount, 'file')}, ` +
      `${formatBytes(summary.bytes)} in ${duration(summary.durationMs)}`,
  ];
}

function plot(layout: TraceLayout, width: number, colour: boolean): string[] {
  const { bands, durationMs } = layout;
  const sizes = bands.map(({ bytes }) => formatBytes(bytes));
  const sizeWidth = Math.max(...sizes.map((size) => size.length));
  const room = Math.floor(width * 0.4) - sizeWidth - 3;
  const labelWidth = Math.min(room, Math.max(...bands.map(({ label }) => Array.from(label).length)));
  const columns = width - labelWidth - sizeWidth - 4;
  const heights = rowsOf(bands);
  const tops = heights.map((_, at) => heights.slice(0, at).reduce((sum, rows) => sum + rows, 0));
  const cells = new Cells(
    columns,
    heights.reduce((sum, rows) => sum + rows, 0),
    colour,
  );
  for (const { band, atMs, from, length, outcome } of layout.marks) {
    const { bytes } = bands[band]!;
    const dots = heights[band]! * 4;
    const x = durationMs === 0 ? 0 : Math.round((atMs / durationMs) * (columns * 2 - 1));
    const first = Math.min(dots - 1, Math.floor((from / bytes) * dots));
    const last = Math.min(dots, Math.max(first + 1, Math.round(((from + length) / bytes) * dots)));
    for (let y = first; y < last; y++) cells.put(x, tops[band]! * 4 + y, outcome);
  }
  const labels = new Map(tops.map((top, at) => [top, at]));
  const lines = cells.lines().map((cellLine, row) => {
    const at = labels.get(row);
    const label = at === undefined ? '' : cutPath(bands[at]!.label, labelWidth);
    const padding = ' '.repeat(labelWidth - Array.from(label).length);
    return `${label}${padding}  ${(at === undefined ? '' : sizes[at]!).padStart(sizeWidth)} ┤${cellLine}`;
  });
  const indent = ' '.repeat(labelWidth + sizeWidth + 3);
  return [...lines, ...axis(durationMs, columns).map((line) => `${indent}${line}`), '', ...legend(width, colour)];
}

/** Rows of each band: one at least, the rest by bytes. */
function rowsOf(bands: readonly TraceBand[]): number[] {
  const total = bands.reduce((sum, { bytes }) => sum + bytes, 0);
  const spare = Math.max(0, ROWS - bands.length);
  const shares = bands.map(({ bytes }) => (bytes / total) * spare);
  const rows = shares.map((share) => 1 + Math.floor(share));
  const byRest = shares.map((share, at) => ({ at, rest: share % 1 })).toSorted((a, b) => b.rest - a.rest);
  const missing = bands.length + spare - rows.reduce((sum, count) => sum + count, 0);
  for (const { at } of byRest.slice(0, missing)) rows[at]!++;
  return rows;
}

function axis(durationMs: number, columns: number): [string, string] {
  const line = Array<string>(columns).fill('─');
  const labels = Array<string>(columns + 8).fill(' ');
  let free = 0;
  for (const { at, label } of timeTicks(durationMs, Math.max(2, Math.floor(columns / 14)))) {
    const x = durationMs === 0 ? 0 : Math.round((at / durationMs) * (columns - 1));
    line[x] = '┴';
    const from = Math.max(0, Math.min(x - Math.floor(label.length / 2), columns - label.length));
    if (from < free) continue;
    for (const [i, character] of Array.from(label).entries()) labels[from + i] = character;
    free = from + label.length + 1;
  }
  return [`└${line.join('')}`, ` ${labels.join('')}`];
}

function painted(text: string, outcome: Outcome, colour: boolean): string {
  return colour ? `\x1b[${COLOURS[outcome]}m${text}\x1b[0m` : text;
}

function sign(outcome: Outcome, colour: boolean): string {
  return painted(colour ? '⣿' : SIGNS[outcome], outcome, colour);
}

/** On as many lines as it takes. */
function legend(width: number, colour: boolean): string[] {
  const lines: string[] = [];
  let room = 0;
  for (const outcome of OUTCOMES_BY_WAIT) {
    const words = `${outcome}: ${OUTCOME_WORDS[outcome]}`;
    const entry = `${sign(outcome, colour)} ${words}`;
    const length = words.length + 5;
    if (length > room) {
      lines.push(entry);
      room = width + 3 - length;
    } else {
      lines[lines.length - 1] += `   ${entry}`;
      room -= length;
    }
  }
  return lines;
}

/** The cells of the picture; where several outcomes meet in one, it shows the worst for the reader. */
class Cells {
  readonly #columns: number;
  readonly #colour: boolean;
  readonly #dots: Uint8Array;
  readonly #worst: Int8Array;

  constructor(columns: number, rows: number, colour: boolean) {
    this.#columns = columns;
    this.#colour = colour;
    this.#dots = new Uint8Array(columns * rows);
    this.#worst = new Int8Array(columns * rows).fill(-1);
  }

  /** Marks a dot, in dots from the left and the top. */
  put(x: number, y: number, outcome: Outcome): void {
    const cell = (y >> 2) * this.#columns + (x >> 1);
    this.#dots[cell]! |= DOTS[y & 3]![x & 1]!;
    this.#worst[cell] = Math.max(this.#worst[cell]!, OUTCOMES_BY_WAIT.indexOf(outcome));
  }

  lines(): string[] {
    const lines: string[] = [];
    for (let from = 0; from < this.#dots.length; from += this.#columns) {
      let [line, run] = ['', ''];
      let outcome: Outcome | undefined;
      for (let at = from; at <= from + this.#columns; at++) {
        const next = at === from + this.#columns ? undefined : OUTCOMES_BY_WAIT[this.#worst[at]!];
        if (next !== outcome || at === from + this.#columns) {
          line += outcome === undefined ? run : painted(run, outcome, this.#colour);
          [run, outcome] = ['', next];
        }
        run += next === undefined ? ' ' : this.#colour ? String.fromCharCode(0x2800 + this.#dots[at]!) : SIGNS[next];
      }
      lines.push(line);
    }
    return lines;
  }
}

function figures(summary: TraceSummary, width: number): string[] {
  const { outcomes, bytes, presentShare, files, buckets } = summary;
  const percent = (part: number): string => (bytes === 0 ? '' : `${((100 * part) / bytes).toFixed(0)} %`);
  const met = OUTCOMES_BY_WAIT.map((outcome) => ({ name: outcome as string, ...outcomes[outcome] }));
  const rows = [...met, { name: 'all', reads: summary.reads, bytes }].map((row) => [
    row.name,
    String(row.reads),
    formatBytes(row.bytes),
    percent(row.bytes),
  ]);
  const present =
    presentShare !== undefined
      ? `Here when asked for: ${(100 * presentShare).toFixed(0)} % of the bytes.`
      : 'Reads of present bytes are not in this trace: the transport did not show them.';
  const most = files.map((file) => [formatBytes(file.bytes), String(file.reads), cutPath(file.name, width - 24)]);
  const waits = buckets.map(({ fromMs, toMs, outcomes: { miss, late } }) => ({ fromMs, toMs, miss, late }));
  const largest = Math.max(1, ...waits.map(({ miss }) => miss.bytes));
  const missed = waits.map(({ fromMs, toMs, miss, late }) => [
    `${fromMs}–${toMs} ms`,
    String(miss.reads),
    formatBytes(miss.bytes),
    String(late.reads),
    '█'.repeat(Math.ceil((miss.bytes / largest) * Math.max(8, Math.min(40, width - 50)))),
  ]);
  return [
    ...table(['OUTCOME', 'READS', 'BYTES', 'SHARE'], rows, 'lrrr'),
    present,
    '',
    'Files with most bytes:',
    ...table(['BYTES', 'READS', 'FILE'], most, 'rrl'),
    '',
    'Misses by time:',
    ...table(['TIME', 'MISSES', 'BYTES', 'LATE', ''], missed, 'rrrrl'),
  ];
}

/** Columns two spaces apart, each to the left or to the right. */
function table(header: readonly string[], rows: readonly (readonly string[])[], sides: string): string[] {
  const all = [header, ...rows];
  const widths = header.map((_, at) => Math.max(...all.map((cells) => cells[at]!.length)));
  const cell = (text: string, at: number) =>
    sides[at] === 'r' ? text.padStart(widths[at]!) : text.padEnd(widths[at]!);
  return all.map((cells) => `  ${cells.map(cell).join('  ')}`);
}

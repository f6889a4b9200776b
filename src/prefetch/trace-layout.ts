// Where the reads of a trace lie in a drawing: x is time, y is place, in bands that each have a name. A file that was read a
// lot has a band of its own; small ones share that of their directory, or of one above it. Bands stand in the order of
// their first read, so that a start runs from the top to the bottom. Pure; used by trace-picture.ts and trace-chart.ts.
import { digestHex } from '../digest.ts';
import type { AccessTrace, Outcome, TraceEvent } from './access-trace.ts';
import { shownName } from './shown-name.ts';

export interface TraceBand {
  /** "usr/bin/python3", "usr/lib/ (43 files)", "12 other files"; fit to be shown. */
  readonly label: string;
  /** Bytes that were read of it; its marks lie in `[0, bytes)`. */
  readonly bytes: number;
}

/** A first read of a range. */
export interface TraceMark {
  readonly band: number;
  readonly atMs: number;
  /** From the top of its band, bytes. */
  readonly from: number;
  readonly length: number;
  readonly outcome: Outcome;
  /** File, fit to be shown. */
  readonly name: string;
}

export interface TraceLayout {
  /** From the first read to the last one, milliseconds. */
  readonly durationMs: number;
  readonly bands: readonly TraceBand[];
  /** Ascending by time. */
  readonly marks: readonly TraceMark[];
}

/** Directories below this depth count as their parent at it: paths come from anybody. */
const MAX_DEPTH = 16;

interface ReadFile {
  readonly key: string;
  readonly name: string;
  /** Directories that hold it, outermost first, without an end "/"; none for a chunk that no file is known of. */
  readonly parents: readonly string[];
  readonly firstRead: number;
  /** What was read of it, ascending, joined. */
  readonly ranges: readonly { offset: number; length: number }[];
  readonly bytes: number;
}

interface Group {
  readonly label: string;
  readonly files: readonly ReadFile[];
}

/** `mostBands` is how many have room, at least two. */
export function layOut(trace: AccessTrace, mostBands: number): TraceLayout {
  const files = readFiles(trace.events);
  const groups = grouped(files, Math.max(2, mostBands)).toSorted((a, b) => firstRead(a) - firstRead(b));
  const place = new Map<string, { band: number; from: number; file: ReadFile }>();
  for (const [band, group] of groups.entries()) {
    let from = 0;
    for (const file of group.files.toSorted((a, b) => a.firstRead - b.firstRead)) {
      place.set(file.key, { band, from, file });
      from += file.bytes;
    }
  }
  const marks = trace.events.map((event): TraceMark => {
    const { band, from, file } = place.get(keyOf(event))!;
    const { atMs, length, outcome } = event;
    return { band, atMs, from: from + bytesBefore(file, startOf(event)), length, outcome, name: file.name };
  });
  const bands = groups.map(({ label, files }) => ({ label, bytes: files.reduce((sum, { bytes }) => sum + bytes, 0) }));
  return { durationMs: trace.events.at(-1)?.atMs ?? 0, bands, marks };
}

function firstRead(group: Group): number {
  return group.files.reduce((least, file) => Math.min(least, file.firstRead), Number.POSITIVE_INFINITY);
}

/** What a drawing puts side by side: a file, or a chunk that no file is known of. */
export function keyOf(event: TraceEvent): string {
  return event.path === '' ? event.chunk : `/${event.path}`;
}

export function nameOf(event: TraceEvent): string {
  return event.path === '' ? `chunk ${digestHex(event.chunk).slice(0, 12)}` : shownName(event.path);
}

/** Where the range begins in its file, or in its chunk. */
function startOf(event: TraceEvent): number {
  return event.path === '' ? event.offset : event.fileOffset;
}

function readFiles(events: readonly TraceEvent[]): ReadFile[] {
  const byKey = Map.groupBy(events.entries(), ([, event]) => keyOf(event));
  return [...byKey].map(([key, reads]) => {
    const [firstRead, first] = reads[0]!;
    const ranges = joined(reads.map(([, event]) => ({ offset: startOf(event), length: event.length })));
    const bytes = ranges.reduce((sum, { length }) => sum + length, 0);
    return { key, name: nameOf(first), parents: parentsOf(first.path), firstRead, ranges, bytes };
  });
}

function parentsOf(path: string): string[] {
  const parts = path.split('/').slice(0, -1).slice(0, MAX_DEPTH);
  return parts.map((_, at) => parts.slice(0, at + 1).join('/'));
}

/** Ranges without gaps and overlaps between neighbours. */
function joined(ranges: { offset: number; length: number }[]): { offset: number; length: number }[] {
  const out: { offset: number; length: number }[] = [];
  for (const { offset, length } of ranges.toSorted((a, b) => a.offset - b.offset)) {
    const last = out.at(-1);
    if (last !== undefined && offset <= last.offset + last.length)
      last.length = Math.max(last.length, offset + length - last.offset);
    else out.push({ offset, length });
  }
  return out;
}

/** Bytes read of a file before `offset`: parts that nobody read take no room. */
function bytesBefore(file: ReadFile, offset: number): number {
  let sum = 0;
  for (const range of file.ranges) {
    if (range.offset >= offset) break;
    sum += Math.min(range.length, offset - range.offset);
  }
  return sum;
}

/** From the deepest directories upwards: what has bytes enough for a band gets one, the rest is left to the directory above. */
function grouped(files: readonly ReadFile[], mostBands: number): Group[] {
  const total = files.reduce((sum, { bytes }) => sum + bytes, 0);
  // Groups of so much cannot be more than there is room for, with one for what is left.
  const enough = total / (mostBands - 1);
  const groups: Group[] = [];
  let left: ReadFile[] = [];
  for (const file of files) {
    if (files.length <= mostBands || file.bytes >= enough) groups.push({ label: file.name, files: [file] });
    else left.push(file);
  }
  for (let depth = MAX_DEPTH; depth >= 1; depth--) {
    const byParent = Map.groupBy(left, ({ parents }) => parents[depth - 1]);
    for (const [parent, inside] of byParent) {
      if (parent === undefined || inside.length < 2) continue;
      if (inside.reduce((sum, { bytes }) => sum + bytes, 0) < enough) continue;
      groups.push({ label: `${shownName(parent)}/ (${inside.length} files)`, files: inside });
      const taken = new Set(inside);
      left = left.filter((file) => !taken.has(file));
    }
  }
  const only = left.length === 1 ? left[0]!.name : undefined;
  const label = only ?? `${left.length} ${groups.length === 0 ? '' : 'other '}files`;
  return left.length === 0 ? groups : [...groups, { label, files: left }];
}

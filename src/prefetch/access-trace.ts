// What containers of one image read in their first seconds, in order: the model, its text form (docs/formats/trace.md),
// and how runs are merged. Pure; files are trace-store.ts's, recording recorder.ts's, replaying planner.ts's.
import { createHash } from 'node:crypto';
import { type Digest, digestHex, isDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import { KiB, MiB } from '../units.ts';

/**
 * How a read met its bytes, in the latest run that had it: here already, fetched for it (`miss`), here because a prefetch
 * had brought them (`ahead`), or on their way by a prefetch (`late`).
 */
export const OUTCOMES = ['hit', 'miss', 'ahead', 'late'] as const;
export type Outcome = (typeof OUTCOMES)[number];

/** A range of one chunk that was read. */
export interface TraceEvent {
  /** Since the first read of the run, milliseconds; over several runs their mean. */
  readonly atMs: number;
  readonly chunk: Digest;
  /** Within the chunk, bytes. */
  readonly offset: number;
  readonly length: number;
  readonly outcome: Outcome;
  /** Runs that read it. */
  readonly count: number;
  /** A file that has the chunk, from the root, without a leading "/", bytes as latin1; '' when none is known. */
  readonly path: string;
  /** Where the range begins in that file, bytes. */
  readonly fileOffset: number;
}

/** Where a trace comes from and belongs to. */
export interface TraceIdentity {
  /** Layers of the image, bottom to top. */
  readonly layers: readonly Digest[];
  /** "host/path" of the image's repository; '' when it is not known. */
  readonly repository: string;
  /** Tag it was pulled by; '' when it is not known. */
  readonly tag: string;
  /** Digest of its manifest; '' when it is not known. */
  readonly manifest: string;
}

export interface AccessTrace extends TraceIdentity {
  /** Runs that are merged in it; counts of older ones fade. */
  readonly runs: number;
  /** When the latest run was, milliseconds since 1970. */
  readonly updatedMs: number;
  /** False when the transport did not show reads of present bytes: only misses are in it. */
  readonly seesHits: boolean;
  /** Ascending by time. */
  readonly events: readonly TraceEvent[];
}

/** Ranges are kept in parts of this size, so that runs can be compared, bytes. */
export const TRACE_UNIT_BYTES = 64 * KiB;
export const MAX_EVENTS = 20_000;
/** Parts of TRACE_UNIT_BYTES of one trace, or one run, that are looked at: more are no start. */
export const MAX_UNITS = 200_000;
/** Longest text form, bytes. */
export const MAX_TRACE_BYTES = 4 * MiB;
/** From so many runs on, all counts are halved: what an image does now outweighs what it did. */
const MAX_RUNS = 16;
/** A range that less than a quarter of so many runs have read is forgotten. */
const FORGET_RUNS = 4;
/** Neighbouring ranges are one event when they were read within this time of each other, milliseconds. */
const JOIN_MS = 20;
const MAX_LAYERS = 256;
const MAX_PATH_BYTES = 4096;
/** Longest name of a repository or tag, as it is written, characters. */
const MAX_NAME_LENGTH = 1024;
/** Largest chunk of any configuration. */
const MAX_CHUNK_BYTES = 64 * MiB;
/** Times beyond a day are nobody's start. */
const MAX_AT_MS = 86_400_000;

/** Names an image by its layers: the same on every node, whatever it is called. 64 hex digits. */
export function traceId(layers: readonly Digest[]): string {
  const hash = createHash('sha256');
  for (const layer of layers) hash.update(`${layer}\n`);
  return hash.digest('hex');
}

/** One 64 KiB part of a chunk, or less at its end, as one run has read it. */
export interface TraceUnit {
  readonly chunk: Digest;
  /** Multiple of TRACE_UNIT_BYTES. */
  readonly offset: number;
  readonly length: number;
  readonly atMs: number;
  readonly outcome: Outcome;
  readonly path: string;
  readonly fileOffset: number;
}

/** One run, for mergeRun. */
export interface TraceRun {
  readonly identity: TraceIdentity;
  readonly endedMs: number;
  readonly seesHits: boolean;
  readonly units: Iterable<TraceUnit>;
}

interface Counted extends TraceUnit {
  readonly count: number;
}

const keyOf = (unit: { readonly chunk: Digest; readonly offset: number }): string => `${unit.chunk} ${unit.offset}`;

/** The trace with one more run in it. `before` is of the same image, or undefined for the first run. */
export function mergeRun(before: AccessTrace | undefined, run: TraceRun): AccessTrace {
  const runs = (before?.runs ?? 0) + 1;
  const halve = runs > MAX_RUNS;
  const units = new Map<string, Counted>();
  for (const unit of unitsOf(before?.events ?? []))
    units.set(keyOf(unit), halve ? { ...unit, count: Math.ceil(unit.count / 2) } : unit);
  const fresh = new Set<string>();
  for (const unit of run.units) {
    // A chunk that two layers have, or one layer twice, was read once.
    if (fresh.has(keyOf(unit))) continue;
    fresh.add(keyOf(unit));
    const known = units.get(keyOf(unit));
    const count = (known?.count ?? 0) + 1;
    // Means of times keep what comes before what, which is all that counts.
    const atMs = known === undefined ? unit.atMs : known.atMs + (unit.atMs - known.atMs) / count;
    units.set(keyOf(unit), { ...unit, atMs, count });
  }
  const total = halve ? Math.ceil(runs / 2) : runs;
  const stays = (unit: Counted): boolean =>
    total < FORGET_RUNS || unit.count * FORGET_RUNS >= total || fresh.has(keyOf(unit));
  // More runs than there were: only a trace of somebody else says so.
  const kept = [...units.values()].filter(stays).map((unit) => ({ ...unit, count: Math.min(unit.count, total) }));
  const { identity } = run;
  return {
    layers: identity.layers,
    repository: identity.repository || (before?.repository ?? ''),
    tag: identity.tag || (before?.tag ?? ''),
    manifest: identity.manifest || (before?.manifest ?? ''),
    runs: total,
    updatedMs: run.endedMs,
    seesHits: run.seesHits,
    events: joined(kept).slice(0, MAX_EVENTS),
  };
}

function* unitsOf(events: readonly TraceEvent[]): Generator<Counted> {
  let left = MAX_UNITS;
  for (const event of events) {
    for (let at = 0; at < event.length && left > 0; left--) {
      const offset = event.offset + at;
      const length = Math.min(event.length - at, TRACE_UNIT_BYTES - (offset % TRACE_UNIT_BYTES));
      yield { ...event, offset, length, fileOffset: event.fileOffset + at };
      at += length;
    }
  }
}

/** Units in the order of their times, neighbours joined. */
function joined(units: readonly Counted[]): TraceEvent[] {
  const sorted = units.toSorted(
    (a, b) => a.atMs - b.atMs || (a.chunk < b.chunk ? -1 : a.chunk > b.chunk ? 1 : a.offset - b.offset),
  );
  const events: TraceEvent[] = [];
  let lastMs = 0;
  for (const unit of sorted) {
    const last = events.at(-1);
    const joins =
      last !== undefined &&
      last.chunk === unit.chunk &&
      last.offset + last.length === unit.offset &&
      last.outcome === unit.outcome &&
      last.count === unit.count &&
      unit.atMs - lastMs <= JOIN_MS;
    lastMs = unit.atMs;
    if (joins) events[events.length - 1] = { ...last, length: last.length + unit.length };
    else events.push({ ...unit, atMs: Math.round(unit.atMs) });
  }
  return events;
}

/** The text form: a header of "word value" lines, then one event a line. */
export function formatTrace(trace: AccessTrace): string {
  const lines = ['dedup-trace 1'];
  for (const word of ['repository', 'tag'] as const) {
    const name = escapeText(trace[word]);
    // A longer one would not be read again.
    if (name !== '' && name.length <= MAX_NAME_LENGTH) lines.push(`${word} ${name}`);
  }
  if (trace.manifest !== '') lines.push(`manifest ${trace.manifest}`);
  for (const layer of trace.layers) lines.push(`layer ${layer}`);
  lines.push(`runs ${trace.runs}`, `updated ${new Date(trace.updatedMs).toISOString()}`);
  lines.push(`sees ${trace.seesHits ? 'all' : 'misses'}`);
  lines.push('# read MS CHUNK OFFSET LENGTH OUTCOME RUNS FILE-OFFSET PATH');
  let bytes = lines.reduce((sum, line) => sum + line.length + 1, 0);
  for (const { atMs, chunk, offset, length, outcome, count, fileOffset, path } of trace.events) {
    const where = path === '' ? '' : ` ${escapeText(path)}`;
    const line = `read ${atMs} ${digestHex(chunk)} ${offset} ${length} ${outcome} ${count} ${fileOffset}${where}`;
    bytes += line.length + 1;
    // What comes last is worth least.
    if (bytes > MAX_TRACE_BYTES) break;
    lines.push(line);
  }
  return `${lines.join('\n')}\n`;
}

/** Everything but printable ASCII, and "%", as %XX. */
function escapeText(text: string): string {
  return text.replace(/[^!-$&-~]/g, (character) => {
    const byte = character.charCodeAt(0) & 0xff;
    return `%${byte.toString(16).toUpperCase().padStart(2, '0')}`;
  });
}

function unescapeText(text: string): string {
  return text.replace(/%([0-9A-F]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)));
}

/**
 * Reads the text form; it may come from anybody. Lines of words that are not known are passed over, so that later
 * versions may add some. Errors: TRACE_INVALID naming the line.
 */
export function parseTrace(text: string, origin = 'the trace'): AccessTrace {
  const wrong = (line: number, what: string): DedupError =>
    new DedupError('TRACE_INVALID', `${origin}, line ${line}: ${what}`);
  if (text.length > MAX_TRACE_BYTES) throw wrong(1, `it is longer than ${MAX_TRACE_BYTES} bytes`);
  const lines = text.split('\n');
  if (lines[0] !== 'dedup-trace 1') throw wrong(1, 'this is not "dedup-trace 1"');
  const layers: Digest[] = [];
  const header = { repository: '', tag: '', manifest: '' };
  let [runs, updatedMs, seesHits] = [1, 0, true];
  const events: TraceEvent[] = [];
  for (const [i, line] of lines.entries()) {
    const number = i + 1;
    if (i === 0 || line === '' || line.startsWith('#')) continue;
    const [word = '', value = '', ...rest] = line.split(' ');
    switch (word) {
      case 'repository':
      case 'tag':
        if (value.length > MAX_NAME_LENGTH) throw wrong(number, 'a name that nothing has');
        header[word] = unescapeText(value);
        break;
      case 'manifest':
        if (!isDigest(value)) throw wrong(number, 'not a digest');
        header.manifest = value;
        break;
      case 'layer':
        if (!isDigest(value) || layers.length >= MAX_LAYERS) throw wrong(number, 'not a layer');
        layers.push(value);
        break;
      case 'runs':
        runs = wholeNumber(value, 1, 1_000_000) ?? fail(wrong(number, 'not a number of runs'));
        break;
      case 'updated':
        updatedMs = Date.parse(value);
        if (!Number.isFinite(updatedMs)) throw wrong(number, 'not a time');
        break;
      case 'sees':
        seesHits = value !== 'misses';
        break;
      case 'read':
        if (events.length >= MAX_EVENTS) throw wrong(number, `more than ${MAX_EVENTS} events`);
        events.push(parseEvent([value, ...rest]) ?? fail(wrong(number, 'not an event')));
        break;
      default: // A later version's.
    }
  }
  if (layers.length === 0) throw wrong(lines.length, 'it names no layer');
  events.sort((a, b) => a.atMs - b.atMs);
  return { ...header, layers, runs, updatedMs, seesHits, events };
}

function fail(error: Error): never {
  throw error;
}

function wholeNumber(text: string | undefined, least: number, most: number): number | undefined {
  if (text === undefined || !/^\d{1,16}$/.test(text)) return undefined;
  const value = Number(text);
  return value >= least && value <= most ? value : undefined;
}

function parseEvent(words: readonly string[]): TraceEvent | undefined {
  const [ms, hex, at, size, how, runs, fileAt, name = ''] = words;
  const chunk = `sha256:${hex}`;
  const atMs = wholeNumber(ms, 0, MAX_AT_MS);
  const offset = wholeNumber(at, 0, MAX_CHUNK_BYTES);
  const length = wholeNumber(size, 1, MAX_CHUNK_BYTES);
  const outcome = OUTCOMES.find((known) => known === how);
  const count = wholeNumber(runs, 1, 1_000_000);
  const fileOffset = wholeNumber(fileAt, 0, Number.MAX_SAFE_INTEGER);
  if (!isDigest(chunk) || name.length > 3 * MAX_PATH_BYTES || words.length > 8) return undefined;
  if (atMs === undefined || offset === undefined || length === undefined) return undefined;
  if (outcome === undefined || count === undefined || fileOffset === undefined) return undefined;
  // Their ends count, too: parts of them are written again when a run is merged.
  if (offset + length > MAX_CHUNK_BYTES || !Number.isSafeInteger(fileOffset + length)) return undefined;
  return { atMs, chunk, offset, length, outcome, count, path: unescapeText(name), fileOffset };
}

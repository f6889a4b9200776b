// The figures of a trace: what was read, how it met its bytes, which files it was, and when readers had to wait. Pure; for
// the `trace show` verb and the drawings beside it.
import { type AccessTrace, OUTCOMES, type Outcome, type TraceEvent } from './access-trace.ts';
import { keyOf, nameOf } from './trace-layout.ts';

export interface Amount {
  readonly reads: number;
  readonly bytes: number;
}

export interface TraceSummary extends Amount {
  /** From the first read to the last one, milliseconds. */
  readonly durationMs: number;
  readonly outcomes: Readonly<Record<Outcome, Amount>>;
  /** Bytes that were here when they were asked for, of all; undefined where nothing was read or only misses are seen. */
  readonly presentShare: number | undefined;
  /** Those with most bytes, most first; their names are fit to be shown. */
  readonly files: readonly (Amount & { readonly name: string })[];
  readonly fileCount: number;
  /** Of equal length, to the end of the start. */
  readonly buckets: readonly TraceBucket[];
}

export interface TraceBucket {
  readonly fromMs: number;
  readonly toMs: number;
  readonly outcomes: Readonly<Record<Outcome, Amount>>;
}

/** What each outcome means to the reader. */
export const OUTCOME_WORDS: Readonly<Record<Outcome, string>> = {
  hit: 'was here already',
  ahead: 'a prefetch had brought it',
  late: 'a prefetch was bringing it',
  miss: 'was fetched for the read',
};

/** From best to worst for the reader. */
export const OUTCOMES_BY_WAIT: readonly Outcome[] = ['hit', 'ahead', 'late', 'miss'];

const TOP_FILES = 10;

export function summarize(trace: AccessTrace, mostBuckets = 12): TraceSummary {
  const { events, seesHits } = trace;
  const outcomes = byOutcome(events);
  const { reads, bytes } = amount(events);
  const durationMs = events.at(-1)?.atMs ?? 0;
  const files = [...Map.groupBy(events, keyOf).values()].map((of) => ({ name: nameOf(of[0]!), ...amount(of) }));
  const present = outcomes.hit.bytes + outcomes.ahead.bytes;
  return {
    reads,
    bytes,
    durationMs,
    outcomes,
    presentShare: bytes === 0 || !seesHits ? undefined : present / bytes,
    files: files.toSorted((a, b) => b.bytes - a.bytes).slice(0, TOP_FILES),
    fileCount: files.length,
    buckets: bucketsOf(events, durationMs, mostBuckets),
  };
}

function amount(events: readonly TraceEvent[]): Amount {
  return { reads: events.length, bytes: events.reduce((sum, { length }) => sum + length, 0) };
}

function byOutcome(events: readonly TraceEvent[]): Record<Outcome, Amount> {
  const groups = Map.groupBy(events, ({ outcome }) => outcome);
  const entries = OUTCOMES.map((outcome) => [outcome, amount(groups.get(outcome) ?? [])]);
  return Object.fromEntries(entries) as Record<Outcome, Amount>;
}

function bucketsOf(events: readonly TraceEvent[], durationMs: number, most: number): TraceBucket[] {
  if (events.length === 0) return [];
  const lengthMs = roundStep(durationMs / most);
  const count = Math.max(1, Math.min(most, Math.floor(durationMs / lengthMs) + 1));
  const groups = Map.groupBy(events, ({ atMs }) => Math.min(count - 1, Math.floor(atMs / lengthMs)));
  return Array.from({ length: count }, (_, at) => ({
    fromMs: at * lengthMs,
    toMs: (at + 1) * lengthMs,
    outcomes: byOutcome(groups.get(at) ?? []),
  }));
}

/** The least of 1, 2, 5, 10, 20, … that is more than `least`: as many steps of it are always enough. */
function roundStep(least: number): number {
  for (let power = 1; ; power *= 10) for (const digit of [1, 2, 5]) if (digit * power > least) return digit * power;
}

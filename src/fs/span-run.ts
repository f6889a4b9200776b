// Spans on their way and the runs they travel in: which wanted neighbours one range request brings, and who waits for it. Made
// and settled by SpanFetcher, carried by SpanBatch and FetchTurns; asks nobody for bytes.
import { DedupError } from '../errors.ts';
import { MiB } from '../units.ts';
import type { LayerMap } from './loadable-layer.ts';
import { WANTED_PRIORITY } from './span-ledger.ts';
import type { RunOutput } from './span-storer.ts';

/** A span that is being fetched, or waits for that. */
export interface Flight {
  readonly map: LayerMap;
  readonly span: number;
  priority: number;
  queued: boolean;
  /** Has what it waits for, if it is not queued itself, done before what is fetched ahead. */
  hurry?: (() => void) | undefined;
  readonly promise: Promise<RunOutput>;
  resolve(output: RunOutput): void;
  reject(error: unknown): void;
}

export interface Run {
  readonly map: LayerMap;
  readonly first: number;
  /** Consecutive spans from `first`. */
  readonly flights: readonly Flight[];
  /** Aborted when the layer is dropped. */
  readonly dropped: AbortController;
}

/** Limits of one joined request: compressed and decompressed bytes. */
export interface RunLimits {
  readonly maxRunBytes: number;
  readonly maxRunOutputBytes: number;
}

/** Longest request in which a reader's spans travel with others that are fetched ahead: it waits for all of them. */
const MAX_MIXED_BYTES = MiB;

/** Neighbours are asked for together if so few others are needed between them. */
const NEAR_RANK = 4;

/** The priority of whoever wants most that a run comes. */
export function priorityOf(run: Run): number {
  return Math.max(...run.flights.map((flight) => flight.priority));
}

/** True while a reader waits for a span of the run. */
export function isWanted(run: Run): boolean {
  return run.flights.some((flight) => flight.priority >= WANTED_PRIORITY);
}

/**
 * Consecutive spans together, as far as they are decoded at once; `flights` ascending, of one layer. `rank` says when each is
 * needed: absent, all at once.
 */
export function runsOf(
  map: LayerMap,
  flights: readonly Flight[],
  limits: RunLimits,
  rank?: ReadonlyMap<number, number>,
): Run[] {
  const dropped = new AbortController();
  const runs: (Run & { flights: Flight[] })[] = [];
  for (const flight of flights) {
    const last = runs.at(-1);
    const count = (last?.flights.length ?? 0) + 1;
    const joins =
      last !== undefined &&
      last.first + last.flights.length === flight.span &&
      // A neighbour that is needed much later would hold up what is needed before it.
      (rank === undefined || Math.abs(rank.get(flight.span)! - rank.get(flight.span - 1)!) <= NEAR_RANK) &&
      map.spanEnd(flight.span) - map.spanStart(last.first) <= limits.maxRunOutputBytes &&
      map.compressedRange(last.first, count).length <= limits.maxRunBytes;
    if (joins) last.flights.push(flight);
    else runs.push({ map, first: flight.span, flights: [flight], dropped });
  }
  return runs;
}

/** Takes a flight and its neighbours that are queued too, as far as one request may reach: none of them is queued then. */
export function gatherRun(seed: Flight, flightOf: (span: number) => Flight | undefined, limits: RunLimits): Run {
  const { map } = seed;
  const flights = [seed];
  seed.queued = false;
  let mixed = false;
  const tryAdd = (span: number, atFront: boolean): boolean => {
    const flight = flightOf(span);
    if (flight?.queued !== true || flight.map !== map) return false;
    const joins = mixed || flight.priority >= WANTED_PRIORITY !== seed.priority >= WANTED_PRIORITY;
    const first = atFront ? span : flights[0]!.span;
    const last = atFront ? flights.at(-1)!.span : span;
    const maxBytes = joins ? Math.min(MAX_MIXED_BYTES, limits.maxRunBytes) : limits.maxRunBytes;
    if (map.compressedRange(first, last - first + 1).length > maxBytes) return false;
    if (map.spanEnd(last) - map.spanStart(first) > limits.maxRunOutputBytes) return false;
    flight.queued = false;
    mixed = joins;
    if (atFront) flights.unshift(flight);
    else flights.push(flight);
    return true;
  };
  for (let span = seed.span + 1; tryAdd(span, false); ) span++;
  for (let span = seed.span - 1; tryAdd(span, true); ) span--;
  return { map, first: flights[0]!.span, flights, dropped: new AbortController() };
}

/** For those who wait for a layer that is dropped: another one with the same chunk may still be asked. */
export function droppedError(map: LayerMap): DedupError {
  return new DedupError('UNAVAILABLE', `layer ${map.blob.digest} was dropped`);
}

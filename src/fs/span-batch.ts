// One request that brings many spans of a layer which a plan foresees, in the order of need: each run is handed on as soon as its
// bytes are here. Made by SpanFetcher.fetchBatch(), which stores what comes; tries no other source itself.
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import type { ByteRange } from '../units.ts';
import type { FetchTurns } from './fetch-turns.ts';
import { givenUp, type LayerSources } from './layer-sources.ts';
import { type LayerBlobSource, type LayerMap, nameOf } from './loadable-layer.ts';
import type { BlobReader } from './registry/blob-reader.ts';
import { WANTED_PRIORITY } from './span-ledger.ts';
import { type Flight, type Run, type RunLimits, runsOf } from './span-run.ts';

/** What becomes of the runs of a batch. Nothing here rejects: how it ends is told to those who wait for the spans. */
export interface BatchRuns {
  /** Decodes, verifies and stores what came. */
  store(run: Run, source: LayerBlobSource, data: Buffer, windows: readonly Uint8Array[]): Promise<void>;
  /** Goes on with the next source, or fails the run where there is none. */
  fetchElsewhere(run: Run, failed: LayerBlobSource, error: unknown): void;
  /** Asks the same source for a run once more, by itself. */
  fetchAgain(run: Run, source: LayerBlobSource): void;
}

export interface BatchOptions {
  readonly runs: BatchRuns;
  readonly sources: LayerSources;
  readonly turns: FetchTurns;
  /** And the time after which the source is given up that gave nothing. */
  readonly limits: RunLimits & { readonly attemptTimeoutMs: number };
  /** Aborted when the loader is closed. */
  readonly closed: AbortSignal;
  readonly log: Logger;
}

export class SpanBatch {
  /** Ascending. */
  readonly runs: readonly Run[];
  readonly #options: BatchOptions;
  readonly #map: LayerMap;
  readonly #source: LayerBlobSource;
  readonly #reader: BlobReader;
  /** When each span is needed, the first one at 0. */
  readonly #rank: ReadonlyMap<number, number>;
  /** By run: the bytes it needs, and those that are asked for. */
  readonly #needed: readonly ByteRange[];
  readonly #asked: readonly ByteRange[];
  /** By run: what came, and whether it was handed on. */
  readonly #parts: (Buffer | undefined)[];
  readonly #begun = new Set<number>();
  readonly #dropped: AbortSignal;
  readonly #stalled = new AbortController();
  readonly #failed = new AbortController();
  readonly #signal: AbortSignal;
  #timer: NodeJS.Timeout | undefined;

  /** `wanted` are spans of one layer, in the order of need; at least one. */
  constructor(options: BatchOptions, wanted: readonly Flight[], source: LayerBlobSource) {
    this.#options = options;
    this.#map = wanted[0]!.map;
    this.#source = source;
    this.#reader = options.sources.counted(source);
    this.#rank = new Map(wanted.map(({ span }, i) => [span, i]));
    const ascending = wanted.toSorted((a, b) => a.span - b.span);
    this.runs = runsOf(this.#map, ascending, options.limits, this.#rank);
    this.#needed = this.runs.map(({ first, flights }) => this.#map.compressedRange(first, flights.length));
    this.#asked = withoutOverlap(this.#needed);
    this.#parts = this.runs.map(() => undefined);
    this.#dropped = this.runs[0]!.dropped.signal;
    this.#signal = AbortSignal.any([this.#stalled.signal, options.closed, this.#failed.signal, this.#dropped]);
  }

  /** Makes the request; `onBytes` is told of what comes. Resolves when its last byte is here, or it has failed. Never rejects. */
  async bring(onBytes: (bytes: number) => void): Promise<void> {
    this.#goesOn();
    this.#map.layer.windows.expect?.([...this.#rank.keys()], this.#reader, this.#signal);
    const order = this.#orderOfNeed();
    const ranges = order.map((i) => this.#asked[i]!);
    try {
      const reading = this.#reader.readRanges(this.#map.blob, ranges, this.#signal, (place, data) =>
        this.#take(order[place]!, data, onBytes),
      );
      await orAborted(reading, this.#signal, givenUp);
      if (this.#begun.size < this.runs.length) throw wrongLength(this.#source, this.#begun.size, this.runs.length);
    } catch (error) {
      this.#fail(error);
    }
  }

  #orderOfNeed(): number[] {
    const rankOf = ({ span }: Flight): number => this.#rank.get(span)!;
    const firstRank = this.runs.map(({ flights }) => Math.min(...flights.map(rankOf)));
    return [...this.runs.keys()].sort((a, b) => firstRank[a]! - firstRank[b]!);
  }

  /** Each part has the time of a request of its own: readers may wait for it who have another source. */
  #goesOn(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#stalled.abort(), this.#options.limits.attemptTimeoutMs).unref();
  }

  #take(i: number, data: Buffer, onBytes: (bytes: number) => void): void {
    if (this.#failed.signal.aborted) return;
    const length = this.#asked[i]?.length;
    if (data.length !== length) throw wrongLength(this.#source, data.length, length ?? 0);
    this.#goesOn();
    this.#parts[i] = data;
    onBytes(data.length);
    this.#begin(i);
    this.#begin(i + 1);
  }

  /** Hands a run on, if all it needs is here. */
  #begin(i: number): void {
    const [data, before] = [this.#parts[i], this.#parts[i - 1]];
    if (data === undefined || this.#begun.has(i)) return;
    const shared = this.#needed[i]!.offset < this.#asked[i]!.offset;
    if (shared && before === undefined) return; // Its first bits are still to come.
    this.#begun.add(i);
    void this.#store(this.runs[i]!, shared ? Buffer.concat([before!.subarray(-1), data]) : data);
  }

  /** Has a run stored once its windows are here. Never rejects. */
  async #store(run: Run, data: Buffer): Promise<void> {
    const { runs, turns } = this.#options;
    try {
      const { windows } = this.#map.layer;
      const reading = windows.readWindows(run.first, run.flights.length, this.#reader, this.#signal);
      const own = await orAborted(reading, this.#signal, givenUp);
      await turns.decodeAhead(run, () => runs.store(run, this.#source, data, own));
    } catch (error) {
      this.#goOnWith(run, error);
    }
  }

  #fail(error: unknown): void {
    this.#failed.abort();
    const late = new DedupError('DEADLINE', `${this.#source.host} gave no answer in time`, { cause: error });
    const failure = this.#stalled.signal.aborted ? late : error;
    const details = { err: failure, layer: this.#map.blob.digest, source: nameOf(this.#source) };
    if (!this.#isGivenUp) this.#options.log.warn(details, 'fetching ahead failed');
    for (const [i, run] of this.runs.entries()) if (!this.#begun.has(i)) this.#goOnWith(run, failure);
  }

  /** True when nobody wants anything of it any more. */
  get #isGivenUp(): boolean {
    return this.#options.closed.aborted || this.#dropped.aborted;
  }

  /**
   * Goes on with a run that failed. Readers may have joined it, who would have asked by themselves, with attempts of their own:
   * where no other source is left, what they wait for is asked of the same one again, and nothing else.
   */
  #goOnWith(run: Run, error: unknown): void {
    const { runs, sources, limits } = this.#options;
    const others = sources.of(run.map).some((other) => nameOf(other) !== nameOf(this.#source));
    if (others || this.#isGivenUp) {
      runs.fetchElsewhere(run, this.#source, error);
      return;
    }
    const [wanted, rest] = [[], []] as [Flight[], Flight[]];
    for (const flight of run.flights) (flight.priority >= WANTED_PRIORITY ? wanted : rest).push(flight);
    if (rest.length > 0) runs.fetchElsewhere({ ...run, flights: rest }, this.#source, error);
    for (const { first, flights } of runsOf(run.map, wanted, limits)) {
      runs.fetchAgain({ ...run, first, flights }, this.#source);
    }
  }
}

function wrongLength(source: LayerBlobSource, got: number, wanted: number): DedupError {
  return new DedupError('REGISTRY_PROTOCOL', `${source.host} answered with ${got} instead of ${wanted}`);
}

/** Spans begin within the last byte of the one before: that byte is asked for once. */
function withoutOverlap(ranges: readonly ByteRange[]): ByteRange[] {
  return ranges.map(({ offset, length }, i) => {
    const before = ranges[i - 1];
    const cut = before === undefined ? 0 : Math.max(0, before.offset + before.length - offset);
    return { offset: offset + cut, length: length - cut };
  });
}

// Fetches what a reader will want next, behind everything that is waited for: what lies ahead of a sequential reader, and
// what lies around misses that come close together. Told of every miss by the LazyLoader; hits are answered natively and
// never seen here.
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import { Clusters } from './clusters.ts';
import type { LayerMap } from './loadable-layer.ts';
import { Readahead } from './readahead.ts';

/** Priorities of what is fetched: a reader waits; a prefetch knows what will be wanted; the rest has time. */
export const Priority = { onDemand: 100, prefetch: 10, background: 0 } as const;

export interface FetchAheadOptions {
  readonly fetch: (map: LayerMap, span: number, priority: number) => Promise<unknown>;
  /** Compressed bytes of the spans that readers have waited for. */
  readonly demandedBytes: () => number;
  /** False: only what lies ahead of a sequential reader is fetched. */
  readonly guess: boolean;
  readonly isPresent: (address: number, length: number) => boolean;
  readonly log: Logger;
}

/** Compressed bytes that may be fetched around misses: this much, and as much again as readers have waited for. */
const FREE_GUESS_BYTES = 4 * MiB;

export class FetchAhead {
  readonly #options: FetchAheadOptions;
  readonly #readahead = new Readahead();
  readonly #clusters = new Clusters();
  #guessedBytes = 0;

  constructor(options: FetchAheadOptions) {
    this.#options = options;
  }

  /** Tells of a miss in these spans of a layer, whose fetch has begun. */
  onMiss(map: LayerMap, spans: ReadonlySet<number>): void {
    if (spans.size === 0) return; // A piece of zeros within a sparse chunk needs nothing of the layer.
    const [first, last] = [Math.min(...spans), Math.max(...spans)];
    this.#sequential(map, first, last);
    if (this.#options.guess) this.#around(map, first, last);
  }

  #sequential(map: LayerMap, first: number, last: number): void {
    const { from, count } = this.#readahead.onMiss(map.layerId, first, last, map.spanCount);
    if (count === 0) return;
    // Whole pieces: half of one would be thrown away again.
    let end = map.spanEnd(from + count - 1);
    for (const { ref, tarOffset } of map.ordinaryPieces(end - 1, end)) end = Math.max(end, tarOffset + ref.length);
    const until = map.spanAt(end - 1);
    this.#readahead.extend(map.layerId, until + 1);
    for (let span = from; span <= until; span++) {
      if (!this.#isHere(map, span)) void this.#fetch(map, span, Priority.prefetch);
    }
  }

  /** All at once, so that neighbours travel in one request: a reader that is faster than the guesses gains nothing. */
  #around(map: LayerMap, first: number, last: number): void {
    const { from, count } = this.#clusters.onMiss(map.layerId, first, last, map.spanCount);
    const allowed = FREE_GUESS_BYTES + this.#options.demandedBytes();
    for (let span = from; span < from + count && this.#guessedBytes < allowed; span++) {
      if ((span >= first && span <= last) || this.#isHere(map, span)) continue;
      this.#guessedBytes += map.compressedRange(span, 1).length;
      void this.#fetch(map, span, Priority.background);
    }
  }

  async #fetch(map: LayerMap, span: number, priority: number): Promise<void> {
    try {
      await this.#options.fetch(map, span, priority);
    } catch (error) {
      // Nobody waits for it; a read that does will ask again and be told.
      this.#options.log.debug({ err: error, layer: map.blob.digest, span }, 'reading ahead failed');
    }
  }

  /** True when every ordinary piece that lies whole in a span is present. */
  #isHere(map: LayerMap, span: number): boolean {
    const [start, end] = [map.spanStart(span), map.spanEnd(span)];
    if (map.hasSparse(start, end)) return false;
    for (const { ref } of map.ordinaryPieces(start, end)) {
      if (ref.address > 0 && !this.#options.isPresent(ref.address, ref.length)) return false;
    }
    return true;
  }

  /** Forgets what is known of readers of a layer. */
  forget(layerId: number): void {
    this.#readahead.forget(layerId);
    this.#clusters.forget(layerId);
  }
}

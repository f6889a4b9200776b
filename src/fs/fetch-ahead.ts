// Fetches what a sequential reader will want next, behind everything that is waited for. Told of every miss by the
// LazyLoader; hits are answered natively and never seen here.
import type { Logger } from '../log.ts';
import type { LayerMap } from './loadable-layer.ts';
import { Readahead } from './readahead.ts';

/** Priorities of what is fetched: a reader waits; a prefetch knows what will be wanted; the rest has time. */
export const Priority = { onDemand: 100, prefetch: 10, background: 0 } as const;

export interface FetchAheadOptions {
  readonly fetch: (map: LayerMap, span: number, priority: number) => Promise<unknown>;
  readonly isPresent: (address: number, length: number) => boolean;
  readonly log: Logger;
}

export class FetchAhead {
  readonly #options: FetchAheadOptions;
  readonly #readahead = new Readahead();

  constructor(options: FetchAheadOptions) {
    this.#options = options;
  }

  /** Tells of a miss in these spans of a layer, whose fetch has begun. */
  onMiss(map: LayerMap, spans: ReadonlySet<number>): void {
    if (spans.size === 0) return; // A piece of zeros within a sparse chunk needs nothing of the layer.
    const { from, count } = this.#readahead.onMiss(map.layerId, Math.min(...spans), Math.max(...spans), map.spanCount);
    if (count === 0) return;
    // Whole pieces: half of one would be thrown away again.
    let end = map.spanEnd(from + count - 1);
    for (const { ref, tarOffset } of map.ordinaryPieces(end - 1, end)) end = Math.max(end, tarOffset + ref.length);
    const last = map.spanAt(end - 1);
    this.#readahead.extend(map.layerId, last + 1);
    for (let span = from; span <= last; span++) {
      if (!this.#isHere(map, span)) void this.#fetch(map, span);
    }
  }

  async #fetch(map: LayerMap, span: number): Promise<void> {
    try {
      await this.#options.fetch(map, span, Priority.prefetch);
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
  }
}

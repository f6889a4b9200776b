// Fetches what readers will want next, behind everything that is waited for: what follows a sequential reader, and what
// lies around the misses of a start. Told of every miss by the LazyLoader; hits are answered natively and never seen here.
import type { Logger } from '../log.ts';
import type { LayerMap } from './loadable-layer.ts';
import { Neighbours } from './neighbours.ts';
import { Readahead } from './readahead.ts';
import { type Origin, Priority } from './span-ledger.ts';

/** Spans guessed at a miss at most. */
const MAX_GUESSES = 8;
/** Where a round trip's time carries fewer spans than this, a wrong guess costs a reader more than a right one saves. */
const MIN_GUESSES = 3;

/** After so long other images without a trace, which share the layers, are guessed for again; milliseconds. */
const FORESEEN_MS = 120_000;

/** Of the guesses of five recorded starts 40 % were read (docs/decisions/0015-guesses-around-misses.md). */
const USUAL_USEFULNESS = 0.4;

export interface FetchAheadOptions {
  readonly fetch: (map: LayerMap, span: number, priority: number) => Promise<unknown>;
  /** Bytes of a layer that its registry sends in the time of a round trip. */
  readonly roundTripBytes: (map: LayerMap) => number;
  /** False: only what follows a sequential reader is fetched. */
  readonly guess: boolean;
  readonly isPresent: (address: number, length: number) => boolean;
  /** The share of what was fetched for this reason lately that was read; undefined while that is not known. */
  readonly usefulness: (origin: Origin, nowMs: number) => number | undefined;
  readonly log: Logger;
}

export class FetchAhead {
  readonly #options: FetchAheadOptions;
  readonly #readahead = new Readahead();
  readonly #neighbours = new Neighbours();
  /** Layers that were read, by their number: those that guesses can be in. */
  readonly #maps = new Map<number, LayerMap>();

  /** Layers whose readers a trace knows, and until when: by performance.now(). */
  readonly #foreseen = new Map<number, number>();

  constructor(options: FetchAheadOptions) {
    this.#options = options;
  }

  /** Says whether a trace tells what will be read of layers: nothing is guessed then, until a start by it is over. */
  foresee(layerIds: readonly number[], known: boolean): void {
    for (const layerId of layerIds) {
      if (known) this.#foreseen.set(layerId, performance.now() + FORESEEN_MS);
      else this.#foreseen.delete(layerId);
    }
  }

  /** Tells of a miss in these spans of a layer, whose fetch has begun. */
  onMiss(map: LayerMap, spans: ReadonlySet<number>): void {
    if (spans.size === 0) return; // A piece of zeros within a sparse chunk needs nothing of the layer.
    this.#followReader(map, spans);
    const foreseen = performance.now() < (this.#foreseen.get(map.layerId) ?? 0);
    if (this.#options.guess && !foreseen) this.#guess(map, spans);
  }

  /** What the link would carry while the reader waits: the reader's own bytes go first. */
  #guess(map: LayerMap, spans: ReadonlySet<number>): void {
    const nowMs = performance.now();
    this.#maps.set(map.layerId, map);
    this.#neighbours.onMiss(map.layerId, spans, map.spanCount, nowMs);
    const spanBytes = map.blob.size / map.spanCount;
    const carried = Math.min(MAX_GUESSES, Math.floor(this.#options.roundTripBytes(map) / spanBytes));
    // Guessing well where half of it is read: fewer guesses where it is less.
    const useful = this.#options.usefulness('guess', nowMs) ?? USUAL_USEFULNESS;
    const count = Math.floor(carried * Math.min(1, useful / USUAL_USEFULNESS));
    if (count < MIN_GUESSES) return;
    const guesses = this.#neighbours.take(count, nowMs, ({ layerId, span }) => {
      const near = this.#maps.get(layerId);
      return near === undefined || this.#isHere(near, span);
    });
    for (const { layerId, span } of guesses) void this.#fetch(this.#maps.get(layerId)!, span, Priority.guess);
  }

  #followReader(map: LayerMap, spans: ReadonlySet<number>): void {
    const useful = this.#options.usefulness('sequential', performance.now());
    const [first, last] = [Math.min(...spans), Math.max(...spans)];
    const { from, count } = this.#readahead.onMiss(map.layerId, first, last, map.spanCount, useful);
    if (count === 0) return;
    // Whole pieces: half of one would be thrown away again.
    let end = map.spanEnd(from + count - 1);
    for (const { ref, tarOffset } of map.ordinaryPieces(end - 1, end)) end = Math.max(end, tarOffset + ref.length);
    const until = map.spanAt(end - 1);
    this.#readahead.extend(map.layerId, until + 1);
    for (let span = from; span <= until; span++) {
      if (!this.#isHere(map, span)) void this.#fetch(map, span, Priority.sequential);
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
    this.#neighbours.forget(layerId);
    this.#foreseen.delete(layerId);
    this.#maps.delete(layerId);
  }
}

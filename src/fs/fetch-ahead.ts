// Fetches what a reader will probably want next, behind everything that is waited for: the spans ahead of a sequential
// reader, and those between misses that lie close together. Told of every miss by the LazyLoader; hits are answered
// natively and never seen here.
import type { Logger } from '../log.ts';
import { KiB, MiB } from '../units.ts';
import type { LayerMap } from './loadable-layer.ts';
import { Neighbours } from './neighbours.ts';
import { Readahead } from './readahead.ts';
import type { Touched } from './touched.ts';

/** Priorities of what is fetched: a reader waits; a prefetch knows what it wants; a guess may be wrong. */
export const Priority = { onDemand: 100, prefetch: 10, background: 0 } as const;

/** What fetching ahead needs of the SpanFetcher. */
export interface AheadFetcher {
  fetch(map: LayerMap, span: number, priority: number): Promise<unknown>;
  /** Bytes that are under way on an idle link of this host's kind, and what was fetched because readers waited. */
  readonly link: { readonly bandwidthDelayBytes: number };
  readonly demandedBytes: number;
}

export interface FetchAheadOptions {
  readonly fetcher: AheadFetcher;
  readonly isPresent: (address: number, length: number) => boolean;
  /** False: only what lies ahead of a sequential reader is fetched. */
  readonly guess: boolean;
  /** What was read of what is here; without it, no guess is ever known to have been right. */
  readonly touched: Touched | undefined;
  readonly log: Logger;
}

/** Guesses wait in memory at most so many; older ones have been overtaken by the reader. */
const MAX_GUESSES = 64;
/** Guessed bytes under way at least and at most, whatever the link is like. */
const MIN_UNDER_WAY = 256 * KiB;
const MAX_UNDER_WAY = 4 * MiB;
/** Guessed bytes that nobody has read: this much, and half of what readers have waited for or found here. */
const FREE_GUESSES_BYTES = 4 * MiB;
const FREE_GUESSES_SHARE = 0.5;
/** A guess that was not read by then was wrong. */
const JUDGED_AFTER_MS = 2000;

interface Guess {
  readonly map: LayerMap;
  readonly span: number;
  readonly bytes: number;
  /** When it came, by performance.now(). */
  readonly atMs: number;
}

export class FetchAhead {
  readonly #options: FetchAheadOptions;
  readonly #readahead = new Readahead();
  readonly #neighbours = new Neighbours();
  /** Guessed spans that wait, the best last. */
  #guesses: { readonly map: LayerMap; readonly span: number }[] = [];
  /** Guessed spans that came and were not read yet. */
  #came: Guess[] = [];
  #underWayBytes = 0;
  #unreadBytes = 0;
  #usefulBytes = 0;
  #closed: boolean = false;

  constructor(options: FetchAheadOptions) {
    this.#options = options;
  }

  /** Tells of a miss in these spans of a layer, whose fetch has begun. */
  onMiss(map: LayerMap, spans: ReadonlySet<number>): void {
    if (spans.size === 0) return; // A piece of zeros within a sparse chunk needs nothing of the layer.
    const [first, last] = [Math.min(...spans), Math.max(...spans)];
    this.#sequential(map, first, last);
    if (!this.#options.guess) return;
    this.#judge();
    const reach = this.#reach(map);
    for (const span of this.#neighbours.onMiss(map.layerId, first, last, map.spanCount, reach).reverse())
      this.#guesses.push({ map, span });
    if (this.#guesses.length > MAX_GUESSES) this.#guesses = this.#guesses.slice(-MAX_GUESSES);
    this.#pump();
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

  /** Spans around a miss that the link carries while the reader would wait for the next one. */
  #reach(map: LayerMap): number {
    const spanBytes = map.blob.size / Math.max(1, map.spanCount);
    return Math.round(this.#options.fetcher.link.bandwidthDelayBytes / spanBytes);
  }

  /** Keeps the link busy with guesses, but never with more than one round trip's worth. */
  #pump(): void {
    const { fetcher } = this.#options;
    const limit = Math.min(MAX_UNDER_WAY, Math.max(MIN_UNDER_WAY, fetcher.link.bandwidthDelayBytes));
    while (!this.#closed && this.#guesses.length > 0 && this.#underWayBytes < limit) {
      const { map, span } = this.#guesses.pop()!;
      if (this.#isHere(map, span)) continue;
      const free = FREE_GUESSES_BYTES + FREE_GUESSES_SHARE * (fetcher.demandedBytes + this.#usefulBytes);
      if (this.#unreadBytes > free) return;
      const bytes = map.compressedRange(span, 1).length;
      this.#underWayBytes += bytes;
      this.#unreadBytes += bytes;
      this.#forEachPiece(map, span, (address, length) => this.#options.touched?.clear(address, length));
      void this.#fetch(map, span, Priority.background).then(() => {
        this.#underWayBytes -= bytes;
        this.#came.push({ map, span, bytes, atMs: performance.now() });
        this.#judge();
        this.#pump();
      });
    }
  }

  /** Learns which guesses were right. */
  #judge(): void {
    const { touched } = this.#options;
    const late = performance.now() - JUDGED_AFTER_MS;
    this.#came = this.#came.filter(({ map, span, bytes, atMs }) => {
      let useful = false;
      this.#forEachPiece(map, span, (address, length) => {
        useful ||= touched?.any(address, length) === true;
      });
      if (!useful && atMs > late) return true;
      this.#neighbours.judge(map.layerId, useful);
      if (useful) {
        this.#unreadBytes -= bytes;
        this.#usefulBytes += bytes;
      }
      return false;
    });
  }

  #forEachPiece(map: LayerMap, span: number, visit: (address: number, length: number) => void): void {
    for (const { ref } of map.ordinaryPieces(map.spanStart(span), map.spanEnd(span)))
      if (ref.address > 0) visit(ref.address, ref.length);
  }

  async #fetch(map: LayerMap, span: number, priority: number): Promise<void> {
    try {
      await this.#options.fetcher.fetch(map, span, priority);
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
    this.#guesses = this.#guesses.filter(({ map }) => map.layerId !== layerId);
    this.#came = this.#came.filter((guess) => {
      if (guess.map.layerId === layerId) this.#unreadBytes -= guess.bytes;
      return guess.map.layerId !== layerId;
    });
  }

  close(): void {
    this.#closed = true;
    this.#guesses = [];
    this.#came = [];
  }
}

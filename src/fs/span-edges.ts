// Keeps the decompressed ends of spans that belong to a piece the neighbouring span completes, so that a span is
// fetched once although a piece lies across its border. Used by SpanFetcher and LazyLoader; bounded in bytes.
import { LRUCache } from 'lru-cache';

/** Decompressed bytes of a layer's tar from `start`. */
export interface TarBytes {
  readonly start: number;
  readonly bytes: Uint8Array;
}

export class SpanEdges {
  readonly #cache: LRUCache<string, TarBytes>;

  constructor(maxBytes: number) {
    this.#cache = new LRUCache({ maxSize: maxBytes, sizeCalculation: (edge) => edge.bytes.length + 256 });
  }

  /** The kept bytes up to the end of a span. */
  tail(layerId: number, span: number): TarBytes | undefined {
    return this.#cache.get(`${layerId}:${span}:tail`);
  }

  /** The kept bytes from the start of a span. */
  head(layerId: number, span: number): TarBytes | undefined {
    return this.#cache.get(`${layerId}:${span}:head`);
  }

  keepTail(layerId: number, span: number, start: number, bytes: Uint8Array): void {
    this.#cache.set(`${layerId}:${span}:tail`, { start, bytes: new Uint8Array(bytes) });
  }

  keepHead(layerId: number, span: number, start: number, bytes: Uint8Array): void {
    this.#cache.set(`${layerId}:${span}:head`, { start, bytes: new Uint8Array(bytes) });
  }

  /** Forgets both ends of a span. */
  drop(layerId: number, span: number): void {
    this.#cache.delete(`${layerId}:${span}:tail`);
    this.#cache.delete(`${layerId}:${span}:head`);
  }

  get bytes(): number {
    return this.#cache.calculatedSize;
  }

  clear(): void {
    this.#cache.clear();
  }
}

/** Copies what `from` has of [start, end) of the tar into `target`, whose byte 0 is `start`. True when it has all. */
export function copyTar(from: TarBytes, start: number, end: number, target: Uint8Array, at: number): boolean {
  if (from.start > start || from.start + from.bytes.length < end) return false;
  target.set(from.bytes.subarray(start - from.start, end - from.start), at);
  return true;
}

// Turns fetched compressed spans into stored pieces: decodes, completes pieces over span borders, verifies, writes, and
// keeps what the neighbouring spans will need. Called by SpanFetcher; knows nothing of requests or sources.
import type { Logger } from '../log.ts';
import type { PieceToStore } from './chunks/node-store.ts';
import type { LayerMap, PieceRef } from './loadable-layer.ts';
import type { SpanJob } from './native.ts';
import { copyTar, type SpanEdges, type TarBytes } from './span-edges.ts';

/** What loading needs of the node store. */
export interface LoaderStore {
  isPresent(address: number, length: number): boolean;
  /** One byte per piece: 1 stored, 0 not the bytes its digest names. */
  store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array>;
}

/** What loading needs of the native addon. */
export interface LoaderNative {
  decodeSpans(job: {
    compression: 'none' | 'gzip' | 'zstd';
    input: Uint8Array;
    spans: readonly SpanJob[];
    outputLength: number;
  }): Promise<Buffer>;
}

/** What a finished flight gives to those who waited for one of its spans. */
export interface RunOutput extends TarBytes {
  /** Name of the source they came from. */
  readonly source: string;
  /** Addresses of pieces that were stored out of these bytes. */
  readonly stored: ReadonlySet<number>;
  /** Addresses of pieces whose bytes do not have their digest. */
  readonly bad: ReadonlySet<number>;
}

export class SpanStorer {
  storedPieces = 0;
  badPieces = 0;
  readonly #store: LoaderStore;
  readonly #native: LoaderNative;
  readonly #edges: SpanEdges;
  readonly #log: Logger;

  constructor(store: LoaderStore, native: LoaderNative, edges: SpanEdges, log: Logger) {
    this.#store = store;
    this.#native = native;
    this.#edges = edges;
    this.#log = log;
  }

  /**
   * Decodes spans [first, first + count) out of their compressed bytes and stores every absent piece that is whole in
   * them and in what was kept of their neighbours. Errors: LAYER_INVALID, STORE_IO, STORE_FULL, CLOSED.
   */
  async decodeAndStore(
    map: LayerMap,
    first: number,
    source: string,
    data: Buffer,
    windows: readonly Uint8Array[],
    keeps: (neighbour: number) => boolean = () => true,
  ): Promise<RunOutput> {
    const { layerId } = map;
    const count = windows.length;
    const last = first + count - 1;
    const before = first > 0 ? this.#edges.tail(layerId, first - 1) : undefined;
    const after = last + 1 < map.spanCount ? this.#edges.head(layerId, last + 1) : undefined;
    const start = before?.start ?? map.spanStart(first);
    const wanted = this.#decodeEnd(map, map.spanStart(first), map.spanEnd(last));
    const whole = wanted === map.spanEnd(last);
    const end = whole && after !== undefined ? after.start + after.bytes.length : wanted;
    const base = map.compressedRange(first, count).offset;
    const { spans, compression } = map.layer.index;
    const job = (span: number, window: Uint8Array): SpanJob => ({
      inputOffset: spans.inOffset[span]! - base,
      bits: spans.bits[span]!,
      memberStart: spans.memberStart[span] === 1,
      window,
      outputOffset: map.spanStart(span) - start,
      outputLength: Math.min(map.spanEnd(span), wanted) - map.spanStart(span),
    });
    const bytes = await this.#native.decodeSpans({
      compression,
      input: data,
      // Spans behind the last byte that is wanted are left out: their pieces came from elsewhere meanwhile.
      spans: windows.map((window, i) => job(first + i, window)).filter(({ outputLength }) => outputLength > 0),
      outputLength: end - start,
    });
    if (before !== undefined) bytes.set(before.bytes, 0);
    if (whole && after !== undefined) bytes.set(after.bytes, after.start - start);
    const output = { start, bytes, source, stored: new Set<number>(), bad: new Set<number>() };
    await this.#storeWhole(map, output);
    if (output.bad.size > 0) map.layer.windows.forget?.(first, count);
    this.#keepEdges(map, first, last, output, whole, keeps);
    for (const border of [first, last + 1]) await this.#completeAcross(map, border, output);
    return output;
  }

  /**
   * Stores an absent piece across the beginning of a span when both its parts are kept: two runs that were decoded beside
   * each other have each brought one.
   */
  async #completeAcross(
    map: LayerMap,
    span: number,
    output: { source: string; stored: Set<number>; bad: Set<number> },
  ): Promise<void> {
    if (span === 0 || span >= map.spanCount) return;
    const [tail, head] = [this.#edges.tail(map.layerId, span - 1), this.#edges.head(map.layerId, span)];
    if (tail === undefined || head === undefined) return;
    const border = map.spanStart(span);
    for (const { ref, tarOffset } of map.ordinaryPieces(border - 1, border)) {
      const end = tarOffset + ref.length;
      if (tarOffset >= border || end <= border || output.bad.has(ref.address)) continue;
      if (this.#store.isPresent(ref.address, ref.length)) continue;
      const assembled = Buffer.alloc(ref.length);
      const whole =
        copyTar(tail, tarOffset, border, assembled, 0) && copyTar(head, border, end, assembled, border - tarOffset);
      if (!whole) continue;
      const piece = toStore(ref, 0);
      this.#note(map, output, [piece], await this.#store.store(assembled, [piece]), false);
    }
  }

  /** Where decoding may stop: behind the last byte of an absent piece. */
  #decodeEnd(map: LayerMap, start: number, end: number): number {
    if (map.hasSparse(start, end)) return end;
    let needed = start;
    for (const { ref, tarOffset } of map.ordinaryPieces(start, end)) {
      if (!this.#store.isPresent(ref.address, ref.length)) needed = tarOffset + ref.length;
    }
    // Nothing absent: it came from elsewhere meanwhile, but whoever waits may still look into the bytes.
    return needed === start ? end : Math.min(needed, end);
  }

  /** Stores every absent piece that lies whole in the output. */
  async #storeWhole(
    map: LayerMap,
    output: TarBytes & { source: string; stored: Set<number>; bad: Set<number> },
  ): Promise<void> {
    const { start, bytes } = output;
    const end = start + bytes.length;
    const pieces: PieceToStore[] = [];
    for (const { ref, tarOffset } of map.ordinaryPieces(start, end)) {
      if (tarOffset < start || tarOffset + ref.length > end) continue;
      if (!this.#store.isPresent(ref.address, ref.length)) pieces.push(toStore(ref, tarOffset - start));
    }
    this.#note(map, output, pieces, await this.#store.store(bytes, pieces));
    for (const { ref, parts } of map.sparsePieces(start, end)) {
      if (this.#store.isPresent(ref.address, ref.length)) continue;
      const assembled = Buffer.alloc(ref.length);
      for (const part of parts) copyTar(output, part.tarOffset, part.tarOffset + part.length, assembled, part.at);
      const piece = toStore(ref, 0);
      this.#note(map, output, [piece], await this.#store.store(assembled, [piece]), false);
    }
  }

  #note(
    map: LayerMap,
    output: { source: string; stored: Set<number>; bad: Set<number> },
    pieces: readonly PieceToStore[],
    result: Uint8Array,
    inPlace = true,
  ): void {
    for (const [i, piece] of pieces.entries()) {
      if (result[i] === 1) {
        this.storedPieces++;
        if (inPlace) output.stored.add(piece.address);
      } else {
        this.badPieces++;
        output.bad.add(piece.address);
        const details = { layer: map.blob.digest, source: output.source, address: piece.address };
        this.#log.warn(details, 'bytes of a layer do not have the digest its index names');
      }
    }
  }

  /** Keeps the bytes of pieces that reach over the borders of the run. */
  #keepEdges(
    map: LayerMap,
    first: number,
    last: number,
    output: TarBytes,
    whole: boolean,
    keeps: (neighbour: number) => boolean,
  ): void {
    const { start, bytes } = output;
    const { layerId } = map;
    const end = start + bytes.length;
    const spanStart = map.spanStart(first);
    const spanEnd = map.spanEnd(last);
    // What the neighbour has left is there for this.
    const awaited = (edge: TarBytes | undefined, span: number): boolean => edge !== undefined || keeps(span);
    if (first > 0 && awaited(this.#edges.tail(layerId, first - 1), first - 1)) {
      for (const { ref, tarOffset } of map.ordinaryPieces(spanStart, spanStart + 1)) {
        if (tarOffset >= spanStart || this.#store.isPresent(ref.address, ref.length)) continue;
        const to = Math.min(tarOffset + ref.length, end);
        this.#edges.keepHead(layerId, first, spanStart, bytes.subarray(spanStart - start, to - start));
      }
    }
    if (whole && last + 1 < map.spanCount && awaited(this.#edges.head(layerId, last + 1), last + 1)) {
      for (const { ref, tarOffset } of map.ordinaryPieces(spanEnd - 1, spanEnd)) {
        if (tarOffset + ref.length <= spanEnd || this.#store.isPresent(ref.address, ref.length)) continue;
        const from = Math.max(tarOffset, start);
        this.#edges.keepTail(layerId, last, from, bytes.subarray(from - start, spanEnd - start));
      }
    }
  }
}

/** The store's job for a piece whose bytes lie at `offset` of the source. */
export function toStore(ref: PieceRef, offset: number): PieceToStore {
  const { map, chunk, piece } = ref;
  return {
    chunkAddress: map.layer.addresses[chunk]!,
    piece,
    pieceCount: map.pieceCount(chunk),
    chunkBytes: map.layer.index.chunks.length[chunk]!,
    address: ref.address,
    offset,
    length: ref.length,
    digest: map.pieceDigest(ref),
  };
}

// What the LazyLoader needs of a layer, and the geometry of one: which chunk lies at a store address, which bytes of
// the tar make up a piece, which spans hold them. Consumer-declared; pure look-ups, no input or output.
import { DedupError } from '../errors.ts';
import { BLOCK_BYTES, type ByteRange } from '../units.ts';
import type { LayerIndex } from './index/layer-index.ts';
import type { BlobId, BlobReader } from './registry/blob-reader.ts';

/** The parts of a layer index that loading needs; entries are not among them. */
export type LayerChunks = Pick<
  LayerIndex,
  'layerDigest' | 'layerBytes' | 'tarBytes' | 'compression' | 'chunkBytes' | 'pieceBytes' | 'chunks' | 'spans'
>;

/** One place a layer can be read from. Sources with one host share its limit of parallel requests. */
export interface LayerBlobSource {
  readonly host: string;
  /** Tells sources of one host apart: "host/repository". Default: the host. */
  readonly name?: string;
  readonly reader: BlobReader;
}

/** The name that tells a source from the others of its layer. */
export function nameOf(source: LayerBlobSource): string {
  return source.name ?? source.host;
}

/** Reads the decompressed windows of restart points. */
export interface WindowReader {
  /**
   * Windows of spans [first, first + count), empty where a span needs none; through `reader` when they are not local.
   * Errors: those of BlobReader.readRange, INDEX_INVALID.
   */
  readWindows(first: number, count: number, reader: BlobReader, signal: AbortSignal): Promise<readonly Uint8Array[]>;
  /**
   * Has the windows of these spans brought here in one request where the registry can, in this order: readWindows finds
   * them, or waits. A hint: what fails is read by it.
   */
  expect?(spans: readonly number[], reader: BlobReader, signal: AbortSignal): void;
  /** Drops kept windows of these spans: what they gave failed verification. */
  forget?(first: number, count: number): void;
}

export interface LoadableLayer {
  readonly index: LayerChunks;
  /** Store address of every chunk; 0 where it has none. */
  readonly addresses: Float64Array;
  readonly windows: WindowReader;
  /** Every source known now, best first. */
  sources(): readonly LayerBlobSource[];
}

/** Opens layers by their number in the store. The loader keeps what it opened and drops what was not used lately. */
export interface LayerProvider {
  openLayer(layerId: number): Promise<LoadableLayer>;
}

/** Bytes of the tar that belong at `at` of a piece. */
export interface PiecePart {
  readonly at: number;
  readonly tarOffset: number;
  readonly length: number;
}

/** One piece of one chunk of one layer. */
export interface PieceRef {
  readonly map: LayerMap;
  readonly chunk: number;
  readonly piece: number;
  /** Address of the piece, bytes. */
  readonly address: number;
  readonly length: number;
}

/** Index of the last of `count` ascending elements that is <= `value`, or -1. */
function lastAtMost(count: number, value: number, at: (i: number) => number): number {
  let low = 0;
  let high = count;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (at(middle) <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

export class LayerMap {
  readonly layerId: number;
  readonly layer: LoadableLayer;
  readonly blob: BlobId;
  /** Memory it holds, bytes, roughly. */
  readonly bytes: number;
  /** Chunks with an address, ascending by address. */
  readonly #byAddress: Uint32Array;
  /** Ordinary chunks, ascending by offset in the tar. */
  readonly #byTar: Uint32Array;
  /** Sparse chunks, ascending by their first fragment. */
  readonly #sparse: Uint32Array;

  constructor(layerId: number, layer: LoadableLayer) {
    this.layerId = layerId;
    this.layer = layer;
    const { chunks, layerDigest, layerBytes } = layer.index;
    this.blob = { digest: layerDigest, size: layerBytes };
    if (layer.addresses.length !== chunks.count) {
      throw new DedupError(
        'STORE_CORRUPT',
        `layer ${layerDigest} has ${chunks.count} chunks and ${layer.addresses.length} addresses`,
      );
    }
    const placed: number[] = [];
    const ordinary: number[] = [];
    const sparse: number[] = [];
    for (let i = 0; i < chunks.count; i++) {
      if (layer.addresses[i]! > 0) placed.push(i);
      if (chunks.zero[i] === 1) continue;
      (this.#isSparse(i) ? sparse : ordinary).push(i);
    }
    const byTar = (a: number, b: number): number => chunks.tarOffset[a]! - chunks.tarOffset[b]!;
    this.#byAddress = Uint32Array.from(placed).sort((a, b) => layer.addresses[a]! - layer.addresses[b]!);
    this.#byTar = Uint32Array.from(ordinary).sort(byTar);
    this.#sparse = Uint32Array.from(sparse).sort(byTar);
    this.bytes = 4096 + chunks.count * 104 + chunks.pieceDigest.length + layer.index.spans.count * 40;
  }

  #isSparse(chunk: number): boolean {
    const { fragmentStart } = this.layer.index.chunks;
    return fragmentStart[chunk + 1]! > fragmentStart[chunk]!;
  }

  get spanCount(): number {
    return this.layer.index.spans.count;
  }

  /** Output of a span: its range in the uncompressed tar. */
  spanStart(span: number): number {
    return this.layer.index.spans.outOffset[span]!;
  }

  spanEnd(span: number): number {
    return span + 1 < this.spanCount ? this.layer.index.spans.outOffset[span + 1]! : this.layer.index.tarBytes;
  }

  /** The compressed bytes that spans [first, first + count) need, the byte with the first one's leading bits included. */
  compressedRange(first: number, count: number): ByteRange {
    const { spans, layerBytes } = this.layer.index;
    const offset = spans.inOffset[first]! - (spans.bits[first]! > 0 ? 1 : 0);
    const end = first + count < spans.count ? spans.inOffset[first + count]! : layerBytes;
    return { offset, length: end - offset };
  }

  /** The span that holds a byte of the tar. */
  spanAt(tarOffset: number): number {
    const { outOffset, count } = this.layer.index.spans;
    return lastAtMost(count, tarOffset, (i) => outOffset[i]!);
  }

  /** The chunk whose blocks contain `address`, or undefined. */
  chunkAt(address: number): number | undefined {
    const { addresses, index } = this.layer;
    const at = lastAtMost(this.#byAddress.length, address, (i) => addresses[this.#byAddress[i]!]!);
    if (at < 0) return undefined;
    const chunk = this.#byAddress[at]!;
    const end = addresses[chunk]! + Math.ceil(index.chunks.length[chunk]! / BLOCK_BYTES) * BLOCK_BYTES;
    return address < end ? chunk : undefined;
  }

  pieceCount(chunk: number): number {
    return Math.ceil(this.layer.index.chunks.length[chunk]! / this.layer.index.pieceBytes);
  }

  piece(chunk: number, piece: number): PieceRef {
    const { chunks, pieceBytes } = this.layer.index;
    return {
      map: this,
      chunk,
      piece,
      address: this.layer.addresses[chunk]! + piece * pieceBytes,
      length: Math.min(pieceBytes, chunks.length[chunk]! - piece * pieceBytes),
    };
  }

  pieceDigest(ref: PieceRef): Uint8Array {
    const { chunks } = this.layer.index;
    const at = chunks.pieceStart[ref.chunk]! + ref.piece;
    return chunks.pieceDigest.subarray(at * 32, at * 32 + 32);
  }

  /** Bytes of the tar that make up a piece, ascending; what they leave out is zeros. Empty for a zero chunk. */
  partsOf(ref: PieceRef): PiecePart[] {
    const { chunks, pieceBytes } = this.layer.index;
    if (chunks.zero[ref.chunk] === 1) return [];
    const start = ref.piece * pieceBytes;
    if (!this.#isSparse(ref.chunk))
      return [{ at: 0, tarOffset: chunks.tarOffset[ref.chunk]! + start, length: ref.length }];
    const parts: PiecePart[] = [];
    for (let i = chunks.fragmentStart[ref.chunk]!; i < chunks.fragmentStart[ref.chunk + 1]!; i++) {
      const offset = chunks.fragmentChunkOffset[i]!;
      const from = Math.max(offset, start);
      const to = Math.min(offset + chunks.fragmentLength[i]!, start + ref.length);
      if (from < to)
        parts.push({ at: from - start, tarOffset: chunks.fragmentTarOffset[i]! + from - offset, length: to - from });
    }
    return parts;
  }

  /** Pieces of ordinary chunks that have a byte in [start, end) of the tar, with where they start there. */
  *ordinaryPieces(start: number, end: number): Generator<{ ref: PieceRef; tarOffset: number }> {
    const { chunks, pieceBytes } = this.layer.index;
    const first = Math.max(
      0,
      lastAtMost(this.#byTar.length, start, (i) => chunks.tarOffset[this.#byTar[i]!]!),
    );
    for (let i = first; i < this.#byTar.length; i++) {
      const chunk = this.#byTar[i]!;
      const base = chunks.tarOffset[chunk]!;
      if (base >= end) return;
      const length = chunks.length[chunk]!;
      const from = Math.max(0, Math.floor((start - base) / pieceBytes));
      for (let piece = from; piece * pieceBytes < length && base + piece * pieceBytes < end; piece++) {
        const ref = this.piece(chunk, piece);
        if (base + piece * pieceBytes + ref.length > start) yield { ref, tarOffset: base + piece * pieceBytes };
      }
    }
  }

  /** Pieces of sparse chunks that have at least one byte in the tar, all of them within [start, end). */
  *sparsePieces(start: number, end: number): Generator<{ ref: PieceRef; parts: PiecePart[] }> {
    const { chunks } = this.layer.index;
    const first = Math.max(
      0,
      lastAtMost(this.#sparse.length, start, (i) => chunks.tarOffset[this.#sparse[i]!]!),
    );
    for (let i = first; i < this.#sparse.length; i++) {
      const chunk = this.#sparse[i]!;
      if (chunks.tarOffset[chunk]! >= end) return;
      for (let piece = 0; piece < this.pieceCount(chunk); piece++) {
        const ref = this.piece(chunk, piece);
        const parts = this.partsOf(ref);
        if (parts.length > 0 && parts.every((part) => part.tarOffset >= start && part.tarOffset + part.length <= end))
          yield { ref, parts };
      }
    }
  }

  /** Chunks with a byte in [start, end) of the store, ascending by address. */
  *chunksIn(start: number, end: number): Generator<number> {
    const { addresses, index } = this.layer;
    const count = this.#byAddress.length;
    const at = lastAtMost(count, start, (i) => addresses[this.#byAddress[i]!]!);
    for (let i = Math.max(0, at); i < count; i++) {
      const chunk = this.#byAddress[i]!;
      const address = addresses[chunk]!;
      if (address >= end) return;
      if (address + index.chunks.length[chunk]! > start) yield chunk;
    }
  }

  /** Spans that hold a byte of a piece, ascending. */
  spansOf(ref: PieceRef): Set<number> {
    const spans = new Set<number>();
    for (const part of this.partsOf(ref)) {
      const last = this.spanAt(part.tarOffset + part.length - 1);
      for (let span = this.spanAt(part.tarOffset); span <= last; span++) spans.add(span);
    }
    return spans;
  }

  /** True when a sparse chunk has a byte in [start, end) of the tar. */
  hasSparse(start: number, end: number): boolean {
    if (this.#sparse.length === 0) return false;
    const { chunks } = this.layer.index;
    const at = lastAtMost(this.#sparse.length, end - 1, (i) => chunks.tarOffset[this.#sparse[i]!]!);
    if (at < 0) return false;
    const last = chunks.fragmentStart[this.#sparse[at]! + 1]! - 1;
    return chunks.fragmentTarOffset[last]! + chunks.fragmentLength[last]! > start;
  }
}

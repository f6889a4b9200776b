// Cuts the content of a layer's files into chunks and pieces while it streams by, and collects their names. Called by
// builder.ts with one buffer of the tar after the other, one file after the other in it; the digests come later, for a
// native thread computes them from the ranges of `endBuffer`. It keeps digests, and bytes only for `onPiece`.
import { DedupError } from '../../errors.ts';
import { HOLE_OFFSET } from '../native.ts';
import type { FileExtents } from './chunk-table.ts';
import { canonicalFragments } from './chunk-table.ts';
import { MAX_CHUNKS, MAX_FRAGMENTS, MAX_PIECES, MAX_ZERO_CHUNKS } from './format-limits.ts';
import type { Fragment } from './tar-header.ts';

/** A whole piece, as given to a node that keeps chunks while it indexes. */
export interface IndexedPiece {
  /** Number of the chunk in the layer's chunk table. */
  readonly chunk: number;
  /** Number of the piece within the chunk. */
  readonly piece: number;
  /** 32 bytes. */
  readonly digest: Buffer;
  readonly length: number;
  /** Its bytes, one part after the other; valid during the call only. */
  readonly parts: readonly Buffer[];
}

/** What a node that keeps chunks does with a whole piece: it copies what it wants; the promise holds the build up. */
export type OnPiece = (piece: IndexedPiece) => Promise<void> | undefined;

/** What came to its end in a buffer, in order. */
type Ended =
  | { readonly piece: number; readonly parts: readonly Buffer[]; readonly carried: Buffer | undefined }
  | { readonly zeroChunk: boolean };

/** What a hasher is to be told about a buffer of the tar, and what its answer is to be given to. */
export interface BufferRanges {
  /** As StreamHasher.push takes them. */
  readonly ranges: Uint32Array;
  /** Takes the digests of the pieces that ended, 32 bytes each; buffer after buffer, in order. */
  readonly named: (digests: Buffer) => Promise<unknown> | undefined;
}

const ZEROS = Buffer.alloc(64 * 1024);
/** Most zeros in one range, bytes. */
const MAX_HOLE_RANGE_BYTES = 2 ** 31;

/** True when every byte is zero. */
export function allZero(bytes: Buffer): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const end = Math.min(at + ZEROS.length, bytes.length);
    if (bytes.compare(ZEROS, 0, end - at, at, end) !== 0) return false;
  }
  return true;
}

/** Without `onPiece` nothing is kept of what ended but that it did. */
const PIECE: Ended = { piece: 0, parts: [], carried: undefined };
const CHUNK: Ended = { zeroChunk: false };
const ZERO_CHUNK: Ended = { zeroChunk: true };

export class Chunker {
  readonly #chunkBytes: number;
  readonly #pieceBytes: number;
  readonly #onPiece: OnPiece | undefined;

  readonly #sizes: number[] = [];
  readonly #bases: number[] = [];
  readonly #sparse = new Map<number, readonly Fragment[]>();
  readonly #zero: number[] = [];
  #zeroCount = 0;
  #fragmentCount = 0;
  /** Digests of pieces whose chunk is not known to be zeros, 32 bytes each, and where the last ended chunk's end. */
  #digests = Buffer.allocUnsafe(256 * 1024);
  #digestBytes = 0;
  #namedBytes = 0;
  /** Chunks that ended in named buffers. */
  #namedChunks = 0;
  /** Pieces of chunks that are not zeros, and of the chunk being read. */
  #pieces = 0;

  /** The buffer being read: its ranges, three numbers each, and what ended in it. */
  #bufferOffset = 0;
  #ranges = new Uint32Array(3 * 1024);
  #rangeNumbers = 0;
  #ended: Ended[] = [];

  /** The file being read: its size, the place of the next byte in it, and its fragments when it is sparse. */
  #size = 0;
  #at = 0;
  #fragments: readonly Fragment[] | undefined;
  #fragment = 0;
  /** The chunk being read: bytes of it so far, whether all were zeros, pieces that ended. */
  #chunkAt = 0;
  #chunkZero = true;
  #pieceOfChunk = 0;
  /** The piece being read: its bytes so far, and for `onPiece` the bytes themselves. */
  #pieceAt = 0;
  #pieceParts: Buffer[] = [];
  /** Holds what earlier buffers had of the piece; memory of pieces that were handed out is used again. */
  #carried: Buffer | undefined;
  readonly #spare: Buffer[] = [];

  constructor(options: {
    readonly chunkBytes: number;
    readonly pieceBytes: number;
    readonly onPiece?: OnPiece | undefined;
  }) {
    this.#chunkBytes = options.chunkBytes;
    this.#pieceBytes = options.pieceBytes;
    this.#onPiece = options.onPiece;
  }

  get chunkCount(): number {
    return this.#zero.length;
  }

  /** Starts the next buffer of the tar; content until `endBuffer` is views of it. */
  startBuffer(bytes: Buffer): void {
    this.#bufferOffset = bytes.byteOffset;
  }

  /** Ends the buffer, which must not change until its digests have been given to `named`. */
  endBuffer(): BufferRanges {
    this.#carryOver();
    const ranges = this.#ranges.slice(0, this.#rangeNumbers);
    const ended = this.#ended;
    this.#rangeNumbers = 0;
    this.#ended = [];
    return { ranges, named: (digests) => this.#named(ended, digests) };
  }

  /** Starts a file of `size` > 0 bytes whose content starts at `base` in the tar. */
  startFile(size: number, base: number, fragments: readonly Fragment[] | undefined): void {
    const canonical = fragments === undefined ? undefined : canonicalFragments(fragments, size);
    if (canonical !== undefined) {
      this.#sparse.set(this.#sizes.length, canonical);
      this.#fragmentCount += canonical.length;
      if (this.#fragmentCount > MAX_FRAGMENTS) throw tooMuch(`${MAX_FRAGMENTS} fragments of sparse files`);
    }
    this.#sizes.push(size);
    this.#bases.push(base);
    this.#size = size;
    this.#at = 0;
    this.#fragments = canonical;
    this.#fragment = 0;
    this.#chunkAt = 0;
    this.#skipHole();
  }

  /** The next bytes of the file as they stand in the tar. */
  content(bytes: Buffer): void {
    if (this.#fragments === undefined) {
      this.#feed(bytes, bytes.length);
      return;
    }
    for (let at = 0; at < bytes.length; ) {
      const fragment = this.#fragments[this.#fragment]!;
      const length = Math.min(bytes.length - at, fragment.offset + fragment.length - this.#at);
      this.#feed(bytes.subarray(at, at + length), length);
      at += length;
      if (this.#at === fragment.offset + fragment.length) {
        this.#fragment++;
        this.#skipHole();
      }
    }
  }

  /** Feeds the zeros between the place reached and the next fragment, or the end of the file. */
  #skipHole(): void {
    if (this.#fragments === undefined) return;
    let left = (this.#fragments[this.#fragment]?.offset ?? this.#size) - this.#at;
    while (left > 0) {
      const inChunk = Math.min(this.#chunkBytes, this.#size - this.#at + this.#chunkAt) - this.#chunkAt;
      if (this.#chunkAt === 0 && left >= inChunk) {
        this.#at += inChunk;
        this.#endChunk(true);
        left -= inChunk;
      } else {
        const length = Math.min(left, MAX_HOLE_RANGE_BYTES);
        this.#feed(undefined, length);
        left -= length;
      }
    }
  }

  /** `bytes` undefined: `total` zeros of a hole. */
  #feed(bytes: Buffer | undefined, total: number): void {
    for (let at = 0; at < total; ) {
      const inPiece = Math.min(this.#pieceBytes - this.#pieceAt, this.#size - this.#at);
      const length = Math.min(inPiece, total - at);
      const ends = length === inPiece;
      if (bytes === undefined) {
        this.#range(HOLE_OFFSET, length, ends);
        if (this.#onPiece !== undefined) this.#pieceParts.push(Buffer.alloc(length));
      } else {
        if (this.#chunkZero && !(bytes[at] === 0 && allZero(bytes.subarray(at, at + length)))) this.#chunkZero = false;
        this.#range(bytes.byteOffset - this.#bufferOffset + at, length, ends);
        if (this.#onPiece !== undefined) this.#pieceParts.push(bytes.subarray(at, at + length));
      }
      this.#pieceAt = ends ? 0 : this.#pieceAt + length;
      at += length;
      this.#at += length;
      this.#chunkAt += length;
      if (ends) this.#endPiece();
      if (this.#chunkAt === this.#chunkBytes || this.#at === this.#size) this.#endChunk(this.#chunkZero);
    }
  }

  #range(offset: number, length: number, ends: boolean): void {
    const i = this.#rangeNumbers;
    if (i === this.#ranges.length) {
      const larger = new Uint32Array(i * 2);
      larger.set(this.#ranges);
      this.#ranges = larger;
    }
    this.#ranges[i] = offset;
    this.#ranges[i + 1] = length;
    this.#ranges[i + 2] = ends ? 1 : 0;
    this.#rangeNumbers = i + 3;
  }

  /** Copies what the buffer has of a piece that goes on in the next one. */
  #carryOver(): void {
    if (this.#onPiece === undefined || this.#pieceAt === 0) return;
    const carried = this.#carried ?? this.#spare.pop() ?? Buffer.allocUnsafeSlow(this.#pieceBytes);
    let at = 0;
    for (const part of this.#pieceParts) {
      if (part.buffer !== carried.buffer) part.copy(carried, at);
      at += part.length;
    }
    this.#carried = carried;
    this.#pieceParts = [carried.subarray(0, at)];
  }

  #endPiece(): void {
    this.#ended.push(
      this.#onPiece === undefined
        ? PIECE
        : { piece: this.#pieceOfChunk, parts: this.#pieceParts, carried: this.#carried },
    );
    this.#carried = undefined;
    if (this.#pieceParts.length > 0) this.#pieceParts = [];
    this.#pieceOfChunk++;
    this.#pieces++;
  }

  #endChunk(zero: boolean): void {
    this.#zero.push(zero ? 1 : 0);
    this.#ended.push(zero ? ZERO_CHUNK : CHUNK);
    if (zero) {
      // The names of zero chunks are derived, not stored.
      this.#pieces -= this.#pieceOfChunk;
      if (++this.#zeroCount > MAX_ZERO_CHUNKS) throw tooMuch(`${MAX_ZERO_CHUNKS} chunks of zeros`);
    }
    this.#chunkAt = 0;
    this.#chunkZero = true;
    this.#pieceOfChunk = 0;
    if (this.#zero.length > MAX_CHUNKS || this.#pieces > MAX_PIECES) throw tooMuch(`${MAX_CHUNKS} chunks`);
  }

  /** Files what a buffer's digests say about what ended in it. */
  #named(ended: readonly Ended[], digests: Buffer): Promise<unknown> | undefined {
    this.#reserve(digests.length);
    const waiting: Promise<void>[] = [];
    let from = 0;
    for (const item of ended) {
      if ('zeroChunk' in item) {
        if (item.zeroChunk) this.#digestBytes = this.#namedBytes;
        this.#namedBytes = this.#digestBytes;
        this.#namedChunks++;
        continue;
      }
      digests.copy(this.#digests, this.#digestBytes, from, from + 32);
      this.#digestBytes += 32;
      if (this.#onPiece !== undefined) {
        const { piece, parts, carried } = item;
        const digest = digests.subarray(from, from + 32);
        const length = parts.reduce((sum, part) => sum + part.length, 0);
        const promise = this.#onPiece({ chunk: this.#namedChunks, piece, digest, length, parts });
        if (promise !== undefined) waiting.push(promise);
        if (carried !== undefined) this.#spare.push(carried);
      }
      from += 32;
    }
    if (from !== digests.length) throw new DedupError('INTERNAL', 'the hasher named other pieces than it was given');
    return waiting.length === 0 ? undefined : Promise.all(waiting);
  }

  #reserve(bytes: number): void {
    if (this.#digestBytes + bytes <= this.#digests.length) return;
    const larger = Buffer.allocUnsafe(Math.max(this.#digests.length * 2, this.#digestBytes + bytes));
    this.#digests.copy(larger, 0, 0, this.#digestBytes);
    this.#digests = larger;
  }

  /** Files, zero marks and stored piece digests of everything read; every buffer has been named. */
  finish(): { files: FileExtents; zero: Uint8Array; storedPieces: Buffer } {
    return {
      files: {
        count: this.#sizes.length,
        size: Float64Array.from(this.#sizes),
        base: Float64Array.from(this.#bases),
        sparse: this.#sparse,
      },
      zero: Uint8Array.from(this.#zero),
      storedPieces: this.#digests.subarray(0, this.#digestBytes),
    };
  }
}

function tooMuch(what: string): DedupError {
  return new DedupError('LAYER_INVALID', `the layer has more than ${what}`);
}

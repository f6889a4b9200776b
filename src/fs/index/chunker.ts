// Cuts the content of a layer's files into chunks and pieces while it streams by, and names them. Called by builder.ts
// with one file after the other; it keeps digests, and bytes only as long as a piece is incomplete.
import { createHash, type Hash, hash } from 'node:crypto';
import { DedupError } from '../../errors.ts';
import type { FileExtents } from './chunk-table.ts';
import { canonicalFragments } from './chunk-table.ts';
import { MAX_CHUNKS, MAX_FRAGMENTS, MAX_PIECES, MAX_ZERO_CHUNKS } from './format-limits.ts';
import type { Fragment } from './tar-header.ts';

/** A whole piece, as given to a node that keeps chunks while it indexes. `bytes` may be kept, not changed. */
export interface IndexedPiece {
  /** Number of the chunk in the layer's chunk table. */
  readonly chunk: number;
  /** Number of the piece within the chunk. */
  readonly piece: number;
  /** 32 bytes. */
  readonly digest: Buffer;
  readonly bytes: Buffer;
}

const ZEROS = Buffer.alloc(64 * 1024);

function allZero(bytes: Buffer): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const end = Math.min(at + ZEROS.length, bytes.length);
    if (bytes.compare(ZEROS, 0, end - at, at, end) !== 0) return false;
  }
  return true;
}

export class Chunker {
  readonly #chunkBytes: number;
  readonly #pieceBytes: number;
  readonly #onPiece: ((piece: IndexedPiece) => void) | undefined;

  readonly #sizes: number[] = [];
  readonly #bases: number[] = [];
  readonly #sparse = new Map<number, readonly Fragment[]>();
  readonly #zero: number[] = [];
  #zeroCount = 0;
  #fragmentCount = 0;
  /** Piece digests of chunks that are not zeros, 32 bytes each. */
  #digests = Buffer.allocUnsafe(256 * 1024);
  #digestBytes = 0;

  /** The file being read: its size, the place of the next byte in it, and its fragments when it is sparse. */
  #size = 0;
  #at = 0;
  #fragments: readonly Fragment[] | undefined;
  #fragment = 0;
  /** The chunk being read: bytes of it so far, whether all were zeros, where its digests start. */
  #chunkAt = 0;
  #chunkZero = true;
  #chunkDigestsAt = 0;
  #pieceOfChunk = 0;
  /** The piece being read, when its bytes come in parts. */
  #pieceAt = 0;
  #pieceHash: Hash | undefined;
  #pieceParts: Buffer[] = [];

  constructor(options: {
    readonly chunkBytes: number;
    readonly pieceBytes: number;
    readonly onPiece?: ((piece: IndexedPiece) => void) | undefined;
  }) {
    this.#chunkBytes = options.chunkBytes;
    this.#pieceBytes = options.pieceBytes;
    this.#onPiece = options.onPiece;
  }

  get chunkCount(): number {
    return this.#zero.length;
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
      this.#feed(bytes);
      return;
    }
    for (let at = 0; at < bytes.length; ) {
      const fragment = this.#fragments[this.#fragment]!;
      const length = Math.min(bytes.length - at, fragment.offset + fragment.length - this.#at);
      this.#feed(bytes.subarray(at, at + length));
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
        const length = Math.min(left, ZEROS.length);
        this.#feed(ZEROS.subarray(0, length));
        left -= length;
      }
    }
  }

  #feed(bytes: Buffer): void {
    for (let at = 0; at < bytes.length; ) {
      const inFile = this.#size - this.#at;
      const inPiece = Math.min(this.#pieceBytes - this.#pieceAt, inFile);
      const length = Math.min(inPiece, bytes.length - at);
      const part = length === bytes.length ? bytes : bytes.subarray(at, at + length);
      if (this.#chunkZero && (part[0] !== 0 || !allZero(part))) this.#chunkZero = false;
      if (length === inPiece && this.#pieceAt === 0) {
        this.#endPiece(hash('sha256', part, 'buffer'), part);
      } else {
        this.#pieceHash ??= createHash('sha256');
        this.#pieceHash.update(part);
        // ZEROS and the caller's buffer are never changed, so parts can be kept without a copy.
        if (this.#onPiece !== undefined) this.#pieceParts.push(part);
        this.#pieceAt += length;
        if (length === inPiece) {
          this.#endPiece(
            this.#pieceHash.digest(),
            this.#onPiece === undefined ? part : Buffer.concat(this.#pieceParts),
          );
        }
      }
      at += length;
      this.#at += length;
      this.#chunkAt += length;
      if (this.#chunkAt === this.#chunkBytes || this.#at === this.#size) this.#endChunk(this.#chunkZero);
    }
  }

  #endPiece(digest: Buffer, bytes: Buffer): void {
    if (this.#digestBytes + 32 > this.#digests.length) {
      const larger = Buffer.allocUnsafe(this.#digests.length * 2);
      this.#digests.copy(larger);
      this.#digests = larger;
    }
    digest.copy(this.#digests, this.#digestBytes);
    this.#digestBytes += 32;
    this.#pieceHash = undefined;
    this.#pieceParts = [];
    this.#pieceAt = 0;
    this.#onPiece?.({ chunk: this.#zero.length, piece: this.#pieceOfChunk, digest, bytes });
    this.#pieceOfChunk++;
  }

  #endChunk(zero: boolean): void {
    this.#zero.push(zero ? 1 : 0);
    if (zero) {
      // The names of zero chunks are derived, not stored.
      this.#digestBytes = this.#chunkDigestsAt;
      if (++this.#zeroCount > MAX_ZERO_CHUNKS) throw tooMuch(`${MAX_ZERO_CHUNKS} chunks of zeros`);
    }
    this.#chunkDigestsAt = this.#digestBytes;
    this.#chunkAt = 0;
    this.#chunkZero = true;
    this.#pieceOfChunk = 0;
    if (this.#zero.length > MAX_CHUNKS || this.#digestBytes > MAX_PIECES * 32) throw tooMuch(`${MAX_CHUNKS} chunks`);
  }

  /** Files, zero marks and stored piece digests of everything read. */
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

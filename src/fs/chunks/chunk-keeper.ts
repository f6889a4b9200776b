// Keeps the chunks of a layer while it is read for the first time: gathers whole pieces into batches, has their chunks
// given addresses, and stores them. Made by NodeStore.keepChunks; whoever reads the layer gives it every piece, adds the
// layer at the end, and disposes of it in any case.
import { DedupError } from '../../errors.ts';
import { MiB } from '../../units.ts';
import type { IndexedPiece, OnPiece } from '../index/chunker.ts';
import { chunkName } from '../index/zero-digests.ts';
import type { PieceToStore } from './store-types.ts';

/** What a keeper needs of the node store. */
export interface KeepingStore {
  /** Addresses of chunks, given now where they are new; 32 bytes of name and a length each. */
  hold(digests: Uint8Array, lengths: Uint32Array): Promise<Float64Array>;
  isPresent(address: number, length: number): boolean;
  store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array>;
  /** Lets go of every chunk held; what no layer counts is freed. */
  release(): Promise<void>;
}

interface WholeChunk {
  readonly length: number;
  readonly name: Buffer;
  readonly pieces: readonly IndexedPiece[];
}

/** A batch is given addresses and stored once it has so many bytes, or chunks. */
const BATCH_BYTES = 4 * MiB;
const BATCH_CHUNKS = 1024;
/** Batches on their way to the disk while the next is gathered: one hides the other's wait. */
const MAX_UNDER_WAY = 2;

const ZEROS = Buffer.alloc(64 * 1024);

export class ChunkKeeper implements AsyncDisposable {
  readonly #store: KeepingStore;
  readonly #pieceBytes: number;
  readonly #maxPieces: number;
  /** The chunk whose pieces are coming. */
  #chunk = -1;
  #pieces: IndexedPiece[] = [];
  #batch: WholeChunk[] = [];
  #batchBytes = 0;
  readonly #underWay = new Set<Promise<void>>();
  #failure: unknown;
  /** Bytes written because they were not here, and bytes that were. */
  storedBytes = 0;
  knownBytes = 0;

  constructor(store: KeepingStore, options: { readonly chunkBytes: number; readonly pieceBytes: number }) {
    this.#store = store;
    this.#pieceBytes = options.pieceBytes;
    this.#maxPieces = options.chunkBytes / options.pieceBytes;
  }

  /** Takes pieces in the order of their chunks. The promise, if any, is to be awaited before more than a few MiB follow. */
  readonly onPiece: OnPiece = (piece) => {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (piece.chunk !== this.#chunk) {
      this.#endChunk();
      this.#chunk = piece.chunk;
    }
    this.#pieces.push(piece);
    // A short piece, or the last that fits, ends its chunk; one that ends with a whole piece ends with the next chunk.
    if (piece.bytes.length < this.#pieceBytes || this.#pieces.length === this.#maxPieces) this.#endChunk();
    if (this.#batchBytes < BATCH_BYTES && this.#batch.length < BATCH_CHUNKS) return undefined;
    this.#send();
    return this.#underWay.size < MAX_UNDER_WAY ? undefined : Promise.race(this.#underWay).then(() => this.#check());
  };

  /** Resolves once every piece given is stored. Errors: STORE_IO, STORE_FULL, INDEX_INVALID. */
  async settled(): Promise<void> {
    this.#endChunk();
    this.#send();
    await Promise.all(this.#underWay);
    this.#check();
  }

  #check(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  #endChunk(): void {
    const pieces = this.#pieces;
    if (pieces.length === 0) return;
    this.#pieces = [];
    this.#chunk = -1;
    // Holes of a file have no bytes in the store.
    if (pieces.every(({ bytes }) => isZero(bytes))) return;
    const length = pieces.reduce((sum, { bytes }) => sum + bytes.length, 0);
    this.#batch.push({ length, name: chunkName(Buffer.concat(pieces.map(({ digest }) => digest))), pieces });
    this.#batchBytes += length;
  }

  #send(): void {
    if (this.#batch.length === 0) return;
    const batch = this.#batch;
    this.#batch = [];
    this.#batchBytes = 0;
    // Never rejects: the failure is told by the next call.
    const work: Promise<void> = this.#keep(batch)
      .catch((error: unknown) => {
        this.#failure ??= error;
      })
      .finally(() => this.#underWay.delete(work));
    this.#underWay.add(work);
  }

  async #keep(batch: readonly WholeChunk[]): Promise<void> {
    const addresses = await this.#store.hold(
      Buffer.concat(batch.map(({ name }) => name)),
      Uint32Array.from(batch, ({ length }) => length),
    );
    const pieces: PieceToStore[] = [];
    const parts: Buffer[] = [];
    let offset = 0;
    for (const [i, chunk] of batch.entries()) {
      for (const [piece, { bytes, digest }] of chunk.pieces.entries()) {
        const address = addresses[i]! + piece * this.#pieceBytes;
        const { length } = bytes;
        if (this.#store.isPresent(address, length)) {
          this.knownBytes += length;
          continue;
        }
        const place = { chunkAddress: addresses[i]!, piece, pieceCount: chunk.pieces.length, chunkBytes: chunk.length };
        pieces.push({ ...place, address, offset, length, digest });
        parts.push(bytes);
        offset += length;
      }
    }
    const stored = await this.#store.store(Buffer.concat(parts, offset), pieces);
    if (!stored.every((good) => good === 1)) {
      throw new DedupError('STORE_IO', 'bytes of a layer changed between being named and being stored');
    }
    this.storedBytes += offset;
  }

  /** Waits for what is under way and lets go of the chunks. Idempotent. Errors: STORE_IO. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#underWay);
    await this.#store.release();
  }
}

function isZero(bytes: Buffer): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const end = Math.min(at + ZEROS.length, bytes.length);
    if (bytes.compare(ZEROS, 0, end - at, at, end) !== 0) return false;
  }
  return true;
}

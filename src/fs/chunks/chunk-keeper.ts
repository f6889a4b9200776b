// Keeps the chunks of a layer while it is read for the first time: gathers whole pieces into batches, has their chunks
// given addresses, and stores them. Made by NodeStore.keepChunks; whoever reads the layer gives it every piece, adds the
// layer at the end, and disposes of it in any case.
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../../units.ts';
import { allZero, type IndexedPiece, type OnPiece } from '../index/chunker.ts';
import { chunkName } from '../index/zero-digests.ts';
import type { PieceToStore } from './store-types.ts';

/** What a keeper needs of the node store. */
export interface KeepingStore {
  /** Addresses of chunks, given now where they are new; 32 bytes of name and a length each. */
  hold(digests: Uint8Array, lengths: Uint32Array): Promise<Float64Array>;
  isPresent(address: number, length: number): boolean;
  store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array>;
  /** Asked before so many bytes are stored; absent: whatever is left may be taken. Errors: STORE_FULL. */
  requireRoom?: ((bytes: number) => Promise<void>) | undefined;
  /** Lets go of every chunk held; what no layer counts is freed. */
  release(): Promise<void>;
}

/** A piece of the batch: where its bytes lie, and its name. */
interface KeptPiece {
  readonly offset: number;
  readonly length: number;
  readonly digest: Buffer;
}

interface WholeChunk {
  readonly length: number;
  readonly name: Buffer;
  readonly pieces: readonly KeptPiece[];
}

interface Batch {
  readonly bytes: Buffer;
  readonly chunks: readonly WholeChunk[];
}

/** A batch is given addresses and stored once it has so many bytes, or chunks. */
const BATCH_BYTES = 4 * MiB;
const BATCH_CHUNKS = 1024;
/** Batches on their way to the disk while the next is gathered: one hides the other's wait. */
const MAX_UNDER_WAY = 2;

export class ChunkKeeper implements AsyncDisposable {
  readonly #store: KeepingStore;
  readonly #pieceBytes: number;
  readonly #maxPieces: number;
  readonly #chunkBytes: number;
  /** The chunk whose pieces are coming, and whether all of them are zeros. */
  #chunk = -1;
  #pieces: KeptPiece[] = [];
  #zero = true;
  /** The batch being filled: its memory, how much of it is used, its chunks. */
  #memory: Buffer | undefined;
  #used = 0;
  #chunks: WholeChunk[] = [];
  /** Memory of batches that have been stored. */
  readonly #spare: Buffer[] = [];
  readonly #underWay = new Set<Promise<void>>();
  /** What batches on their way to the disk take there. */
  #writingBytes = 0;
  #failure: unknown;
  /** Bytes written because they were not here, and bytes that were. */
  storedBytes = 0;
  knownBytes = 0;

  constructor(store: KeepingStore, options: { readonly chunkBytes: number; readonly pieceBytes: number }) {
    this.#store = store;
    this.#pieceBytes = options.pieceBytes;
    this.#chunkBytes = options.chunkBytes;
    this.#maxPieces = options.chunkBytes / options.pieceBytes;
  }

  /** Takes pieces in the order of their chunks. The promise, if any, is to be awaited before more than a few MiB follow. */
  readonly onPiece: OnPiece = (piece) => {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (piece.chunk !== this.#chunk) {
      this.#endChunk();
      this.#chunk = piece.chunk;
    }
    let sent = this.#sendIfFull();
    this.#copy(piece);
    // A short piece, or the last that fits, ends its chunk; one that ends with a whole piece ends with the next chunk.
    if (piece.length < this.#pieceBytes || this.#pieces.length === this.#maxPieces) this.#endChunk();
    sent = this.#sendIfFull() || sent;
    if (!sent || this.#underWay.size < MAX_UNDER_WAY) return undefined;
    return Promise.race(this.#underWay).then(() => this.#check());
  };

  /** Between two chunks only. */
  #sendIfFull(): boolean {
    const isFull = this.#used >= BATCH_BYTES || this.#chunks.length >= BATCH_CHUNKS;
    if (this.#pieces.length > 0 || !isFull) return false;
    this.#send();
    return true;
  }

  #copy({ digest, length, parts }: IndexedPiece): void {
    // A batch is whole chunks, and its last one may begin just before it is full.
    this.#memory ??= this.#spare.pop() ?? Buffer.allocUnsafeSlow(BATCH_BYTES + this.#chunkBytes);
    const offset = this.#used;
    for (const part of parts) {
      part.copy(this.#memory, this.#used);
      this.#used += part.length;
    }
    this.#zero &&= allZero(this.#memory.subarray(offset, this.#used));
    this.#pieces.push({ offset, length, digest });
  }

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
    const first = pieces[0];
    if (first === undefined) return;
    const zero = this.#zero;
    this.#pieces = [];
    this.#zero = true;
    this.#chunk = -1;
    if (zero) {
      // Holes of a file have no bytes in the store.
      this.#used = first.offset;
      return;
    }
    const name = chunkName(Buffer.concat(pieces.map(({ digest }) => digest)));
    this.#chunks.push({ length: this.#used - first.offset, name, pieces });
  }

  #send(): void {
    if (this.#chunks.length === 0 || this.#memory === undefined) return;
    const batch: Batch = { bytes: this.#memory, chunks: this.#chunks };
    this.#memory = undefined;
    this.#used = 0;
    this.#chunks = [];
    // Never rejects: the failure is told by the next call.
    const work: Promise<void> = this.#keep(batch)
      .then(
        () => void this.#spare.push(batch.bytes),
        (error: unknown) => {
          this.#failure ??= error;
        },
      )
      .finally(() => this.#underWay.delete(work));
    this.#underWay.add(work);
  }

  async #keep({ bytes, chunks }: Batch): Promise<void> {
    const addresses = await this.#store.hold(
      Buffer.concat(chunks.map(({ name }) => name)),
      Uint32Array.from(chunks, ({ length }) => length),
    );
    const pieces: PieceToStore[] = [];
    let storedBytes = 0;
    for (const [i, chunk] of chunks.entries()) {
      for (const [piece, { offset, length, digest }] of chunk.pieces.entries()) {
        const address = addresses[i]! + piece * this.#pieceBytes;
        if (this.#store.isPresent(address, length)) {
          this.knownBytes += length;
          continue;
        }
        const place = { chunkAddress: addresses[i]!, piece, pieceCount: chunk.pieces.length, chunkBytes: chunk.length };
        pieces.push({ ...place, address, offset, length, digest });
        storedBytes += length;
      }
    }
    const stored = await this.#storeWhereRoom(bytes, pieces);
    if (!stored.every((good) => good === 1)) {
      throw new DedupError('STORE_IO', 'bytes of a layer changed between being named and being stored');
    }
    this.storedBytes += storedBytes;
  }

  async #storeWhereRoom(bytes: Buffer, pieces: readonly PieceToStore[]): Promise<Uint8Array> {
    const takes = pieces.reduce((sum, { length }) => sum + roundUp(length, BLOCK_BYTES), 0);
    this.#writingBytes += takes;
    try {
      // What the batch before it takes may not be counted yet.
      if (takes > 0) await this.#store.requireRoom?.(this.#writingBytes);
      return await this.#store.store(bytes, pieces);
    } finally {
      this.#writingBytes -= takes;
    }
  }

  /** Waits for what is under way and lets go of the chunks. Idempotent. Errors: STORE_IO. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#underWay);
    await this.#store.release();
  }
}

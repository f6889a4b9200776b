// The bytes of the store: which of them are here, reading them, and storing pieces that have their digests. Owned by
// NodeStore. Knows addresses and pieces; nothing of layers, of the database, or of what may be taken away when.
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { DedupError } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES, MiB } from '../../units.ts';
import type { Durability, FreshPiece } from './durability.ts';
import type { StoreFile } from './store-file.ts';
import { HEADER_ADDRESS, MAX_MASKED_PIECES, STORE_HEAD_BYTES } from './store-layout.ts';
import type { PieceToStore, StoreNative } from './store-types.ts';
import { takenAway } from './taken-away.ts';
import type { Touched } from './touched.ts';

export interface BytesParts {
  readonly file: StoreFile;
  readonly native: StoreNative;
  readonly presence: Uint8Array;
  readonly touched: Touched;
  /** What is stored waits there to be flushed. */
  readonly durability: Durability;
  readonly log: Logger;
  /** Throws when the store is closed. */
  mustBeOpen(): void;
}

export class StoreBytes {
  readonly #parts: BytesParts;
  /** Native calls that use the store's descriptors, which must not be closed, and perhaps reused, under them. */
  readonly #using = new Set<Promise<unknown>>();
  /** In whole blocks, since the store was opened. */
  storedBytes = 0;
  /** Pieces that did not have their digest. */
  mismatches = 0;
  damagedReads = 0;

  constructor(parts: BytesParts) {
    this.#parts = parts;
  }

  #track<T>(work: Promise<T>): Promise<T> {
    this.#using.add(work);
    const settled = (): void => void this.#using.delete(work);
    work.then(settled, settled);
    return work;
  }

  /** Resolves when no native call uses the store's descriptors. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#using);
  }

  /** True when every block of the range is verified and present. */
  isPresent(address: number, length: number): boolean {
    const { native, presence } = this.#parts;
    return native.presenceTest(presence, address / BLOCK_BYTES, Math.ceil(length / BLOCK_BYTES));
  }

  /** Makes blocks absent: before they are punched, so that whoever reads them meanwhile can tell. */
  clear(firstBlock: number, blocks: number): void {
    this.#parts.native.presenceSet(this.#parts.presence, firstBlock, blocks, false);
  }

  #clearRange(address: number, length: number): void {
    this.clear(address / BLOCK_BYTES, Math.ceil(length / BLOCK_BYTES));
  }

  /** Says, and counts, that a read met blocks which the disk had changed; they are absent now and will be fetched. */
  damaged(address: number, length: number): void {
    this.damagedReads++;
    this.#parts.log.error(
      { address, length },
      'the disk changed bytes of the store: they are not served but fetched again',
    );
  }

  /** Makes absent what the file system has no data of: first block and number of each range. True when there was any. */
  async dropHoles(ranges: Float64Array): Promise<boolean> {
    const { native, file } = this.#parts;
    const holes = await this.#track(native.findHoles(file.buffered.fd, ranges));
    for (let i = 0; i + 1 < holes.length; i += 2) {
      this.clear(holes[i]!, holes[i + 1]!);
      this.damaged(holes[i]! * BLOCK_BYTES, holes[i + 1]! * BLOCK_BYTES);
    }
    return holes.length > 0;
  }

  /** As NodeStore.read. */
  async read(target: Buffer, at: number, length: number, address: number): Promise<void> {
    const { native, file, presence, touched, mustBeOpen } = this.#parts;
    touched.touch(address, length);
    for (;;) {
      mustBeOpen();
      const job = { fd: file.buffered.fd, sumsFd: file.sums.fd, presence, target, at, length, address };
      const result = await this.#track(native.readStore(job));
      if (result === 'read') return;
      if (result === 'damaged') {
        this.damaged(address, length);
        throw takenAway('STORE_CORRUPT', `the disk changed bytes of the store at ${address}`);
      }
      // Something was taken away while the disk was read, here or elsewhere.
      if (!this.isPresent(address, length)) {
        throw takenAway('STORE_IO', `address ${address} of the store was taken away while it was read`);
      }
    }
  }

  /**
   * Verifies pieces that lie in `source` and stores the good ones. Answers one byte per piece: 1 stored, 0 the bytes do not
   * have their digest; and how many bytes were stored, in whole blocks. Errors: STORE_IO, STORE_FULL (then none of them is
   * present), CLOSED.
   */
  async store(
    source: Uint8Array,
    pieces: readonly PieceToStore[],
  ): Promise<{ readonly stored: Uint8Array; readonly bytes: number }> {
    const { native, file, presence, touched, durability, mustBeOpen } = this.#parts;
    mustBeOpen();
    const count = pieces.length;
    const offsets = new Float64Array(count);
    const lengths = new Uint32Array(count);
    const addresses = new Float64Array(count);
    const digests = new Uint8Array(count * 32);
    for (const [i, piece] of pieces.entries()) {
      offsets[i] = piece.offset;
      lengths[i] = piece.length;
      addresses[i] = piece.address;
      digests.set(piece.digest, i * 32);
      touched.touch(piece.address, piece.length);
    }
    const failures = durability.failures;
    const job = { fd: file.direct.fd, sumsFd: file.sums.fd, source, offsets, lengths, digests, addresses, presence };
    let stored: Uint8Array;
    try {
      stored = await this.#track(native.storePieces(job));
    } catch (error) {
      // Which of them were written is not known; none may stay present without waiting for a flush.
      for (const { address, length } of pieces) this.#clearRange(address, length);
      throw error;
    }
    const fresh: FreshPiece[] = [];
    let bytes = 0;
    for (const [i, piece] of pieces.entries()) {
      if (stored[i] !== 1) {
        this.mismatches++;
        continue;
      }
      const blocks = Math.ceil(piece.length / BLOCK_BYTES);
      const placementBlock = piece.chunkAddress / BLOCK_BYTES;
      fresh.push({ placementBlock, mask: this.#maskOf(piece), firstBlock: piece.address / BLOCK_BYTES, blocks });
      bytes += blocks * BLOCK_BYTES;
    }
    if (durability.failures !== failures) {
      // A flush failed while this was being written: the disk may have lost it.
      for (const piece of fresh) this.clear(piece.firstBlock, piece.blocks);
      throw new DedupError('STORE_IO', 'the store could not be flushed while pieces were written');
    }
    this.storedBytes += bytes;
    durability.add(fresh, bytes);
    return { stored, bytes };
  }

  #maskOf(piece: PieceToStore): number {
    if (piece.pieceCount <= MAX_MASKED_PIECES) return 1 << piece.piece;
    return this.isPresent(piece.chunkAddress, piece.chunkBytes) ? -1 : 0;
  }

  /** As NodeStore.placeMetadata. */
  async placeMetadata(address: number, path: string): Promise<void> {
    const { native, file, presence, mustBeOpen } = this.#parts;
    mustBeOpen();
    const source = await readFile(path);
    if (address % BLOCK_BYTES !== 0 || address < STORE_HEAD_BYTES || address + source.length > HEADER_ADDRESS) {
      throw new DedupError('INVALID_ARGUMENT', `metadata cannot lie at address ${address} of the store`);
    }
    // What an earlier image left there must not pass for this one's: present blocks are not written again.
    this.#clearRange(address, source.length);
    const starts = Array.from({ length: Math.ceil(source.length / MiB) }, (_, i) => i * MiB);
    const parts = starts.map((start) => source.subarray(start, start + MiB));
    const stored = await this.#track(
      native.storePieces({
        fd: file.direct.fd,
        sumsFd: file.sums.fd,
        source,
        offsets: Float64Array.from(starts),
        lengths: Uint32Array.from(parts, (part) => part.length),
        digests: Buffer.concat(parts.map((part) => createHash('sha256').update(part).digest())),
        addresses: Float64Array.from(starts, (start) => address + start),
        presence,
      }),
    );
    if (!stored.every((good) => good === 1)) throw new DedupError('STORE_IO', `metadata ${path} could not be stored`);
  }
}

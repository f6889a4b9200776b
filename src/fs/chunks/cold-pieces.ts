// The order of eviction: goes through chunks by when they were last used and takes the pieces that nobody touched since.
// What the database knows of uses is old; a chunk that was used after all gets its time and comes again later. Used by
// StoreSpace; takes nothing away itself.
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import type { FreshPiece } from './durability.ts';
import { COLD_ROW } from './evictable.ts';
import type { ColdChunks, ColdChunksRequest, ColdCursor } from './index-protocol.ts';
import { MAX_MASKED_PIECES } from './store-layout.ts';

/** A piece that may be evicted, in the form in which it would be recorded as durable. */
export type ColdPiece = FreshPiece;

export interface ColdPiecesOptions {
  readonly page: (request: ColdChunksRequest) => Promise<ColdChunks>;
  /** When a range was last used, seconds since 1970; 0 when that is not known. */
  readonly latestUse: (address: number, length: number) => number;
  readonly isPresent: (address: number, length: number) => boolean;
  /** What was used later than this, seconds since 1970, is left alone. */
  readonly usedBefore: number;
  readonly pageChunks: number;
}

export class ColdPieces {
  readonly #options: ColdPiecesOptions;
  #cursor: ColdCursor | undefined = { kind: 'chunks', lastUsed: -1, block: -1 };
  /** The last chunk that was looked at, as long as they come in the order of their use. */
  #inOrder: ColdCursor | undefined;
  #rows: Float64Array = new Float64Array(0);
  #at = 0;
  /** Chunks that were used since the database was told, and when. */
  #used: number[] = [];

  constructor(options: ColdPiecesOptions) {
    this.#options = options;
  }

  /** The next pieces of about so many bytes; fewer at the end, then none. */
  async take(bytes: number): Promise<ColdPiece[]> {
    const taken: ColdPiece[] = [];
    let left = bytes;
    while (left > 0) {
      if (this.#at === this.#rows.length) {
        // Chunks that were used after all come once more, behind those that were not.
        const after = this.#inOrder !== undefined && this.#used.length > 0 ? this.#inOrder : this.#cursor;
        if (after === undefined) break;
        await this.#turnPage(after);
        continue;
      }
      for (const piece of this.#chunk(this.#at)) {
        taken.push(piece);
        left -= piece.blocks * BLOCK_BYTES;
      }
      this.#at += COLD_ROW;
    }
    return taken;
  }

  async #turnPage(after: ColdCursor): Promise<void> {
    const { usedBefore, pageChunks: limit } = this.#options;
    const used = Float64Array.from(this.#used);
    this.#used = [];
    const { rows, next } = await this.#options.page({ after, usedBefore, limit, used });
    this.#rows = rows;
    this.#at = 0;
    const [block, , , , lastUsed] = rows.subarray(-COLD_ROW);
    if (after.kind === 'placements') this.#inOrder = undefined;
    else this.#inOrder = block === undefined ? after : { kind: 'chunks', lastUsed: lastUsed!, block };
    this.#cursor = next;
  }

  /** Tells the database of the uses that were found last. */
  async finish(): Promise<void> {
    if (this.#used.length === 0) return;
    const after: ColdCursor = { kind: 'placements', lastUsed: 0, block: Number.MAX_SAFE_INTEGER };
    await this.#options.page({ after, usedBefore: 0, limit: 1, used: Float64Array.from(this.#used) });
    this.#used = [];
  }

  /** The pieces of one chunk that are here and were not used since the time that orders it. */
  #chunk(at: number): ColdPiece[] {
    const [block, size, pieceBytes, durable, lastUsed, chunk] = this.#rows.subarray(at, at + COLD_ROW);
    const pieces: ColdPiece[] = [];
    let latest = 0;
    const address = block! * BLOCK_BYTES;
    const count = Math.ceil(size! / pieceBytes!);
    for (let piece = 0; piece < count; piece++) {
      if (count <= MAX_MASKED_PIECES && ((durable! >> piece) & 1) === 0) continue;
      const offset = piece * pieceBytes!;
      const length = Math.min(pieceBytes!, size! - offset);
      if (!this.#options.isPresent(address + offset, length)) continue;
      const use = this.#options.latestUse(address + offset, length);
      if (use > lastUsed!) {
        latest = Math.max(latest, use);
        continue;
      }
      const firstBlock = block! + offset / BLOCK_BYTES;
      const mask = count <= MAX_MASKED_PIECES ? 1 << piece : -1;
      pieces.push({ placementBlock: block!, mask, firstBlock, blocks: roundUp(length, BLOCK_BYTES) / BLOCK_BYTES });
    }
    if (latest > 0) this.#used.push(chunk!, latest);
    // One that is recorded as a whole only goes as a whole only.
    return count > MAX_MASKED_PIECES && latest > 0 ? [] : pieces;
  }
}

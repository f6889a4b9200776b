// Rows of chunks: found by name, made, and dropped with all that lies at their addresses. Used inside the writer's
// transactions by whoever adds layers, holds chunks and drops both.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import type { StoreRange } from './index-protocol.ts';

/** Chunks as they are added: each name and size once in a scope. */
export class NamedChunks {
  readonly #scope: number;
  readonly #nowSeconds: number;
  readonly #find: Database.Statement;
  readonly #insert: Database.Statement;

  /** `refCount`: how many layers count a chunk that is made. */
  constructor(db: Database.Database, scope: number, refCount: 0 | 1, nowSeconds: number) {
    this.#scope = scope;
    this.#nowSeconds = nowSeconds;
    this.#find = db.prepare('SELECT id, piece_bytes FROM chunks WHERE digest = ? AND size = ? AND scope = ?').raw();
    this.#insert = db.prepare(
      `INSERT INTO chunks (id, scope, digest, size, piece_bytes, ref_count, last_used) VALUES (?, ?, ?, ?, ?, ${refCount}, ?)`,
    );
  }

  /** First block of a chunk; undefined when it is not known. */
  find(digest: Buffer, size: number): number | undefined {
    return (this.#find.get(digest, size, this.#scope) as [number, number] | undefined)?.[0];
  }

  /**
   * First block of a chunk; when it is not known, it gets a row at the block that `newBlock` gives. Errors: INDEX_INVALID
   * when it is known with pieces of another size, and those of `newBlock`.
   */
  findOrAdd(digest: Buffer, size: number, pieceBytes: number, newBlock: () => number): { id: number; isNew: boolean } {
    const pieces = Math.min(size, pieceBytes);
    const known = this.#find.get(digest, size, this.#scope) as [number, number] | undefined;
    if (known !== undefined) {
      const [id, itsPieces] = known;
      if (itsPieces === pieces) return { id, isNew: false };
      // A chunk's name covers its piece digests, so another piece size under one name means that one index is wrong.
      const name = `chunk ${digest.toString('hex')}`;
      throw new DedupError('INDEX_INVALID', `${name} is known with pieces of ${itsPieces} bytes, not ${pieces}`);
    }
    const id = newBlock();
    this.#insert.run(id, this.#scope, digest, size, pieces, this.#nowSeconds);
    return { id, isNew: true };
  }
}

/** Chunks that nobody uses any more. */
export class DroppedChunks {
  /** Where their bytes lay. */
  readonly ranges: StoreRange[] = [];
  readonly #placements: Database.Statement;
  readonly #dropPlacements: Database.Statement;
  readonly #drop: Database.Statement;

  constructor(db: Database.Database) {
    this.#placements = db.prepare('SELECT block FROM placements WHERE chunk_id = ?').pluck();
    this.#dropPlacements = db.prepare('DELETE FROM placements WHERE chunk_id = ?');
    this.#drop = db.prepare('DELETE FROM chunks WHERE id = ?');
  }

  /** Drops the row of a chunk and those of its placements. */
  drop(id: number, size: number): void {
    const length = roundUp(size, BLOCK_BYTES);
    for (const block of [id, ...(this.#placements.all(id) as number[])])
      this.ranges.push({ address: block * BLOCK_BYTES, length });
    this.#dropPlacements.run(id);
    this.#drop.run(id);
  }
}

// Rows of chunks: found by name, made, and dropped with all that lies at their addresses. Used inside the writer's
// transactions by whoever adds layers, holds chunks and drops both.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import type { StoreRange } from './index-protocol.ts';

/** Chunks of the layer that is being added: each name and size once in a scope. */
export class NamedChunks {
  /** Names of chunks that were held and have a row now; they are the caller's to strike out once the transaction is over. */
  readonly counted: string[] = [];
  readonly #scope: number;
  readonly #nowSeconds: number;
  readonly #holds: HeldNames;
  readonly #find: Database.Statement;
  readonly #insert: Database.Statement;
  readonly #heldPieces: Database.Statement;
  readonly #count: Database.Statement;
  readonly #unhold: Database.Statement;

  constructor(db: Database.Database, scope: number, holds: HeldNames, nowSeconds: number) {
    this.#scope = scope;
    this.#nowSeconds = nowSeconds;
    this.#holds = holds;
    this.#find = db.prepare('SELECT id, piece_bytes FROM chunks WHERE digest = ? AND size = ? AND scope = ?').raw();
    this.#insert = db.prepare(
      'INSERT INTO chunks (id, scope, digest, size, piece_bytes, ref_count, last_used) VALUES (?, ?, ?, ?, ?, 1, ?)',
    );
    this.#heldPieces = db.prepare('SELECT piece_bytes FROM held_chunks WHERE block = ?').pluck();
    this.#count = db.prepare(
      `INSERT INTO chunks (id, scope, digest, size, piece_bytes, ref_count, durable, last_used)
       SELECT block, scope, digest, size, piece_bytes, 1, durable, ? FROM held_chunks WHERE block = ?`,
    );
    this.#unhold = db.prepare('DELETE FROM held_chunks WHERE block = ?');
  }

  /** First block of a chunk that a layer counts, or counted; undefined when it has no row. */
  find(digest: Buffer, size: number): number | undefined {
    return (this.#find.get(digest, size, this.#scope) as [number, number] | undefined)?.[0];
  }

  /**
   * First block of a chunk that has a row or is held for a layer that is being read. Errors: INDEX_INVALID when it is known
   * with pieces of another size.
   */
  known(digest: Buffer, size: number, pieceBytes: number): { id: number; held?: string } | undefined {
    const row = this.#find.get(digest, size, this.#scope) as [number, number] | undefined;
    if (row !== undefined) {
      checkPieces(digest, row[1], Math.min(size, pieceBytes));
      return { id: row[0] };
    }
    const held = heldName(this.#scope, digest, size);
    const id = this.#holds.named(held);
    if (id === undefined) return undefined;
    checkPieces(digest, this.#heldPieces.get(id) as number, Math.min(size, pieceBytes));
    return { id, held };
  }

  /**
   * First block of a chunk; one without a row gets one, which counts the layer, at the block where it is held or at the one
   * that `newBlock` gives. Errors: as `known`, and those of `newBlock`.
   */
  findOrAdd(digest: Buffer, size: number, pieceBytes: number, newBlock: () => number): { id: number; isNew: boolean } {
    const known = this.known(digest, size, pieceBytes);
    if (known === undefined) {
      const id = newBlock();
      this.#insert.run(id, this.#scope, digest, size, Math.min(size, pieceBytes), this.#nowSeconds);
      return { id, isNew: true };
    }
    const { id, held } = known;
    if (held === undefined) return { id, isNew: false };
    this.#count.run(this.#nowSeconds, id);
    this.#unhold.run(id);
    this.counted.push(held);
    return { id, isNew: true };
  }
}

/** Where chunks are that are held and have no row, by `heldName`. */
export interface HeldNames {
  named(name: string): number | undefined;
}

/** The name of a held chunk within one process. */
export function heldName(scope: number, digest: Buffer, size: number): string {
  return `${scope} ${size} ${digest.toString('latin1')}`;
}

/** A chunk's name covers its piece digests, so another piece size under one name means that one index is wrong. */
function checkPieces(digest: Buffer, known: number, pieces: number): void {
  if (known === pieces) return;
  const name = `chunk ${digest.toString('hex')}`;
  throw new DedupError('INDEX_INVALID', `${name} is known with pieces of ${known} bytes, not ${pieces}`);
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

// Chunks that are stored before the layer they belong to is known whole: their rows and addresses are made while the
// layer is still being read, and a hold keeps them until its row counts them. Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import { BLOCK_BYTES } from '../../units.ts';
import { scopeId } from './add-layer.ts';
import { DroppedChunks, NamedChunks } from './chunk-rows.ts';
import { recordFreed } from './drop-layers.ts';
import type { ChunksToHold, StoreRange } from './index-protocol.ts';

/** Who holds which chunks, by the id of their rows. Memory only: after a crash nobody does. */
export class ChunkHolds {
  readonly #holds = new Map<number, Set<number>>();

  add(hold: number, chunkId: number): void {
    let chunks = this.#holds.get(hold);
    if (chunks === undefined) this.#holds.set(hold, (chunks = new Set()));
    chunks.add(chunkId);
  }

  release(hold: number): void {
    this.#holds.delete(hold);
  }

  /** True when anybody holds the chunk. */
  has(chunkId: number): boolean {
    for (const chunks of this.#holds.values()) if (chunks.has(chunkId)) return true;
    return false;
  }
}

/**
 * Gives chunks rows and addresses, counted for no layer yet; known ones keep theirs. `take` gives the first block of so
 * many bytes of address space. Returns the address of each chunk. Errors: INDEX_INVALID, and those of `take`.
 */
export function holdChunks(
  db: Database.Database,
  holds: ChunkHolds,
  { hold, scope, digests, lengths, pieceBytes }: ChunksToHold,
  take: (bytes: number) => number,
  nowSeconds: number,
): Float64Array {
  const chunks = new NamedChunks(db, scopeId(db, scope), 0, nowSeconds);
  const names = Buffer.from(digests.buffer, digests.byteOffset, digests.byteLength);
  const addresses = new Float64Array(lengths.length);
  for (const [i, size] of lengths.entries()) {
    const { id } = chunks.findOrAdd(names.subarray(i * 32, i * 32 + 32), size, pieceBytes, () => take(size));
    holds.add(hold, id);
    addresses[i] = id * BLOCK_BYTES;
  }
  return addresses;
}

/** How many chunks no layer counts and nobody holds. */
export function countUnreferenced(db: Database.Database, holds: ChunkHolds): number {
  return unreferenced(db, holds).length;
}

/** Drops the rows of chunks that no layer counts and nobody holds; their ranges are recorded as to be punched. */
export function dropUnreferenced(db: Database.Database, holds: ChunkHolds, nowSeconds: number): StoreRange[] {
  const chunks = new DroppedChunks(db);
  for (const [id, size] of unreferenced(db, holds)) chunks.drop(id, size);
  return recordFreed(db, chunks.ranges, nowSeconds);
}

function unreferenced(db: Database.Database, holds: ChunkHolds): [number, number][] {
  const rows = db.prepare('SELECT id, size FROM chunks WHERE ref_count = 0').raw().all() as [number, number][];
  return rows.filter(([id]) => !holds.has(id));
}

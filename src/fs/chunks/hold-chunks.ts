// Chunks that are stored before the layer they belong to is known whole: they get addresses while the layer is still being
// read, and a hold keeps them until its row counts them. Those that no layer ever counted are in a table of their own, without
// an index, so that a batch of them changes the end of that table and not a page for each name; they are found by name in
// memory. Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import { scopeId } from './add-layer.ts';
import { DroppedChunks, type HeldNames, heldName, NamedChunks } from './chunk-rows.ts';
import { recordFreed } from './drop-layers.ts';
import type { ChunksToHold, StoreRange } from './index-protocol.ts';

/** Who holds which chunks, by their first blocks, and where those without a row are. Memory only: after a crash nobody does. */
export class ChunkHolds implements HeldNames {
  readonly #holds = new Map<number, Set<number>>();
  readonly #named = new Map<string, number>();

  /** To be called once what gave the chunks their addresses is committed; `made` are those that are new. */
  add(hold: number, blocks: Iterable<number>, made: ReadonlyMap<string, number>): void {
    let chunks = this.#holds.get(hold);
    if (chunks === undefined) this.#holds.set(hold, (chunks = new Set()));
    for (const block of blocks) chunks.add(block);
    for (const [name, block] of made) this.#named.set(name, block);
  }

  named(name: string): number | undefined {
    return this.#named.get(name);
  }

  /** Strikes out chunks that have a row now, or none at all; to be called once that is committed. */
  strike(names: Iterable<string>): void {
    for (const name of names) this.#named.delete(name);
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

export interface ChunksHeld {
  /** Address of each chunk. */
  readonly addresses: Float64Array;
  /** Their first blocks, each once. */
  readonly blocks: ReadonlySet<number>;
  /** Those that were not known before, by `heldName`. */
  readonly made: ReadonlyMap<string, number>;
}

/**
 * Gives chunks addresses, counted for no layer yet; known ones keep theirs. `take` gives the first block of so many bytes of
 * address space. Errors: INDEX_INVALID, and those of `take`.
 */
export function holdChunks(
  db: Database.Database,
  holds: HeldNames,
  { scope, digests, lengths, pieceBytes }: ChunksToHold,
  take: (bytes: number) => number,
  nowSeconds: number,
): ChunksHeld {
  const id = scopeId(db, scope);
  const made = new Map<string, number>();
  const blocks = new Set<number>();
  const chunks = new NamedChunks(db, id, { named: (name) => made.get(name) ?? holds.named(name) }, nowSeconds);
  const insert = db.prepare('INSERT INTO held_chunks (block, scope, digest, size, piece_bytes) VALUES (?, ?, ?, ?, ?)');
  const names = Buffer.from(digests.buffer, digests.byteOffset, digests.byteLength);
  const addresses = new Float64Array(lengths.length);
  for (const [i, size] of lengths.entries()) {
    const digest = names.subarray(i * 32, i * 32 + 32);
    let block = chunks.known(digest, size, pieceBytes)?.id;
    if (block === undefined) {
      block = take(size);
      insert.run(block, id, digest, size, Math.min(size, pieceBytes));
      made.set(heldName(id, digest, size), block);
    }
    blocks.add(block);
    addresses[i] = block * BLOCK_BYTES;
  }
  return { addresses, blocks, made };
}

/** How many chunks no layer counts and nobody holds. */
export function countUnreferenced(db: Database.Database, holds: ChunkHolds): number {
  return uncounted(db, holds).length + unheld(db, holds).length;
}

/**
 * Drops chunks that no layer counts and nobody holds; their ranges are recorded as to be punched. Also answers the names of
 * those that had no row.
 */
export function dropUnreferenced(
  db: Database.Database,
  holds: ChunkHolds,
  nowSeconds: number,
): { ranges: StoreRange[]; names: string[] } {
  const chunks = new DroppedChunks(db);
  for (const [id, size] of uncounted(db, holds)) chunks.drop(id, size);
  const names: string[] = [];
  const remove = db.prepare('DELETE FROM held_chunks WHERE block = ?');
  for (const [block, size, scope, digest] of unheld(db, holds)) {
    remove.run(block);
    names.push(heldName(scope, digest, size));
    chunks.ranges.push({ address: block * BLOCK_BYTES, length: roundUp(size, BLOCK_BYTES) });
  }
  return { ranges: recordFreed(db, chunks.ranges, nowSeconds), names };
}

/** Rows whose layers were dropped while somebody held them. */
function uncounted(db: Database.Database, holds: ChunkHolds): [number, number][] {
  const rows = db.prepare('SELECT id, size FROM chunks WHERE ref_count = 0').raw().all() as [number, number][];
  return rows.filter(([id]) => !holds.has(id));
}

type HeldRow = [block: number, size: number, scope: number, digest: Buffer];

function unheld(db: Database.Database, holds: ChunkHolds): HeldRow[] {
  const rows = db.prepare('SELECT block, size, scope, digest FROM held_chunks').raw().all() as HeldRow[];
  return rows.filter(([block]) => !holds.has(block));
}

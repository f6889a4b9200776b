// Which pieces may be evicted, in the order in which they were last used, and their removal from what is durable. Runs in
// the writer's worker thread; store-space.ts decides how many go.
import type Database from 'better-sqlite3';
import type { ColdChunks, ColdChunksRequest, EvictRequest } from './index-protocol.ts';

/**
 * Chunks `c` of which no byte is here only: every layer that uses it can be read from somewhere, and none belongs to a
 * mount that reads the store without us. A chunk that no layer counts yet is being read for one.
 */
const EVICTABLE = `c.ref_count > 0 AND NOT EXISTS (
  SELECT 1 FROM layer_chunks lc WHERE lc.chunk_id = c.id AND lc.layer_id IN (
    SELECT id FROM layers WHERE NOT EXISTS (SELECT 1 FROM sources s WHERE s.layer_id = layers.id)
    UNION SELECT p.layer_id FROM pins p JOIN direct_mounts d ON d.mount_id = p.mount_id))`;

type Row = [block: number, size: number, pieceBytes: number, durable: number, lastUsed: number, chunk: number];

/**
 * A page of chunks with durable pieces that may be evicted, oldest use first, from behind `after` up to `usedBefore`.
 * `used` are chunks of the page before that were used since they were last looked at: they go back into the order.
 */
export function coldChunks(
  db: Database.Database,
  request: ColdChunksRequest,
  held: (chunkId: number) => boolean,
): ColdChunks {
  const { after, usedBefore, limit, used } = request;
  const touch = db.prepare('UPDATE chunks SET last_used = max(last_used, ?) WHERE id = ?');
  for (let i = 0; i + 1 < used.length; i += 2) touch.run(used[i + 1], used[i]);
  const rows: Row[] = [];
  if (after.kind === 'chunks') {
    const found = db
      .prepare(
        `SELECT c.id, c.size, c.piece_bytes, c.durable, c.last_used, c.id FROM chunks c
         WHERE c.durable <> 0 AND (c.last_used, c.id) > (?, ?) AND c.last_used <= ? AND ${EVICTABLE}
         ORDER BY c.last_used, c.id LIMIT ?`,
      )
      .raw();
    rows.push(...(found.all(after.lastUsed, after.block, usedBefore, limit) as Row[]));
  } else {
    const found = db
      .prepare(
        `SELECT p.block, c.size, c.piece_bytes, p.durable, c.last_used, c.id
         FROM placements p JOIN chunks c ON c.id = p.chunk_id
         WHERE p.durable <> 0 AND p.block > ? AND c.last_used <= ? AND ${EVICTABLE} ORDER BY p.block LIMIT ?`,
      )
      .raw();
    rows.push(...(found.all(after.block, usedBefore, limit) as Row[]));
  }
  const last = rows.at(-1);
  const free = rows.filter(([, , , , , chunk]) => !held(chunk));
  return {
    rows: Float64Array.from(free.flat()),
    next:
      last !== undefined && rows.length === limit
        ? { kind: after.kind, lastUsed: last[4], block: last[0] }
        : after.kind === 'chunks'
          ? { kind: 'placements', lastUsed: 0, block: -1 }
          : undefined,
  };
}

/** Numbers in each row of ColdChunks. */
export const COLD_ROW = 6;

/**
 * Takes pieces out of what is durable where they may still be evicted, and records them as to be punched. Answers one
 * byte for each: 1 when it was taken.
 */
export function evict(
  db: Database.Database,
  { blocks, masks, ranges }: EvictRequest,
  held: (chunkId: number) => boolean,
): Uint8Array {
  const chunkOf = db.prepare(`SELECT c.id FROM chunks c WHERE c.id = ? AND ${EVICTABLE}`).pluck();
  const placementOf = db
    .prepare(`SELECT c.id FROM placements p JOIN chunks c ON c.id = p.chunk_id WHERE p.block = ? AND ${EVICTABLE}`)
    .pluck();
  const chunk = db.prepare('UPDATE chunks SET durable = durable & ~? WHERE id = ?');
  const placement = db.prepare('UPDATE placements SET durable = durable & ~? WHERE block = ?');
  const record = db.prepare('INSERT OR REPLACE INTO evicted (block, blocks) VALUES (?, ?)');
  const taken = new Uint8Array(blocks.length);
  for (const [i, block] of blocks.entries()) {
    const inChunks = chunkOf.get(block) as number | undefined;
    const id = inChunks ?? (placementOf.get(block) as number | undefined);
    if (id === undefined || held(id)) continue;
    (inChunks === undefined ? placement : chunk).run(masks[i], block);
    record.run(ranges[2 * i], ranges[2 * i + 1]);
    taken[i] = 1;
  }
  return taken;
}

/** Records that evicted pieces were punched, by their first blocks. */
export function evictedPunched(db: Database.Database, blocks: Float64Array): void {
  const remove = db.prepare('DELETE FROM evicted WHERE block = ?');
  for (const block of blocks) remove.run(block);
}

// What of the chunks is on the disk, as index.db records it. Runs inside the writer's transactions, in the worker thread.
import type Database from 'better-sqlite3';
import { BLOCK_BYTES } from '../../units.ts';
import type { DurablePieces, StoreRange } from './index-protocol.ts';

/** Blocks that are on the disk: first one and number of each range, alternating, ascending. */
export function durableRanges(db: Database.Database): Float64Array {
  const rows = db
    .prepare(
      `SELECT id AS block, size, piece_bytes, durable FROM chunks WHERE durable <> 0
       UNION ALL SELECT p.block, c.size, c.piece_bytes, p.durable FROM placements p JOIN chunks c ON c.id = p.chunk_id WHERE p.durable <> 0
       ORDER BY 1`,
    )
    .raw()
    .iterate() as IterableIterator<[number, number, number, number]>;
  const ranges: number[] = [];
  let start = -1;
  let end = -1;
  const add = (block: number, bytes: number): void => {
    const blocks = Math.ceil(bytes / BLOCK_BYTES);
    if (block !== end) {
      if (start >= 0) ranges.push(start, end - start);
      start = block;
    }
    end = block + blocks;
  };
  for (const [block, size, pieceBytes, mask] of rows) {
    if (mask === -1) {
      add(block, size);
      continue;
    }
    for (let piece = 0, at = 0; at < size; piece++, at += pieceBytes) {
      if (mask & (1 << piece)) add(block + at / BLOCK_BYTES, Math.min(pieceBytes, size - at));
    }
  }
  if (start >= 0) ranges.push(start, end - start);
  return Float64Array.from(ranges);
}

/** Records pieces that were flushed, of chunks with a row, of chunks that are held, and of further placements. */
export function markDurable(db: Database.Database, { blocks, masks }: DurablePieces, nowSeconds: number): void {
  const chunk = db.prepare('UPDATE chunks SET durable = durable | ?, last_used = ? WHERE id = ?');
  const held = db.prepare('UPDATE held_chunks SET durable = durable | ? WHERE block = ?');
  const extra = db.prepare('UPDATE placements SET durable = durable | ? WHERE block = ?');
  for (const [i, block] of blocks.entries()) {
    const mask = masks[i]!;
    if (chunk.run(mask, nowSeconds, block).changes > 0) continue;
    if (held.run(mask, block).changes === 0) extra.run(mask, block);
  }
}

/** What was evicted and may still be on the disk. */
export function evictedRanges(db: Database.Database): StoreRange[] {
  const rows = db.prepare('SELECT block, blocks FROM evicted ORDER BY block').raw().all() as [number, number][];
  return rows.map(([block, blocks]) => ({ address: block * BLOCK_BYTES, length: blocks * BLOCK_BYTES }));
}

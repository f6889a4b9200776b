// Drops layers and the chunks only they used, inside the writer's transaction. Punching is the caller's, afterwards.
import type Database from 'better-sqlite3';
import { BLOCK_BYTES } from '../../units.ts';
import { DroppedChunks } from './chunk-rows.ts';
import type { DroppedLayers, StoreRange } from './index-protocol.ts';

/**
 * Drops layers that no mount pins; the ranges of chunks nobody uses any more, and that are not `held` for a layer that is
 * being read, are recorded as to be punched.
 */
export function dropLayers(
  db: Database.Database,
  layerIds: readonly number[],
  held: (chunkId: number) => boolean,
  nowSeconds: number,
): DroppedLayers {
  const dropped: number[] = [];
  const pinned: number[] = [];
  const chunks = new DroppedChunks(db);
  const prepare = (sql: string): Database.Statement => db.prepare(sql);
  const isPinned = prepare('SELECT 1 FROM pins WHERE layer_id = ? LIMIT 1').pluck();
  const chunkIds = prepare('SELECT DISTINCT chunk_id FROM layer_chunks WHERE layer_id = ?').pluck();
  const release = prepare('UPDATE chunks SET ref_count = ref_count - 1 WHERE id = ? RETURNING ref_count, size').raw();
  const imagesOf = prepare('SELECT DISTINCT image_id FROM image_layers WHERE layer_id = ?').pluck();
  for (const layerId of layerIds) {
    if (isPinned.get(layerId) !== undefined) {
      pinned.push(layerId);
      continue;
    }
    const ids = chunkIds.all(layerId) as number[];
    for (const imageId of imagesOf.all(layerId) as number[]) deleteImage(db, imageId);
    prepare('DELETE FROM layer_chunks WHERE layer_id = ?').run(layerId);
    prepare('DELETE FROM sources WHERE layer_id = ?').run(layerId);
    if (prepare('DELETE FROM layers WHERE id = ?').run(layerId).changes === 0) continue;
    dropped.push(layerId);
    for (const id of ids) {
      const [refCount, size] = release.get(id) as [number, number];
      if (refCount <= 0 && !held(id)) chunks.drop(id, size);
    }
  }
  return { dropped, pinned, ranges: recordFreed(db, chunks.ranges, nowSeconds) };
}

/** Records ranges whose chunks have no rows any more as to be punched; returns them joined. */
export function recordFreed(db: Database.Database, ranges: readonly StoreRange[], nowSeconds: number): StoreRange[] {
  const joined = joinRanges(ranges);
  const freed = db.prepare("INSERT INTO freed (block, blocks, state, since) VALUES (?, ?, 'to-punch', ?)");
  for (const range of joined) freed.run(range.address / BLOCK_BYTES, range.length / BLOCK_BYTES, nowSeconds);
  return joined;
}

/** Drops the row of an image; its metadata file is the caller's. */
export function deleteImage(db: Database.Database, id: number): void {
  db.prepare('DELETE FROM image_layers WHERE image_id = ?').run(id);
  db.prepare('DELETE FROM images WHERE id = ?').run(id);
}

/** Ranges in ascending order, neighbours joined. */
function joinRanges(ranges: readonly StoreRange[]): StoreRange[] {
  const joined: { address: number; length: number }[] = [];
  for (const range of ranges.toSorted((a, b) => a.address - b.address)) {
    const last = joined.at(-1);
    if (last !== undefined && last.address + last.length === range.address) last.length += range.length;
    else joined.push({ ...range });
  }
  return joined;
}

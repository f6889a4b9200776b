// What each image that has a row needs of the store, for `dedup-snapshotter stats`. Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import type { ImageUse } from './index-protocol.ts';

const USES = `
WITH uses AS (SELECT DISTINCT il.image_id AS image, lc.chunk_id AS chunk
              FROM image_layers il JOIN layer_chunks lc ON lc.layer_id = il.layer_id),
     counts AS (SELECT chunk, count(*) AS images FROM uses GROUP BY chunk)
SELECT uses.image, uses.chunk, c.size, counts.images > 1
FROM uses JOIN counts ON counts.chunk = uses.chunk JOIN chunks c ON c.id = uses.chunk ORDER BY uses.image`;

export function imageUse(db: Database.Database): ImageUse[] {
  const pinned = new Set(db.prepare('SELECT DISTINCT mount_id FROM pins').pluck().all());
  const direct = new Set(db.prepare('SELECT mount_id FROM direct_mounts').pluck().all());
  const found = new Map<number, { total: number; shared: number; chunks: number[] }>();
  for (const id of db.prepare('SELECT id FROM images ORDER BY id').pluck().all() as number[])
    found.set(id, { total: 0, shared: 0, chunks: [] });
  const rows = db.prepare(USES).raw().iterate() as IterableIterator<[number, number, number, number]>;
  for (const [image, chunk, size, shared] of rows) {
    const use = found.get(image);
    if (use === undefined) continue;
    use.total += size;
    if (shared === 1) use.shared += size;
    use.chunks.push(chunk, size);
  }
  return [...found].map(([id, { total, shared, chunks }]) => ({
    id,
    totalBytes: total,
    sharedBytes: shared,
    pinned: pinned.has(id),
    direct: direct.has(id),
    chunks: Float64Array.from(chunks),
  }));
}

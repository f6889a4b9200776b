// What each image that has a row needs of the store, for `dedup-snapshotter stats`. Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import type { ImageUse } from './index-protocol.ts';

const USES = `
SELECT DISTINCT il.image_id, lc.chunk_id, c.size FROM image_layers il JOIN layer_chunks lc ON lc.layer_id = il.layer_id
JOIN chunks c ON c.id = lc.chunk_id ORDER BY il.image_id`;

type UseRow = [image: number, chunk: number, size: number];

export function imageUse(db: Database.Database): ImageUse[] {
  const pinned = new Set(db.prepare('SELECT DISTINCT mount_id FROM pins').pluck().all() as number[]);
  const direct = new Set(db.prepare('SELECT mount_id FROM direct_mounts').pluck().all());
  const parts = partsOfOthers(db);
  const chunks = new Map<number, number[]>();
  for (const id of db.prepare('SELECT id FROM images ORDER BY id').pluck().all() as number[])
    if (!parts.has(id) || pinned.has(id)) chunks.set(id, []);
  const images = new Map<number, number>();
  for (const [image, chunk, size] of db.prepare(USES).raw().iterate() as IterableIterator<UseRow>) {
    chunks.get(image)?.push(chunk, size);
    // A part of an image shares nothing with it that another image could need.
    if (!parts.has(image)) images.set(chunk, (images.get(chunk) ?? 0) + 1);
  }
  return [...chunks].map(([id, own]) => {
    let totalBytes = 0;
    let sharedBytes = 0;
    for (let i = 0; i + 1 < own.length; i += 2) {
      totalBytes += own[i + 1]!;
      const others = (images.get(own[i]!) ?? 0) - (parts.has(id) ? 0 : 1);
      if (others > 0) sharedBytes += own[i + 1]!;
    }
    return {
      id,
      totalBytes,
      sharedBytes,
      pinned: pinned.has(id),
      direct: direct.has(id),
      chunks: Float64Array.from(own),
    };
  });
}

/**
 * Images of the lower layers of another one that nobody pulled as images: what was mounted while the other one was not here
 * whole, as happens during its conversion. The file systems of images that are pulled or converted are built ahead.
 */
function partsOfOthers(db: Database.Database): Set<number> {
  const rows = db
    .prepare(
      `SELECT il.image_id, i.ahead, group_concat(il.layer_id, ' ' ORDER BY il.position) FROM image_layers il
       JOIN images i ON i.id = il.image_id GROUP BY il.image_id`,
    )
    .raw()
    .all() as [number, number, string][];
  const parts = new Set<string>();
  for (const [, , layers] of rows)
    for (let end = layers.lastIndexOf(' '); end > 0; end = layers.lastIndexOf(' ', end - 1))
      parts.add(layers.slice(0, end));
  return new Set(rows.filter(([, ahead, layers]) => ahead === 0 && parts.has(layers)).map(([image]) => image));
}

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
 * Images of the lower layers of another one, brought by the same reference: what was mounted while that one was not here
 * whole, as happens during its conversion. A base that was pulled as an image of its own, and before, has another reference;
 * where references are not known it counts as a part, too.
 */
function partsOfOthers(db: Database.Database): Set<number> {
  const rows = db
    .prepare(
      `SELECT il.image_id, il.layer_id, l.reference FROM image_layers il JOIN layers l ON l.id = il.layer_id
       ORDER BY il.image_id, il.position`,
    )
    .raw()
    .iterate() as IterableIterator<[number, number, string]>;
  const layersOf = new Map<number, { ids: number[]; reference: string }>();
  for (const [image, layer, reference] of rows) {
    const ids = layersOf.get(image)?.ids ?? [];
    ids.push(layer);
    layersOf.set(image, { ids, reference });
  }
  const parts = new Set<string>();
  for (const { ids, reference } of layersOf.values()) {
    for (let count = 1; count < ids.length; count++) parts.add(`${ids.slice(0, count).join(' ')} ${reference}`);
  }
  const found = new Set<number>();
  for (const [image, { ids, reference }] of layersOf) if (parts.has(`${ids.join(' ')} ${reference}`)) found.add(image);
  return found;
}

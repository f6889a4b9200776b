// Rows of merged images. Runs inside the writer's transactions, in the worker thread; dropping them is in drop-layers.ts.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import type { ImageRecord } from './index-protocol.ts';

/** The image of that key, made when it is new. `ahead`: it is known to be all of an image. Errors: NOT_FOUND for a layer without a row. */
export function createImage(
  db: Database.Database,
  key: string,
  layers: readonly number[],
  ahead: boolean,
  nowSeconds: number,
): ImageRecord {
  const known = select(db, 'WHERE key = ?', key)[0];
  if (known !== undefined) {
    if (ahead) db.prepare('UPDATE images SET ahead = 1 WHERE id = ? AND ahead = 0').run(known.id);
    return known;
  }
  const exists = db.prepare('SELECT 1 FROM layers WHERE id = ?');
  // An image that has a row has only layers with rows (docs/decisions/0021-addresses-given-again.md).
  for (const layerId of layers)
    if (exists.get(layerId) === undefined) throw new DedupError('NOT_FOUND', `layer ${layerId} is not in the store`);
  const insert = db.prepare("INSERT INTO images (key, state, ahead, created_at) VALUES (?, 'building', ?, ?)");
  const id = Number(insert.run(key, ahead ? 1 : 0, nowSeconds).lastInsertRowid);
  const layer = db.prepare('INSERT INTO image_layers (image_id, position, layer_id) VALUES (?, ?, ?)');
  for (const [position, layerId] of layers.entries()) layer.run(id, position, layerId);
  return { id, key, state: 'building', metadataBytes: 0, layers: [...layers] };
}

export function imageReady(db: Database.Database, id: number, metadataBytes: number): void {
  db.prepare("UPDATE images SET state = 'ready', metadata_bytes = ? WHERE id = ?").run(metadataBytes, id);
}

export function imageRecords(db: Database.Database): ImageRecord[] {
  return select(db, '');
}

interface ImageRow {
  readonly id: number;
  readonly key: string;
  readonly state: 'building' | 'ready';
  readonly metadata_bytes: number;
}

function select(db: Database.Database, where: string, ...args: unknown[]): ImageRecord[] {
  const layersOf = db.prepare('SELECT layer_id FROM image_layers WHERE image_id = ? ORDER BY position').pluck();
  const rows = db.prepare(`SELECT id, key, state, metadata_bytes FROM images ${where} ORDER BY id`).all(...args);
  return (rows as ImageRow[]).map(({ id, key, state, metadata_bytes }) => {
    return { id, key, state, metadataBytes: metadata_bytes, layers: layersOf.all(id) as number[] };
  });
}
